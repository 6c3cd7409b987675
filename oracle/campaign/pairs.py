"""All pairs of feature values: which are feasible, and which were run.

A pair is feasible if some complete row has both values and satisfies every constraint. Nothing here trusts the
generator of rows (`covering.py`): `feasible_pairs` enumerates, and `PairCounter` counts what was really judged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .parameters import CONSTRAINTS, NOT_APPLICABLE, PARAMETERS, Constraint, Parameter, Row, Value, domain

Trait = tuple[str, Value]
Pair = frozenset[Trait]  # of two parameters
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
        """One bit for every value a pair may hold; `NOT_APPLICABLE` is no value."""
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


MODEL = Model()  # of the covering array, and of every count of pairs


def feasible_pairs(model: Model, witnesses: Iterable[Row] = ()) -> set[Pair]:
    """Every pair of values that some valid row holds; `witnesses` are rows to look at before searching.

    A witness counts only after its own check against the constraints, so a wrong one cannot add a pair.
    """
    found: set[Pair] = set()

    def take(row: Row) -> None:
        traits = [trait for trait in row.items() if trait[1] != NOT_APPLICABLE]
        found.update(frozenset((a, b)) for i, a in enumerate(traits) for b in traits[:i])

    for row in witnesses:
        if model.is_valid(row):
            take(row)
    for pair in all_pairs(model):
        if pair not in found:
            complete = model.complete(dict(pair), lambda _name, values, _row: values)
            if complete is not None:
                take(complete)
    return found


def all_pairs(model: Model) -> Iterator[Pair]:
    """Every pair of values of two parameters, feasible or not."""
    for i, first in enumerate(model.parameters):
        for second in model.parameters[:i]:
            yield from (frozenset({(first.name, a), (second.name, b)}) for a in first.values for b in second.values)


@dataclass
class PairCounter:
    """Which values were seen together, as one bit mask for each value. Merges, and travels between processes."""

    seen: dict[int, int] = field(default_factory=dict)

    def add(self, mask: int) -> None:
        rest = mask
        while rest:
            bit = rest & -rest
            self.seen[bit] = self.seen.get(bit, 0) | mask
            rest ^= bit

    def merge(self, other: PairCounter) -> None:
        for bit, mask in other.seen.items():
            self.seen[bit] = self.seen.get(bit, 0) | mask

    def covered(self, model: Model, pairs: Collection[Pair]) -> int:
        return len(pairs) - len(self.missing(model, pairs))

    def missing(self, model: Model, pairs: Collection[Pair]) -> list[Pair]:
        bits = model.bits
        return [pair for pair in pairs if not self._holds(*(bits[trait] for trait in pair))]

    def _holds(self, a: int, b: int) -> bool:
        return bool(self.seen.get(a, 0) & b)
