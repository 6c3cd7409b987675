"""How ratios are spread over cases: counts in bins of one width on a logarithmic scale, which add up across workers."""

from __future__ import annotations

import math
from collections import Counter

BINS_PER_OCTAVE = 32  # a bin is 2.2% wide
_ZERO = -(2**15)  # the bin of 0 and of what is smaller than 2**-1024


def bin_of(ratio: float) -> int:
    """The bin of a finite ratio of at least 0."""
    return max(_ZERO, math.floor(math.log2(ratio) * BINS_PER_OCTAVE)) if ratio > 0 else _ZERO


def quantile(bins: Counter[int], share: float) -> float:
    """What at least this share of the ratios does not exceed, by up to one bin's width too large; 0 of nothing."""
    needed, seen = share * sum(bins.values()), 0
    for number in sorted(bins):
        seen += bins[number]
        if seen >= needed:
            return 0.0 if number == _ZERO else 2.0 ** ((number + 1) / BINS_PER_OCTAVE)
    return 0.0
