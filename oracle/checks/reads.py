"""What kernels read and write is what the contract lets this very call touch: no more, no less, and no tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from ..building.poison import sentinel_bits
from ..building.problem import Problem
from ..building.tensors import build
from ..candidate import Candidate
from ..case import ATTENTION_OPERATIONS
from ..execution.eager import run
from ..execution.tracing import StrayAccess, Trace, tracing, why_untraceable
from ..formats import INTEGERS
from ..verdict import Outcome
from .finding import Finding
from .reads_elements import Elements
from .reads_memory import Memory, Region, regions, resolve
from .reads_requests import Attribution
from .reads_rights import Rights, rights_of
from .reads_sight import sight_of
from .reads_words import Words, more, next_to
from .session import CandidateError, Session

SHOWN = 4  # sentences
NOTHING_RAN = "no kernel ran in Triton's interpreter, so there is nothing to trace"


def reads(session: Session) -> Finding | None:
    """Run the candidate once more, on the same case built anew, and hold every address against the contract."""
    for device in {tensor.device for tensor in session.actual.values()}:
        if (reason := why_untraceable(device)) is not None:
            return Finding(Outcome.DECLINED, f"reads: {reason}")
    found = wrong_accesses(session.candidate, build(session.problem.case))
    if found is None:
        return Finding(Outcome.DECLINED, f"reads: {NOTHING_RAN}")
    return Finding(Outcome.WRONG_ACCESS, "; ".join(found)) if found else None


def wrong_accesses(candidate: Candidate, problem: Problem) -> list[str] | None:
    """What the candidate touches wrongly in this call, a sentence each, the first few of them.

    `problem` lies on the CPU and is fresh from `build`. None if no kernel ran in the interpreter. Raises
    CandidateError if the candidate raises, unless a kernel was stopped before it left the call's memory.
    """
    named = regions(problem.arguments)
    _unwrite_(problem)
    with tracing(region.tensor for region in named.values()) as recorder:
        try:
            returned = run(candidate, problem)
        except Exception as error:
            if recorder.stray is None:
                raise CandidateError from error
            return [*_beside(resolve(recorder.trace(), named)), _strayed(recorder.stray, named)]
    if not recorder.launches:
        return None
    named |= regions(returned)
    trace = recorder.trace()
    return list(islice(_complaints(problem, trace, resolve(trace, named)), SHOWN))


def _unwrite_(problem: Problem) -> None:
    """out and lse as they are born, also in a case whose poison leaves that out."""
    for name, output in problem.outputs.items():
        if name not in problem.pristine:
            output.view(INTEGERS[output.element_size()]).fill_(sentinel_bits(output.dtype))


def _complaints(problem: Problem, trace: Trace, memory: Memory) -> Iterator[str]:
    """What happened and should not have comes before what did not happen."""
    words = Words(problem)
    sight = sight_of(problem) if problem.case.spec.operation in ATTENTION_OPERATIONS else None
    attributions = [] if sight is None else [Attribution.of(trace, memory, sight, words)]
    rights = rights_of(problem, sight)
    tensors = [
        Elements.of(region, rights.get(name, Rights()), memory, words) for name, region in memory.regions.items()
    ]
    yield from _beside(memory)
    for tensor in tensors:
        yield from tensor.touched()
    for attribution in attributions:
        yield from attribution.read_for_others()
    for tensor in tensors:
        yield from tensor.untouched()
    for attribution in attributions:
        yield from attribution.not_read_for()


def _beside(memory: Memory) -> Iterator[str]:
    """Guard bytes and gaps between rows: in the call's memory, but in none of its tensors."""
    for verb, addresses in (("loads from", memory.loads_beside), ("stores to", memory.stores_beside)):
        if len(addresses):
            yield f"{verb} {next_to(int(addresses[0]), memory.regions)}{more(len(addresses), 'places')}"


def _strayed(stray: StrayAccess, named: Mapping[str, Region]) -> str:
    verb = "would store to" if stray.is_store else "would load from"
    return f"{verb} memory that the call was not given, {next_to(stray.address, named)}"
