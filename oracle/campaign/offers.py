"""What a target accepts, learnt by asking `declines`: the values to leave out, and rows that cover the rest."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from ..candidate import Candidate, modes_of, why_declined
from ..case import MODES
from .covering import Accepts, covering_array, more_rows_for_triples
from .lengths import Sizes
from .pairs import Model, Trait
from .parameters import NOT_APPLICABLE, Row, Value
from .realise import realise
from .sampler import Group, random_group, random_row, row_group

BASES = 8  # accepted rows in which every value is tried
DRAWS = 2000  # rows tried for the first of them


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The rows that cover all pairs, or triples, of what the target offers, and the values that no row has."""

    rows: tuple[Row, ...]
    banned: frozenset[Trait]
    left_out: frozenset[Trait] = frozenset()  # of these, what was not asked: execution modes

    @property
    def model(self) -> Model:
        """Of random rows: all values but those."""
        return Model(extra=True, banned=self.banned)

    def groups(self, seed: int, sizes: Sizes) -> Iterator[Group]:
        """What a campaign goes through: the rows, then random groups without end."""
        yield from (row_group(seed, index, row, sizes) for index, row in enumerate(self.rows))
        yield from (random_group(seed, index, sizes) for index in count())


def make_plan(
    candidate: Candidate, seed: int, sizes: Sizes, *, modes: Sequence[str] = ("eager",), nightly: bool = False
) -> Plan:
    """Rows of all pairs, then, nightly, those of all triples besides, in those of the modes that the target offers.

    The same for the same seed and candidate; a ValueError if the candidate declines everything."""
    accepts = _accepts(candidate, sizes)
    left_out = frozenset(("mode", mode) for mode in MODES if mode not in modes or mode not in modes_of(candidate))
    wide = Model(extra=True, banned=left_out)
    banned = left_out | _declined_values(
        wide, accepts, random.Random(f"{seed}:offers"), lambda: _reason(candidate, seed, sizes)
    )
    model = Model(banned=banned)
    rows = covering_array(model, seed, accepts)
    if nightly:
        rows += more_rows_for_triples(model, seed, rows, accepts)
    return Plan(rows=tuple(rows), banned=banned, left_out=left_out)


def _accepts(candidate: Candidate, sizes: Sizes) -> Accepts:
    def accepts(row: Row) -> bool:
        return why_declined(candidate, realise(row, random.Random(0), sizes)) is None

    return accepts


def _reason(candidate: Candidate, seed: int, sizes: Sizes) -> str:
    case = realise(random_row(Model(), random.Random(seed)), random.Random(0), sizes)
    return (
        f"{candidate.name} declines all of {DRAWS} random cases, one of them because: {why_declined(candidate, case)}"
    )


def _declined_values(model: Model, accepts: Accepts, rng: random.Random, reason: Callable[[], str]) -> frozenset[Trait]:
    """The values that no accepted row could be changed to have, other parameters changed only where they must be."""
    bases: list[Row] = []
    for _ in range(DRAWS):
        row = random_row(model, rng)
        if accepts(row):
            bases.append(row)
        if len(bases) == BASES:
            break
    if not bases:
        raise ValueError(f"target: {reason()}")
    traits = [(name, value) for name, values in model.domains.items() for value in values if value != NOT_APPLICABLE]
    offered = {trait for row in bases for trait in row.items()}
    for trait in traits:
        if trait not in offered and any(_accepted_with(model, accepts, base, trait) for base in bases):
            offered.add(trait)
    return frozenset(traits) - offered


def _accepted_with(model: Model, accepts: Accepts, base: Row, trait: Trait) -> bool:
    def as_in_base(name: str, values: tuple[Value, ...], _row: Row) -> list[Value]:
        return sorted(values, key=lambda value: value != base[name])

    row = model.complete(dict([trait]), as_in_base)
    return row is not None and accepts(row)
