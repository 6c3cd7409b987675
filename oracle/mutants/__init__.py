"""Seeded bugs: copies of our kernels with one known fault each, to measure what the oracle finds.

`candidate("window_off_by_one")` is a Candidate like any other, so `fuzz --target mutant:window_off_by_one` hunts it.
"""

from .catalogue import MUTANTS, Mutant, find
from .loading import candidate

__all__ = ["MUTANTS", "Mutant", "candidate", "find"]
