"""Making a failing case small: fewer requests, shorter lengths, then one feature after the other off.

Pure functions on cases. Whoever judges them drives a `Search`, or hands `shrink` a function that says whether a
case still fails with the symptom of the first.
"""

from __future__ import annotations

from .search import EVALUATIONS, Search, shrink
from .symptom import Symptom, symptom_of

__all__ = ["EVALUATIONS", "Search", "Symptom", "shrink", "symptom_of"]
