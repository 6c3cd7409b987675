"""Which checks say something of a case. Knows cases only: neither torch nor a candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from .case import CHECKS, FLOAT8, RELATIONS, TREES, Case

# Checks that look at a changed copy of the caches; of pages that are far apart there is no room for one.
_COPYING = frozenset({"interference", "must_read", "key_order", "page_order", "split", "ones", "shift"})


def why_not(case: Case) -> str | None:
    """Why the case's check says nothing of a case like this, in one sentence; None if it does."""
    if case.check in ("answer", "reads") or case.check not in CHECKS:
        return None
    return next((f"check: {reason}" for reason in _reasons(case)), None)


def applicable(case: Case) -> tuple[str, ...]:
    """The relations that say something of the case."""
    return tuple(check for check in RELATIONS if why_not(replace(case, check=check)) is None)


def _reasons(case: Case) -> Iterator[str]:
    spec, check = case.spec, case.check
    if spec.operation.startswith("update"):
        yield f"{spec.operation} is compared bit for bit, so {check} says nothing more"
        return
    if check == "repeat":
        return
    if (check == "swap") != (spec.operation == "merge_states"):
        yield f"{check} is not asked of {spec.operation}"
        return
    if check == "swap":
        return
    if not sum(case.batch.query_lens):
        yield f"{check} needs a row"
    copies = check in _COPYING or _copies_for_its_kind(case)
    if spec.far_pages and copies:
        yield f"{check} needs a copy of the caches, for which far pages leave no room"
    if check in _REASONS and (reason := _REASONS[check](case)) is not None:
        yield reason


def _copies_for_its_kind(case: Case) -> bool:
    tree = case.check == "sequential" and case.spec.query_bias in TREES
    return tree or (case.check == "groups" and case.spec.num_kv_heads > 1)


def _sequential(case: Case) -> str | None:
    spec = case.spec
    if max(case.batch.query_lens) < 2:
        return "sequential needs a request of two new tokens"
    if spec.query_bias == "dense":
        return "sequential: a dense query bias belongs to the tokens that come together"
    placed = spec.alibi or spec.sliding_window is not None
    if placed and spec.query_bias in TREES:
        return "sequential: ALiBi and windows do not know of a tree's depth"
    if placed and not spec.causal:
        return "sequential: without causality a single token stands at the end of what it sees"
    return None


def _split(case: Case) -> str | None:
    spec = case.spec
    if spec.out_dtype == FLOAT8:
        return "split: parts that were clamped to float8 do not merge"
    limited = spec.causal or spec.sliding_window or spec.right_window is not None or spec.query_bias != "none"
    if limited and 1 not in case.batch.query_lens:
        return "split: of several new tokens no two see the same keys, and no request has one"
    return None


def _key_order(case: Case) -> str | None:
    return "key_order: ALiBi weighs a key by its place" if case.spec.alibi else None


def _request_order(case: Case) -> str | None:
    return None if case.batch.num_requests > 1 else "request_order needs two requests"


def _shift(case: Case) -> str | None:
    return "shift: softcap bends what is added to a score" if case.spec.softcap is not None else None


def _rescale(case: Case) -> str | None:
    if case.spec.q_dtype == FLOAT8 and case.spec.scales == "none":
        return "rescale: float8 queries without a scale cannot be doubled"
    return None


def _groups(case: Case) -> str | None:
    return None if case.spec.num_query_heads > 1 else "groups needs two query heads"


_REASONS: dict[str, Callable[[Case], str | None]] = {
    "sequential": _sequential,
    "key_order": _key_order,
    "request_order": _request_order,
    "split": _split,
    "shift": _shift,
    "rescale": _rescale,
    "groups": _groups,
}
