"""Rows that hold all pairs of feature values, found greedily; `pairs.py` counts whether they do."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from .pairs import Model, Trait, all_pairs
from .parameters import Row, Value

Accepts = Callable[[Row], bool]

CANDIDATE_ROWS = 6  # tried for each row of the array; the one with most new pairs is kept
TRIES = 12  # rows drawn for one pair before the target is said to accept none of them


def covering_array(model: Model, seed: int, accepts: Accepts = lambda row: True) -> list[Row]:
    """Rows that hold every pair for which a valid row that the target `accepts` was found; greedy, same for a seed."""
    return _Greedy(model, random.Random(f"{seed}:pairs"), accepts).rows()


class _Greedy:
    def __init__(self, model: Model, rng: random.Random, accepts: Accepts) -> None:
        self.model, self.rng, self.accepts = model, rng, accepts
        self.open = {bit: 0 for bit in model.bits.values()}
        for first, second in (tuple(pair) for pair in all_pairs(model)):
            if first not in model.banned and second not in model.banned:
                self.open[model.bits[first]] |= model.bits[second]
                self.open[model.bits[second]] |= model.bits[first]

    def rows(self) -> list[Row]:
        rows: list[Row] = []
        while (pair := self._fullest_pair()) is not None:
            drawn = (self._draw(pair) for _ in range(CANDIDATE_ROWS))
            candidates = [row for row in drawn if row is not None and self.accepts(row)]
            if not candidates:
                candidates = self._insist(pair)
            if candidates:
                best = max(candidates, key=self._gain)
                rows.append(best)
                self._close(self.model.mask(best.items()))
            else:
                self._give_up(pair)
        return rows

    def _insist(self, pair: tuple[Trait, Trait]) -> list[Row]:
        """Plain random rows with this pair: greed may lead every candidate into what the target declines."""
        for _ in range(TRIES):
            row = self.model.complete(dict(pair), self._shuffled, self._sequence)
            if row is None:
                return []
            if self.accepts(row):
                return [row]
        return []

    def _fullest_pair(self) -> tuple[Trait, Trait] | None:
        """An open pair of the value that has most of them."""
        trait, bit = max(self.model.bits.items(), key=lambda item: self.open[item[1]].bit_count())
        if not self.open[bit]:
            return None
        partners = [(other, b) for other, b in self.model.bits.items() if self.open[bit] & b]
        return trait, max(partners, key=lambda item: (self.open[item[1]].bit_count(), self.rng.random()))[0]

    def _draw(self, pair: tuple[Trait, Trait]) -> Row | None:
        return self.model.complete(dict(pair), self._by_gain, self._sequence)

    def _sequence(self, items: Sequence[Any]) -> list[Any]:
        return self.rng.sample(items, len(items))

    def _by_gain(self, name: str, values: tuple[Value, ...], row: Row) -> list[Value]:
        held, bits, open_pairs = self.model.mask(row.items()), self.model.bits, self.open

        def gain(value: Value) -> tuple[int, float]:
            bit = bits.get((name, value), 0)
            return ((open_pairs[bit] & held).bit_count() if bit else -1, self.rng.random())

        return sorted(values, key=gain, reverse=True)

    def _shuffled(self, _name: str, values: tuple[Value, ...], _row: Row) -> list[Value]:
        return self._sequence(values)

    def _gain(self, row: Row) -> int:
        mask = self.model.mask(row.items())
        return sum((self.open[bit] & mask).bit_count() for bit in self.model.bits.values() if bit & mask)

    def _close(self, mask: int) -> None:
        for bit in self.model.bits.values():
            if bit & mask:
                self.open[bit] &= ~mask

    def _give_up(self, pair: tuple[Trait, Trait]) -> None:
        first, second = (self.model.bits[trait] for trait in pair)
        self.open[first] &= ~second
        self.open[second] &= ~first
