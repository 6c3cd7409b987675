"""Engines that are healthy or have one fault, each of a kind that real engines have shipped."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageproof.oracle.execution.graphs.interface import Backend, capture

from .graph_engine import FIRST, NUM_PAGES, NUM_REQUESTS, PAGE, WIDTH, Engine, ops


@triton.jit
def write_slots(new, slots, values, num_rows, limit):  # type: ignore[no-untyped-def]
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        slot = tl.load(slots + row)
        tl.store(values + slot, tl.load(new + row), mask=(slot >= 0) & (slot < limit))


@triton.autotune([triton.Config({"BLOCK": block}) for block in (16, 32)], key=[])
@triton.jit
def tuned_double(source, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, BLOCK)
    tl.store(out + place, 2.0 * tl.load(source + place, mask=place < count), mask=place < count)


class LateMetadata(Engine):
    """The metadata is refreshed after the replay that needed it (vLLM #44868)."""

    def run(self, lengths: list[int]) -> list[Tensor]:
        if not self.faulty:
            return super().run(lengths)
        self.graph.replay()
        results = [output.clone() for output in self.outputs]
        self.refill(lengths)
        return results


class PlanInWarmUp(Engine):
    """A plan made by the first call is kept, so the capture never sees it being made (vLLM #42444)."""

    plan: Tensor | None = None

    def step(self) -> list[Tensor]:
        if self.plan is None or not self.faulty:
            self.plan = (self.lengths + PAGE - 1) // PAGE  # pages of each request
        kept, self.lengths = self.lengths, torch.minimum(self.lengths, self.plan * PAGE)
        results = super().step()
        self.lengths = kept
        return results


class Reallocated(Engine):
    """A buffer is replaced rather than refilled; the graph still points to the old one (flashinfer #3904)."""

    def refill(self, lengths: list[int]) -> None:
        if self.faulty:
            self.lengths = torch.zeros_like(self.lengths)
        super().refill(lengths)


class FrozenNumber(Engine):
    """A number that the host computed at capture decides at every replay: the longest length."""

    longest = 0

    def refill(self, lengths: list[int]) -> None:
        super().refill(lengths)
        self.longest = max(lengths, default=0)

    def step(self) -> list[Tensor]:
        return [self.sums(longest=self.longest if self.faulty else WIDTH * PAGE)]


class FrozenGrid(Engine):
    """The grid covers the requests that there were at capture."""

    programs = 0

    def refill(self, lengths: list[int]) -> None:
        super().refill(lengths)
        self.programs = max(1, len(lengths) // 2)

    def step(self) -> list[Tensor]:
        return [self.sums(programs=self.programs if self.faulty else 2)]


class RecycledStaging(Engine):
    """A captured copy reads host memory that somebody else fills between refill and replay (onnxruntime #32121)."""

    def __init__(self, backend: Backend, *, faulty: bool) -> None:
        super().__init__(backend, faulty=faulty)
        self.staging = backend.pinned(torch.zeros(NUM_REQUESTS, dtype=torch.int32))

    def step(self) -> list[Tensor]:
        self.lengths.copy_(self.staging, non_blocking=True)
        return super().step()

    def refill(self, lengths: list[int]) -> None:
        self.staging.copy_(torch.tensor(lengths + [0] * (NUM_REQUESTS - len(lengths))))

    def run(self, lengths: list[int]) -> list[Tensor]:
        self.refill(lengths)
        unrelated = self.staging if self.faulty else self.backend.pinned(torch.zeros_like(self.staging))
        unrelated.fill_(7)
        self.graph.replay()
        self.backend.synchronize()
        return self.outputs


class StalePadding(Engine):
    """The slots of padding rows are not reset, so an earlier step's rows are written again (nano-vllm #190)."""

    def __init__(self, backend: Backend, *, faulty: bool) -> None:
        super().__init__(backend, faulty=faulty)
        self.slots = torch.full((NUM_REQUESTS,), -1, device=backend.device)
        self.new = torch.zeros(NUM_REQUESTS, device=backend.device)

    def refill(self, lengths: list[int]) -> None:
        super().refill(lengths)
        rows = len(lengths)
        self.slots[:rows] = torch.tensor([request * 64 + length - 1 for request, length in enumerate(lengths)])
        self.new.fill_(float(rows))
        if not self.faulty:
            self.slots[rows:] = -1

    def step(self) -> list[Tensor]:
        write_slots[(2,)](self.new, self.slots, self.values, NUM_REQUESTS, NUM_PAGES * PAGE)
        return super().step()


class SharedPool(Engine):
    """A graph's output is not kept, and a graph captured later into the same pool takes its memory (SGLang #37606)."""

    def step(self) -> list[Tensor]:
        return [self.sums() * 2.0 + 1.0]

    def prepare(self) -> None:
        self.refill(FIRST)
        self.backend.warm_up(self.step)
        with capture(self.backend, self.pool) as self.first:
            sums = self.sums()
        with capture(self.backend, self.pool) as self.last:
            self.outputs = [sums * 2.0 + 1.0]
        self.kept = None if self.faulty else sums
        del sums
        with capture(self.backend, self.pool) as self.other:
            self.unrelated = self.values[:NUM_REQUESTS] + 0.5

    def run(self, lengths: list[int]) -> list[Tensor]:
        self.refill(lengths)
        for graph in (self.first, self.other, self.last):
            graph.replay()
        return self.outputs


class FailedReplay(Engine):
    """The step's end leaves a counter at zero for the next one; a step that fails half-way never gets there."""

    def __init__(self, backend: Backend, *, faulty: bool) -> None:
        super().__init__(backend, faulty=faulty)
        self.counter = torch.zeros(NUM_REQUESTS, device=backend.device)

    def head(self) -> None:
        if not self.faulty:
            self.counter.zero_()
        self.counter.add_(self.sums())

    def tail(self) -> list[Tensor]:
        result = self.counter + 1.0
        if self.faulty:
            self.counter.zero_()
        return [result]

    def step(self) -> list[Tensor]:
        self.head()
        return self.tail()

    def prepare(self) -> None:
        self.refill(FIRST)
        self.backend.warm_up(self.step)
        with capture(self.backend, self.pool) as self.first:
            self.head()
        with capture(self.backend, self.pool) as self.last:
            self.outputs = self.tail()

    def run(self, lengths: list[int]) -> list[Tensor]:
        self.refill(lengths)
        self.first.replay()  # and what runs between the two graphs fails: the step is given up and tried again
        self.first.replay()
        self.last.replay()
        return self.outputs


class HostSync(Engine):
    """An operator reads a length on the host."""

    def step(self) -> list[Tensor]:
        if not self.faulty:
            return super().step()
        out = torch.empty(NUM_REQUESTS, device=self.values.device)
        ops.sum_what_the_host_reads(self.values, self.table, self.lengths, out)
        return [out + 1.0, self.values]


class TunedInCapture(Engine):
    """The autotuner measures its choices at the first launch, which is inside of the capture."""

    def step(self) -> list[Tensor]:
        sums = self.sums()
        out = torch.empty_like(sums)
        if self.faulty and self.backend.is_capturing():
            tuned_double.cache.clear()
            tuned_double[(1,)](sums, out, NUM_REQUESTS)
        else:
            out.copy_(sums * 2.0)
        return [out]


class UnjoinedStream(Engine):
    """Work on a side stream that nothing waits for."""

    def step(self) -> list[Tensor]:
        branch = self.backend.fork()
        with branch:
            sums = self.sums()
        if not self.faulty:
            branch.join()
        return [sums + 1.0] if not self.faulty else [self.values + 1.0]
