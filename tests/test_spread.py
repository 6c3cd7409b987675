"""Bins of ratios: narrow enough to say a quantile, the same whoever counted, and with room for 0."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from pageproof.oracle.campaign.spread import BINS_PER_OCTAVE, bin_of, quantile

WIDTH = 2 ** (1 / BINS_PER_OCTAVE)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 0.999, 1.0])
def test_quantile_is_at_most_a_bin_too_large(share: float) -> None:
    rng = random.Random(0)
    ratios = sorted(rng.lognormvariate(-2, 2) for _ in range(5000))
    exact = ratios[round(share * len(ratios)) - 1]
    found = quantile(Counter(map(bin_of, ratios)), share)
    assert exact <= found <= exact * WIDTH * (1 + 1e-9)


def test_parts_add_up() -> None:
    parts = [Counter(map(bin_of, ratios)) for ratios in ([0.1, 0.5], [0.5, 0.9, 1.4])]
    assert quantile(parts[0] + parts[1], 0.5) == pytest.approx(0.5, rel=WIDTH - 1)


def test_zero_has_a_bin_of_its_own() -> None:
    bins = Counter(map(bin_of, [0.0, 0.0, 0.0, 5e-324, 0.25]))
    assert quantile(bins, 0.5) == 0.0
    assert quantile(bins, 1.0) == pytest.approx(0.25, rel=WIDTH - 1)
    assert quantile(Counter(), 0.5) == 0.0
