"""What kernels read and write is what the contract lets this very call touch: no more, no less, and no tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ..building.poison import is_unwritten
from ..building.problem import Problem
from ..building.tensors import build
from ..candidate import Candidate
from ..case import ATTENTION_OPERATIONS
from ..execution.eager import run
from ..execution.tracing import Bools, Ints, Recorder, Trace, tracing, why_untraceable
from ..verdict import Outcome
from . import reads_requests
from .finding import Finding
from .reads_memory import Memory, Region, regions, resolve
from .reads_rights import Rights, rights_of
from .reads_sight import sight_of
from .reads_words import Words
from .session import CandidateError, Session

SHOWN = 4
_NOTHING_SEEN = "reads: no kernel ran in Triton's interpreter, so there is nothing to trace"


def reads(session: Session) -> Finding | None:
    """Run the candidate once more, on the same case anew, and compare every address with the contract."""
    case = session.problem.case
    devices = {tensor.device for tensor in session.actual.values()}
    for device in devices:
        if (reason := why_untraceable(device)) is not None:
            return Finding(Outcome.DECLINED, f"reads: {reason}")
    found = wrong_accesses(session.candidate, build(case))
    if found is None:
        return Finding(Outcome.DECLINED, _NOTHING_SEEN)
    return Finding(Outcome.WRONG_ACCESS, "; ".join(found)) if found else None


def wrong_accesses(candidate: Candidate, problem: Problem) -> list[str] | None:
    """What the candidate touches wrongly in this call, a sentence each and the first few of them.

    `problem` is on the CPU and fresh from `build`. None if no kernel ran in the interpreter. Raises CandidateError
    from what the candidate raises.
    """
    named = regions(problem.arguments)
    with tracing(region.tensor for region in named.values()) as recorder:
        try:
            returned = run(candidate, problem)
        except Exception as error:
            if recorder.stray is None:
                raise CandidateError from error
            return [_stray(recorder, named)]
    if not recorder.launches:
        return None
    named |= regions(returned)
    trace = recorder.trace()
    return list(islice(_complaints(problem, trace, resolve(trace, named), returned), SHOWN))


def _complaints(problem: Problem, trace: Trace, memory: Memory, returned: dict[str, Tensor]) -> Iterator[str]:
    attends = problem.case.spec.operation in ATTENTION_OPERATIONS
    sight = sight_of(problem) if attends else None
    words = Words(problem)
    for address, is_store in memory.outside:
        yield f"{'stores to' if is_store else 'loads from'} {_beside(address, memory.regions)}"
    rights = rights_of(problem, sight)
    for name, region in memory.regions.items():
        given = rights.get(name, Rights())
        yield from _stored(region, given, memory.stores[name].elements, words, returned.get(name))
        yield from _read(region, given, memory.loads[name].elements, words)
    if sight is not None:
        segments = reads_requests.segments_of(problem, trace, memory)
        yield from reads_requests.complaints(problem, sight, segments, memory, words)


def _stored(region: Region, rights: Rights, elements: Ints, words: Words, output: Tensor | None) -> Iterator[str]:
    """Every element that is to be written once, and no other one."""
    counts = np.bincount(elements, minlength=region.tensor.numel()).reshape(region.shape)
    wanted = np.broadcast_to(rights.stores, region.shape)
    yield from _say(region, (counts > 0) & ~wanted, words, "stores to", "which is not to be written")
    yield from _say(region, (counts > 1) & wanted, words, "stores more than once to", "which is to be written once")
    if output is not None:
        never = (counts == 0) & wanted & _is_left(words.problem, region.name, output)
        yield from _say(region, never, words, "never stores to", "which is to be written once")


def _is_left(problem: Problem, name: str, output: Tensor) -> Bools:
    """Where nobody wrote, so far as its value says: torch may write as well, and is not seen."""
    if name in problem.pristine:
        return np.ones(tuple(output.shape), dtype=bool)
    if problem.outputs:
        return np.asarray(is_unwritten(output).numpy())
    return np.asarray(output.float().isnan().numpy())


def _read(region: Region, rights: Rights, elements: Ints, words: Words) -> Iterator[str]:
    read = np.zeros(region.tensor.numel(), dtype=bool)
    read[elements] = True
    read = read.reshape(region.shape)
    allowed, due = (np.broadcast_to(part, region.shape) for part in (rights.may_read, rights.must_read))
    yield from _say(region, read & ~allowed, words, "reads", rights.forbidden)
    yield from _say(region, due & ~read, words, "never reads", rights.needed)


def _say(region: Region, wrong: Bools, words: Words, verb: str, why: str) -> Iterator[str]:
    """The first of the wrong elements, and how many there are; slots rather than elements in an attention's cache."""
    if not wrong.any():
        return
    index = tuple(int(part) for part in np.argwhere(wrong)[0])
    in_slots = region.name.endswith("_cache")
    count = np.count_nonzero(wrong.reshape(*region.shape[:2], -1).any(axis=2) if in_slots else wrong)
    total = f" ({count} such {'slots' if in_slots else 'elements'})" if count > 1 else ""
    yield f"{region.name}: {verb} {words.element(region.name, index)}, {why}{total}"


def _stray(recorder: Recorder, named: dict[str, Region]) -> str:
    stray = recorder.stray
    assert stray is not None
    verb = "would store to" if stray.is_store else "would load from"
    return f"{verb} memory that belongs to nobody: {_beside(stray.address, named)}"


def _beside(address: int, named: dict[str, Region]) -> str:
    """The tensor that an address without an element is next to, and how far it is."""

    def distance(region: Region) -> int:
        first, end = region.span
        return max(first - address, address - end + 1, 0)

    nearest = min((region for region in named.values() if region.tensor.numel()), key=distance)
    first, end = nearest.span
    if address < first:
        return f"{first - address} bytes before {nearest.name}"
    return f"{address - end} bytes after the end of {nearest.name}" if address >= end else f"a gap of {nearest.name}"
