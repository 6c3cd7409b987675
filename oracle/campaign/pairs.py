"""All pairs, and triples, of feature values: which are feasible, and which were run.

A tuple of values is feasible if some complete row has them all and satisfies every constraint. Nothing here trusts
the generator of rows (`covering.py`): `feasible` enumerates, and `TupleCounter` counts what was really judged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from typing import Any

from .parameters import CONSTRAINTS, NOT_APPLICABLE, PARAMETERS, Constraint, Parameter, Row, Value, domain

Trait = tuple[str, Value]
Values = frozenset[Trait]  # of as many parameters as there are values: two for a pair, three for a triple
PAIRS, TRIPLES = 2, 3  # the strength of a count, or of a covering array: how many values make a tuple
Order = Callable[[str, tuple[Value, ...], Row], Iterable[Value]]
Shuffle = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Model:
    """Parameters and constraints, with the search that both the count and the generator rest on."""

    parameters: tuple[Parameter, ...] = PARAMETERS
    constraints: tuple[Constraint, ...] = CONSTRAINTS
    extra: bool = False  # whether rows may hold values that only random rows have
    banned: frozenset[Trait] = frozenset()

    @cached_property
    def domains(self) -> Mapping[str, tuple[Value, ...]]:
        return {
            parameter.name: tuple(
                value for value in domain(parameter, extra=self.extra) if (parameter.name, value) not in self.banned
            )
            for parameter in self.parameters
        }

    @cached_property
    def _constraints_of(self) -> Mapping[str, tuple[Constraint, ...]]:
        return {
            parameter.name: tuple(item for item in self.constraints if parameter.name in item.scope)
            for parameter in self.parameters
        }

    @cached_property
    def bits(self) -> Mapping[Trait, int]:
        """One bit for every value a tuple may hold; `NOT_APPLICABLE` is no value."""
        traits = [(p.name, value) for p in self.parameters for value in p.values]
        return {trait: 1 << index for index, trait in enumerate(traits)}

    def allows(self, row: Row, name: str) -> bool:
        """Whether no constraint on `name` is broken by what the row holds so far."""
        return all(
            item.holds(*(row[key] for key in item.scope))
            for item in self._constraints_of[name]
            if all(key in row for key in item.scope)
        )

    def is_valid(self, row: Row) -> bool:
        """Whether a complete row satisfies every constraint."""
        return all(item.holds(*(row[name] for name in item.scope)) for item in self.constraints)

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The parameters but the first, split into groups that no constraint joins once the first is set."""
        root = self.parameters[0].name
        group_of = {parameter.name: {parameter.name} for parameter in self.parameters[1:]}
        for constraint in self.constraints:
            joined = set().union(*(group_of[name] for name in constraint.scope if name != root))
            group_of.update(dict.fromkeys(joined, joined))
        distinct = {id(group): group for group in group_of.values()}
        return tuple(tuple(name for name in group_of if name in group) for group in distinct.values())

    def complete(self, fixed: Row, order: Order, shuffle: Shuffle = tuple) -> Row | None:
        """`fixed` and a value for every other parameter; None if no such row exists.

        Exhaustive, so None is a proof: the first parameter's values in turn, then every group on its own. `order`
        says which values are tried first, `shuffle` in which sequence groups and their parameters are set.
        """
        root = self.parameters[0].name
        if not all(self.allows(fixed, name) for name in fixed):
            return None
        for value in (fixed[root],) if root in fixed else order(root, self.domains[root], fixed):
            row = {**fixed, root: value}
            if all(self.allows(row, name) for name in row) and all(
                self._fill(row, [name for name in shuffle(group) if name not in fixed], 0, order)
                for group in shuffle(self.groups)
            ):
                return row
        return None

    def _fill(self, row: Row, rest: list[str], depth: int, order: Order) -> bool:
        if depth == len(rest):
            return True
        name = rest[depth]
        for value in order(name, self.domains[name], row):
            row[name] = value
            if self.allows(row, name) and self._fill(row, rest, depth + 1, order):
                return True
            del row[name]
        return False

    def mask(self, traits: Iterable[Trait]) -> int:
        """The bits of these values; those without one are left out."""
        return sum(self.bits.get(trait, 0) for trait in traits)


MODEL = Model()  # of the covering array, and of every count of pairs and triples


def feasible(model: Model, strength: int, witnesses: Iterable[Row] = ()) -> set[Values]:
    """Every tuple of values that some valid row holds; `witnesses` are rows to look at before searching.

    A witness counts only after its own check against the constraints, so a wrong one cannot add a tuple.
    """
    witnesses = [row for row in witnesses if model.is_valid(row)]
    smaller = feasible(model, strength - 1, witnesses) if strength > PAIRS else None
    found: set[Values] = set()

    def take(row: Row) -> None:
        found.update(map(frozenset, combinations(_traits_of(row), strength)))

    for row in witnesses:
        take(row)
    for values in all_tuples(model, strength):
        if values in found:
            continue
        if smaller is not None and not all(frozenset(part) in smaller for part in combinations(values, strength - 1)):
            continue  # a part of it goes together in no row, so the whole does not either
        complete = model.complete(dict(values), lambda _name, values, _row: values)
        if complete is not None:
            take(complete)
    return found


def all_tuples(model: Model, strength: int) -> Iterator[Values]:
    """Every tuple of values of so many parameters, feasible or not."""
    for parameters in combinations(model.parameters, strength):
        names = [parameter.name for parameter in parameters]
        for values in product(*(parameter.values for parameter in parameters)):
            yield frozenset(zip(names, values, strict=True))


def _traits_of(row: Row) -> list[Trait]:
    return [trait for trait in row.items() if trait[1] != NOT_APPLICABLE]


def single_bits(mask: int) -> Iterator[int]:
    """The bits of a mask one by one, the lowest first."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def describe(values: Values) -> str:
    """A tuple of values in words."""
    return ", ".join(f"{name}={value}" for name, value in sorted(values, key=lambda trait: trait[0]))


@dataclass
class TupleCounter:
    """Which values were seen together, so many at a time. Merges, and travels between processes.

    For every tuple less one value, as the mask of its bits, the mask of the values seen beside it: a pair stands in
    two entries, a triple in three.
    """

    strength: int = PAIRS
    seen: dict[int, int] = field(default_factory=dict)

    def add(self, mask: int) -> None:
        for part in combinations(single_bits(mask), self.strength - 1):
            key = sum(part)
            self.seen[key] = self.seen.get(key, 0) | mask

    def merge(self, other: TupleCounter) -> None:
        for key, mask in other.seen.items():
            self.seen[key] = self.seen.get(key, 0) | mask

    def covered(self, model: Model, tuples: Collection[Values]) -> int:
        return len(tuples) - len(self.missing(model, tuples))

    def missing(self, model: Model, tuples: Collection[Values]) -> list[Values]:
        bits = model.bits
        return [values for values in tuples if not self._holds([bits[trait] for trait in values])]

    def _holds(self, bits: list[int]) -> bool:
        return bool(self.seen.get(sum(bits[:-1]), 0) & bits[-1])
