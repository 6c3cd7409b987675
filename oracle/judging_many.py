"""Many cases of one candidate: on a GPU an evaluation costs its launches, however many rows it is of.

The reference is asked once for the cases of one kernel. One that is not plainly right is compared on its own, from
what the candidate has left: what is said of a case is what `judging.judge` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from .bound.evaluate import Expected, evaluate, evaluate_together
from .bound.statistics import why_not_generic
from .bound.together import footprint, is_exact, joined, kernel_of
from .building.guards import any_changed
from .candidate import Candidate, NumericContract
from .case import Case, Spec
from .compare import Ratios, ratios_by_case, ratios_of_caches
from .judging import Run, ask_more, begin, finish
from .verdict import Verdict

TOGETHER = 16  # cases at most
WAITING_BYTES = 1 << 29  # of cases that wait, and of what their evaluation will take, roughly


class Kind(NamedTuple):
    """What cases that are evaluated together have in common."""

    kernel: Spec
    contract: NumericContract
    generic: bool
    forms: frozenset[tuple[str, torch.dtype, torch.Size]]  # of the outputs: name, dtype, shape but for the rows


def judge_many(
    cases: Sequence[Case], candidate: Candidate, device: torch.device | str, *, at: Callable[[int], None]
) -> Iterator[tuple[int, Verdict]]:
    """(index of a case, its verdict), for each of them, in the order in which they become known.

    at: is told the index of a case before the candidate runs it, and again before anything else is asked of it alone.
    Raises what `judge` raises; of the cases without a verdict nothing is known then.
    """
    waiting: list[tuple[int, Run]] = []
    taken = 0
    for index, case in enumerate(cases):
        at(index)
        begun = begin(case, candidate, device)
        if isinstance(begun, Verdict):
            yield index, begun
            continue
        waiting.append((index, begun))
        taken += footprint(begun.problem)
        if len(waiting) == TOGETHER or taken > WAITING_BYTES:
            yield from _settled(waiting, at)
            waiting, taken = [], 0
    yield from _settled(waiting, at)


def _settled(waiting: Sequence[tuple[int, Run]], at: Callable[[int], None]) -> Iterator[tuple[int, Verdict]]:
    right = dict(_right([run for _, run in waiting]))
    for index, run in waiting:
        at(index)
        yield index, ask_more(run, *right[id(run)]) if id(run) in right else finish(run)


def _right(runs: Sequence[Run]) -> Iterator[tuple[int, tuple[Expected, Ratios]]]:
    """Those of the runs, by id, that are plainly right, with what they are held to and how far off they are."""
    if len(runs) < 2 or any_changed([run.problem.guards for run in runs]):
        return  # what has changed may be what the answers would be made of
    groups: dict[Kind, list[Run]] = {}
    for run in runs:
        if (kind := _kind_of(run)) is not None:
            groups.setdefault(kind, []).append(run)
    for kind, group in groups.items():
        if len(group) > 1:
            yield from _right_of(kind, group)


def _right_of(kind: Kind, group: Sequence[Run]) -> Iterator[tuple[int, tuple[Expected, Ratios]]]:
    parts, found = _caches(group) if is_exact(kind.kernel) else _rows(kind, group)
    for run, expected, ratios in zip(group, parts, found, strict=True):
        if ratios is not None:
            yield id(run), (expected, ratios)


def _rows(kind: Kind, group: Sequence[Run]) -> tuple[list[Expected], list[Ratios | None]]:
    whole = evaluate_together([run.problem for run in group], kind.contract, generic=kind.generic)
    actual = {name: joined([run.actual[name] for run in group]) for name in whole.values}
    num_tokens = [run.problem.case.batch.num_tokens for run in group]
    parts = [whole.rows(stop - rows, stop) for rows, stop in zip(num_tokens, accumulate(num_tokens), strict=True)]
    return parts, ratios_by_case(actual, whole, num_tokens)


def _caches(group: Sequence[Run]) -> tuple[list[Expected], list[Ratios | None]]:
    parts = [evaluate(run.problem, run.contract) for run in group]
    return parts, ratios_of_caches([(run.actual, expected) for run, expected in zip(group, parts, strict=True)])


def _kind_of(run: Run) -> Kind | None:
    """None of what is evaluated alone: pages too far apart to be copied, outputs of another size than asked."""
    case = run.problem.case
    if case.spec.far_pages:
        return None
    if is_exact(case.spec):
        return Kind(case.spec, run.contract, generic=False, forms=frozenset())
    if any(len(tensor) != case.batch.num_tokens for tensor in run.actual.values()):
        return None
    forms = frozenset((name, tensor.dtype, tensor.shape[1:]) for name, tensor in run.actual.items())
    return Kind(kernel_of(case.spec), run.contract, why_not_generic(case, run.contract) is None, forms)
