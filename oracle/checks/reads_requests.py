"""Which row a cache was read for: whether each request kept to its own keys, and each row got all of its own.

A program works on one thing after another, and stores what came of each. From one of its stores to the next is a
segment, and the rows of q that it loads there are the rows that it works for. A segment in which no q is loaded goes
on with the rows of the program's last one; if there was none, it counts for all rows, as a possibility.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..execution.tracing import Bools, Ints, Trace
from .reads_memory import Memory
from .reads_sight import Sight
from .reads_words import Words, more


@dataclass(frozen=True)
class Attribution:
    """Rows are (token, query head) pairs, token * num_query_heads + head."""

    sight: Sight
    rows: Bools  # [num_segments, num_tokens * num_query_heads]: for whom it read what it read
    read: dict[str, Bools]  # of a cache, [num_segments, num_kv_heads, num_slots]: something of the slot's row was read
    words: Words

    @staticmethod
    def of(trace: Trace, memory: Memory, sight: Sight, words: Words) -> Attribution:
        """Cut the trace into segments, and find what each read for whom."""
        begins = _beginnings(trace)
        segment_of_access = np.cumsum(begins) - 1
        rows = _rows(trace.programs[begins], segment_of_access, memory, len(sight.sees) * len(sight.decided))
        heads = words.problem.case.spec.num_kv_heads
        read: dict[str, Bools] = {}
        for name in ("k_cache", "v_cache", "latent_cache"):
            if name in memory.loads:
                loads, (num_blocks, block_size, *_, dims) = memory.loads[name], memory.regions[name].shape
                read[name] = np.zeros((len(rows), heads, num_blocks * block_size), dtype=bool)
                # An MLA cache has one head, and so no dimension of heads.
                slots, head_of = np.divmod(loads.elements // dims, heads)
                read[name][segment_of_access[loads.accesses], head_of, slots] = True
        return Attribution(sight, rows, read, words)

    def read_for_others(self) -> Iterator[str]:
        """A slot that was read where none of the rows at work belongs to a request that may see it."""
        sight = self.sight
        tokens = np.asarray(self.rows.reshape(len(self.rows), len(sight.sees), len(sight.decided)).any(axis=2))
        member = sight.request_of_token[None, :] == np.arange(len(sight.entries))[:, None]
        requests = _some(tokens, member.T)  # [num_segments, num_requests]
        # What no request at all may see is a finding of its own.
        wrong_for = ~_some(requests, _some(member, sight.sees)) & sight.sees.any(axis=0)
        for name, read in self.read.items():
            wrong = read.any(axis=1) & wrong_for
            if wrong.any():
                segment, slot = (int(part[0]) for part in np.nonzero(wrong))
                own = " and ".join(str(number) for number in np.flatnonzero(requests[segment])) or "none"
                count = int(np.count_nonzero(wrong.any(axis=0)))
                yield f"{name}: reads {self.words.slot(slot)} for request {own}, which may not{more(count, 'slots')}"

    def not_read_for(self) -> Iterator[str]:
        """A row that sees a key, and at work for which that key was never read."""
        used = np.flatnonzero(self.sight.sees.any(axis=0))
        for name, read in self.read.items():
            missing = np.argwhere(self._missing(read))
            if len(missing):
                token, head, column = missing[0].tolist()
                slot = self.words.slot(int(used[column]))
                row = self.words.row(token, head)
                yield f"{name}: never reads {slot} for {row}, which sees it{more(len(missing), 'pairs of row and key')}"

    def _missing(self, read: Bools) -> Bools:
        """[num_tokens, num_query_heads, slots that are seen at all]"""
        used = self.sight.sees.any(axis=0)
        sees = self.sight.sees[:, used]
        (num_tokens, num_used), num_kv_heads = sees.shape, read.shape[1]
        group_size = len(self.sight.decided) // num_kv_heads
        rows = self.rows.reshape(len(self.rows), num_tokens, num_kv_heads, group_size)
        served = np.zeros((num_tokens, num_kv_heads, group_size, num_used), dtype=bool)
        for head in range(num_kv_heads):
            at_work = rows[:, :, head].reshape(len(rows), num_tokens * group_size)
            served[:, head] = _some(at_work.T, read[:, head, used]).reshape(num_tokens, group_size, num_used)
        wanted = sees[:, None] & ~self.sight.decided[None, :, None]
        return wanted & ~served.reshape(wanted.shape)


def _beginnings(trace: Trace) -> Bools:
    """[num_accesses]: another program, or something else than a store after a store."""
    begins = np.ones(len(trace.programs), dtype=bool)
    another = trace.programs[1:] != trace.programs[:-1]
    begins[1:] = another | (trace.is_store[:-1] & ~trace.is_store[1:])
    return begins


def _rows(programs: Ints, segment_of_access: Ints, memory: Memory, num_rows: int) -> Bools:
    """[num_segments, num_rows]; `programs` [num_segments]: whose segment it is."""
    rows = np.zeros((len(programs), num_rows), dtype=bool)
    for name in ("q", "q_nope", "q_pe"):
        if name in memory.loads:
            loads, dims = memory.loads[name], memory.regions[name].shape[-1]
            rows[segment_of_access[loads.accesses], loads.elements // dims] = True
    for segment in np.flatnonzero(~rows.any(axis=1)).tolist():
        goes_on = segment > 0 and programs[segment] == programs[segment - 1]
        rows[segment] = rows[segment - 1] if goes_on else True
    return rows


def _some(left: Bools, right: Bools) -> Bools:
    """The product of two relations [a, b] and [b, c]: whether some b is related to both."""
    return np.asarray(left.astype(np.float32) @ right.astype(np.float32) > 0.5)
