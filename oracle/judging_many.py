"""Many cases of one candidate: the reference is asked once for those of one kernel.

What is said of a case is what `judging.judge` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from .candidate import Candidate
from .case import Case
from .environment import memory_of
from .judging import ReplayRun, Run, begin, finish
from .questions import ask_together
from .verdict import Verdict

TOGETHER = 16  # cases at most
WAITING_SHARE = 1 / 64  # of a GPU's memory: what cases that wait may take, and their evaluation will, roughly
WAITING_BYTES = 1 << 29  # the same of a CPU's

Waiting = tuple[int, Run | ReplayRun]  # the index of a case, and how far it is


def judge_many(
    cases: Sequence[Case], candidate: Candidate, device: torch.device | str, *, at: Callable[[int], None]
) -> Iterator[tuple[int, Verdict]]:
    """(index of a case, its verdict), for each of them, in the order in which they become known.

    at: is told the index of a case before the candidate runs it, and again before anything else is asked of it alone.
    Raises what `judge` raises; of the cases without a verdict nothing is known then. Replays are not waited for: a
    fault of the device shows at the case that did it or at one after it; `judge` is sure.
    """
    waiting: list[Waiting] = []
    device = torch.device(device)
    most = WAITING_SHARE * memory_of(device) if device.type == "cuda" else WAITING_BYTES
    for index, case in enumerate(cases):
        at(index)
        begun = begin(case, candidate, device)
        if isinstance(begun, Verdict):
            yield index, begun
            continue
        waiting.append((index, begun.kept() if isinstance(begun, Run) else begun))
        if len(waiting) == TOGETHER or sum(each.bytes for _, each in waiting) > most:
            yield from _settled(waiting, at)
            waiting = []
    yield from _settled(waiting, at)


def _settled(waiting: Sequence[Waiting], at: Callable[[int], None]) -> Iterator[tuple[int, Verdict]]:
    if not waiting:
        return
    at(waiting[-1][0])  # whatever has become of the cases after it
    changed = _changed([begun for _, begun in waiting])
    together = [each for each, alone in zip(waiting, changed, strict=True) if not alone]
    questions = [begun.questions() for _, begun in together]
    replies = iter(ask_together([question for part in questions for question in part]))
    for (index, begun), part in zip(together, questions, strict=True):
        at(index)
        yield index, begun.verdict([next(replies) for _ in part])
    for (index, begun), alone in zip(waiting, changed, strict=True):
        if alone:
            at(index)
            yield index, finish(begun)


def _changed(begun: Sequence[Run | ReplayRun]) -> list[bool]:
    """Of which something changed that may not. Waits for the device, once."""
    flags = [each.difference() for each in begun]
    some = [flag for flag in flags if flag is not None]
    found = iter(torch.stack(some).tolist() if some else [])
    return [flag is not None and next(found) for flag in flags]
