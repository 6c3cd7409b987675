"""Rows that hold all pairs, or all triples, of feature values, found greedily; `pairs.py` counts whether they do."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from .pairs import PAIRS, Model, TupleCounter, all_tuples, single_bits
from .parameters import Row, Value

Accepts = Callable[[Row], bool]

CANDIDATE_ROWS = 6  # tried for each row of the array; the one with most new tuples is kept
TRIES = 12  # rows drawn for one tuple before the target is said to accept none of them


def covering_array(model: Model, seed: int, accepts: Accepts = lambda row: True) -> list[Row]:
    """Rows that hold every pair for which a valid row that the target `accepts` was found; greedy, same for a seed."""
    still_open = OpenTuples(PAIRS)
    for pair in all_tuples(model, PAIRS):
        if not pair & model.banned:
            still_open.open(sum(model.bits[trait] for trait in pair))
    return _Greedy(model, random.Random(f"{seed}:pairs"), accepts, still_open).rows()


def more_rows_for_triples(
    model: Model, seed: int, rows: Sequence[Row], accepts: Accepts = lambda row: True
) -> list[Row]:
    """Rows that hold, together with `rows` of all pairs, every triple, with the same proviso.

    A triple of which `rows` lack a pair is not tried: no row that the target accepts was found for that pair.
    """
    pairs = TupleCounter()
    for row in rows:
        pairs.add(model.mask(row.items()))
    still_open = OpenTuples(PAIRS + 1)
    for first, beside_first in pairs.seen.items():
        for second in single_bits(beside_first & -(first << 1)):  # those above the first, so that each pair comes once
            for third in single_bits(beside_first & pairs.seen[second] & -(second << 1)):
                still_open.open(first | second | third)
    for row in rows:
        still_open.close(model.mask(row.items()))
    return _Greedy(model, random.Random(f"{seed}:triples"), accepts, still_open).rows()


class OpenTuples:
    """The tuples that no row has yet, as `TupleCounter` has those that were seen."""

    def __init__(self, strength: int) -> None:
        self.strength = strength
        self._beside: dict[int, int] = {}  # a tuple less one value -> the values that make it an open one

    def open(self, mask: int) -> None:
        """Add the tuple of these bits."""
        for bit in single_bits(mask):
            self._beside[mask ^ bit] = self._beside.get(mask ^ bit, 0) | bit

    def close(self, mask: int) -> None:
        """Take away every tuple of these bits."""
        for part in combinations(single_bits(mask), self.strength - 1):
            key = sum(part)
            left = self._beside.get(key, 0) & ~mask
            if left:
                self._beside[key] = left
            else:
                self._beside.pop(key, None)

    def of(self, mask: int) -> int:
        """How many a row of these bits would close, times `strength`."""
        parts = combinations(single_bits(mask), self.strength - 1)
        return sum((self._beside.get(sum(part), 0) & mask).bit_count() for part in parts)

    def with_bit(self, bit: int, held: int) -> int:
        """How many this bit would close beside the held ones, times `strength - 1`."""
        parts = combinations(single_bits(held), self.strength - 2)
        return sum((self._beside.get(sum(part) | bit, 0) & held).bit_count() for part in parts)

    def fullest(self, rng: random.Random) -> list[int] | None:
        """The bits of an open tuple: those but one that most are open of, and of these the one with most more."""
        if not self._beside:
            return None
        key = max(self._beside, key=lambda part: self._beside[part].bit_count())
        parts = list(single_bits(key))

        def others(bit: int) -> tuple[int, float]:
            return sum(self._beside[key ^ part | bit].bit_count() for part in parts), rng.random()

        return [*parts, max(single_bits(self._beside[key]), key=others)]


class _Greedy:
    def __init__(self, model: Model, rng: random.Random, accepts: Accepts, still_open: OpenTuples) -> None:
        self.model, self.rng, self.accepts, self.open = model, rng, accepts, still_open
        self.trait_of = {bit: trait for trait, bit in model.bits.items()}

    def rows(self) -> list[Row]:
        rows: list[Row] = []
        while (bits := self.open.fullest(self.rng)) is not None:
            wanted = dict(self.trait_of[bit] for bit in bits)
            candidates = self._candidates(wanted) or self._insist(wanted)
            if candidates:
                best = max(candidates, key=lambda row: self.open.of(self.model.mask(row.items())))
                rows.append(best)
                self.open.close(self.model.mask(best.items()))
            else:
                self.open.close(sum(bits))  # given up
        return rows

    def _candidates(self, wanted: Row) -> list[Row]:
        """Rows with these values and, as far as greed sees, many that are open; none if no valid row has them."""
        rows: list[Row] = []
        for _ in range(CANDIDATE_ROWS):
            row = self.model.complete(wanted, self._by_gain, self._sequence)
            if row is None:
                break
            rows += [row] * self.accepts(row)
        return rows

    def _insist(self, wanted: Row) -> list[Row]:
        """Plain random rows with these values: greed may lead every candidate into what the target declines."""
        for _ in range(TRIES):
            row = self.model.complete(wanted, self._shuffled, self._sequence)
            if row is None:
                return []
            if self.accepts(row):
                return [row]
        return []

    def _sequence(self, items: Sequence[Any]) -> list[Any]:
        return self.rng.sample(items, len(items))

    def _by_gain(self, name: str, values: tuple[Value, ...], row: Row) -> list[Value]:
        held, bits = self.model.mask(row.items()), self.model.bits

        def gain(value: Value) -> tuple[int, float]:
            bit = bits.get((name, value), 0)
            return (self.open.with_bit(bit, held) if bit else -1, self.rng.random())

        return sorted(values, key=gain, reverse=True)

    def _shuffled(self, _name: str, values: tuple[Value, ...], _row: Row) -> list[Value]:
        return self._sequence(values)
