"""Which row a cache was read for: whether each request kept to its own keys, and each row got all of its own.

A program works on one thing after another, and stores what came of each. From one of its stores to the next is a
segment, and the rows of q that it loads there are the rows that it works for. A segment in which no q is loaded goes
on with the rows of the program's last one; if there was none, it counts for all rows, as a possibility.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..building.problem import Problem
from ..execution.tracing import Bools, Ints, Trace
from .reads_memory import Memory, Touches
from .reads_sight import Sight
from .reads_words import Words


@dataclass(frozen=True)
class Segments:
    """Rows are (token, query head) pairs, token * num_query_heads + head."""

    of_access: Ints  # [num_accesses]
    rows: Bools  # [num_segments, num_tokens * num_query_heads]: for whom it may have read what it read


def segments_of(problem: Problem, trace: Trace, memory: Memory) -> Segments:
    """Cut the trace into segments, and find the rows of each."""
    is_store, programs = trace.is_store, trace.programs
    begins = np.ones(len(programs), dtype=bool)
    begins[1:] = (programs[1:] != programs[:-1]) | (is_store[:-1] & ~is_store[1:])
    of_access = np.cumsum(begins) - 1
    rows = np.zeros((int(begins.sum()), problem.case.batch.num_tokens * problem.case.spec.num_query_heads), dtype=bool)
    for name in ("q", "q_nope", "q_pe"):
        if name in memory.loads:
            touches = memory.loads[name]
            rows[of_access[touches.accesses], touches.elements // memory.regions[name].shape[-1]] = True
    program = programs[begins]
    known = rows.any(axis=1)
    for segment in np.flatnonzero(~known).tolist():
        goes_on = segment > 0 and program[segment] == program[segment - 1]
        rows[segment] = rows[segment - 1] if goes_on else True
    return Segments(of_access, rows)


def complaints(problem: Problem, sight: Sight, segments: Segments, memory: Memory, words: Words) -> Iterator[str]:
    """What some request read and may not, and what some row sees and was not read for it."""
    for name in ("k_cache", "v_cache", "latent_cache"):
        if name in memory.loads:
            read = _slots_read(problem, segments, memory, memory.loads[name], name)
            yield from _read_for_others(name, sight, segments, read, words)
            yield from _not_read_for(name, sight, segments, read, words)


def _slots_read(problem: Problem, segments: Segments, memory: Memory, loads: Touches, name: str) -> Bools:
    """[num_segments, num_kv_heads, num_slots]: where some element of the slot's row was loaded."""
    num_blocks, block_size, *inner = memory.regions[name].shape
    heads, dims = problem.case.spec.num_kv_heads, inner[-1]
    read = np.zeros((len(segments.rows), heads, num_blocks * block_size), dtype=bool)
    slots, head_of = np.divmod(loads.elements // dims, heads)  # an MLA cache has one head, and no dimension of heads
    read[segments.of_access[loads.accesses], head_of, slots] = True
    return read


def _read_for_others(name: str, sight: Sight, segments: Segments, read: Bools, words: Words) -> Iterator[str]:
    """A slot that was read where none of the rows at work belongs to a request that may see it."""
    num_tokens, num_slots = sight.sees.shape
    tokens = segments.rows.reshape(len(segments.rows), num_tokens, -1).any(axis=2)
    live = sight.request_of_token >= 0
    member = sight.request_of_token[None, :] == np.arange(len(sight.entries))[:, None]
    requests = _some(tokens[:, live], member[:, live].T)  # [num_segments, num_requests]
    allowed = _some(requests, _some(member, sight.sees))
    # What no request at all may see is a finding of its own, and named there.
    wrong = read.any(axis=1) & ~allowed & sight.sees.any(axis=0)
    if wrong.any():
        segment, slot = (int(part[0]) for part in np.nonzero(wrong))
        own = ", ".join(str(number) for number in np.flatnonzero(requests[segment])) or "none"
        yield (
            f"{name}: reads {words.slot(slot)} for request {own}, whose rows may not see it"
            f"{_more(np.count_nonzero(wrong.any(axis=0)))}"
        )


def _not_read_for(name: str, sight: Sight, segments: Segments, read: Bools, words: Words) -> Iterator[str]:
    """A row that sees a key in no segment of which it was read."""
    num_tokens = len(sight.sees)
    rows = segments.rows.reshape(len(segments.rows), num_tokens, read.shape[1], -1)
    group = rows.shape[3]
    used = np.flatnonzero(sight.sees.any(axis=0))
    count, first = 0, ""
    for kv_head in range(read.shape[1]):
        served = rows[:, :, kv_head].reshape(len(rows), -1)  # [num_segments, num_tokens * group]
        heads = slice(kv_head * group, (kv_head + 1) * group)
        wanted = sight.sees[:, None, used] & ~sight.decided[None, heads, None]
        got = _some(served.T, read[:, kv_head, used]).reshape(num_tokens, group, len(used))
        missing = np.argwhere(wanted & ~got)
        if len(missing) and not count:
            token, head, slot = missing[0].tolist()
            row = words.row(token, kv_head * group + head)
            first = f"{name}: {words.slot(int(used[slot]))} is never read for {row}, which sees it"
        count += len(missing)
    if count:
        yield first + _more(count, "row and key pairs")


def _some(left: Bools, right: Bools) -> Bools:
    """The product of two relations: [a, c], whether some b is related to both."""
    return np.asarray(left.astype(np.float32) @ right.astype(np.float32) > 0.5)


def _more(count: int, things: str = "slots") -> str:
    return f" ({count} such {things})" if count > 1 else ""
