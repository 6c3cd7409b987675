"""Implementations that the oracle can judge, by name."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from ..candidate import Candidate

TARGETS = "ours, reference, mutant:NAME, or module:attribute for a Candidate of your own"

_MARK = "pageproof_target"  # the attribute under which a candidate keeps what it was found by


def find(target: str) -> Candidate:
    """The candidate that `target` names; a ValueError says what could be named instead.

    `module:attribute` may be a Candidate, or a class or function that makes one when called without arguments.
    Implementations are imported when they are asked for: kernels are not needed to judge something else.
    """
    candidate = _find(target)
    with contextlib.suppress(AttributeError, TypeError):  # of a class that takes no more attributes
        setattr(candidate, _MARK, target)
    return candidate


def target_of(candidate: Candidate) -> str:
    """What `find` found this candidate by; "" if it did not come from there."""
    return str(getattr(candidate, _MARK, ""))


def _find(target: str) -> Candidate:
    kind, _, rest = target.partition(":")
    if target == "ours":
        from .ours import Ours

        return Ours()
    if target == "reference":
        from .reference import Reference

        return Reference()
    if kind == "mutant" and rest:
        from .. import mutants

        mutant: Candidate = mutants.candidate(rest)
        return mutant
    if kind and rest:
        return _imported(kind, rest)
    raise ValueError(f"target: found {target!r}, expected {TARGETS}")


def _imported(module: str, attribute: str) -> Candidate:
    found: Any = importlib.import_module(module)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ValueError(f"target: found no {name!r} in {module}, expected {TARGETS}")
        found = getattr(found, name)
    candidate: Candidate = found() if _is_factory(found) else found
    missing = [name for name in ("name", "declines", "contract", "call") if not hasattr(candidate, name)]
    if missing:
        raise ValueError(f"target: found {module}:{attribute} without {missing}, expected a Candidate")
    return candidate


def _is_factory(found: object) -> bool:
    return isinstance(found, type) or (callable(found) and not hasattr(found, "declines"))
