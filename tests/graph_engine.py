"""A small engine around a captured graph, and what a black box sees of one.

It keeps persistent buffers, captures its step once and refills the buffers between replays. The step adds up whole
numbers, so equal work gives equal bits in any order; its kernels clamp every length and page, so that a stale buffer
gives wrong sums and never a bad access.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageproof.optimized import interpreter
from pageproof.oracle.execution.graphs.errors import DanglingPointer, NotEmulated
from pageproof.oracle.execution.graphs.interface import Backend, capture

interpreter.install()

PAGE, WIDTH, NUM_REQUESTS = 16, 4, 4
NUM_PAGES = WIDTH * NUM_REQUESTS
FIRST = [3, 1]  # what is captured: short, and half of the requests
STEPS = [[64, 40, 17, 5], [2], [1, 1, 33, 64], []]


@triton.jit
def sum_pages(values, table, lengths, partial, num_requests, longest, WIDTH: tl.constexpr, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    for request in range(tl.program_id(0), num_requests, tl.num_programs(0)):
        length = tl.minimum(tl.minimum(tl.load(lengths + request), longest), WIDTH * PAGE)
        place = tl.arange(0, PAGE)
        total = tl.zeros([PAGE], dtype=tl.float32)
        for column in range(WIDTH):
            page = tl.load(table + request * WIDTH + column) % (WIDTH * 4)
            total += tl.load(values + page * PAGE + place, mask=column * PAGE + place < length, other=0.0)
        tl.store(partial + request, tl.sum(total))


def _sum(values: Tensor, table: Tensor, lengths: Tensor, out: Tensor, longest: int, programs: int) -> None:
    partial = torch.empty(NUM_REQUESTS, dtype=torch.float32, device=out.device)  # scratch of this call alone
    partial.zero_()
    sum_pages[(programs,)](values, table, lengths, partial, programs * 2, longest, WIDTH=WIDTH, PAGE=PAGE)
    out.copy_(partial)


def _sum_what_the_host_reads(values: Tensor, table: Tensor, lengths: Tensor, out: Tensor) -> None:
    _sum(values, table, lengths, out, int(lengths.max()), 2)


# The kernels run inside of registered operators, as ours do: the fault of one of them sits in there too.
_library = torch.library.Library("graph_faults", "FRAGMENT")
_TENSORS = "Tensor values, Tensor table, Tensor lengths, Tensor(a!) out"
_library.define(f"sum({_TENSORS}, int longest, int programs) -> ()")
_library.define(f"sum_what_the_host_reads({_TENSORS}) -> ()")
_library.impl("sum", _sum, "CompositeExplicitAutograd")
_library.impl("sum_what_the_host_reads", _sum_what_the_host_reads, "CompositeExplicitAutograd")
ops = torch.ops.graph_faults


class Engine:
    """The healthy engine: one graph, everything refilled before each replay."""

    def __init__(self, backend: Backend, *, faulty: bool) -> None:
        self.backend, self.faulty, self.pool = backend, faulty, backend.new_pool()
        device = backend.device
        self.values = torch.arange(NUM_PAGES * PAGE, device=device).remainder(97).float()
        self.table = torch.arange(NUM_PAGES, dtype=torch.int32, device=device).flip(0).view(NUM_REQUESTS, WIDTH)
        self.table = self.table.contiguous()
        self.lengths = torch.zeros(NUM_REQUESTS, dtype=torch.int32, device=device)

    def sums(self, *, longest: int = WIDTH * PAGE, programs: int = 2) -> Tensor:
        out = torch.empty(NUM_REQUESTS, device=self.values.device)
        ops.sum(self.values, self.table, self.lengths, out, longest, programs)
        return out

    def step(self) -> list[Tensor]:
        return [self.sums() + 1.0, self.values]

    def refill(self, lengths: list[int]) -> None:
        self.lengths.copy_(torch.tensor(lengths + [0] * (NUM_REQUESTS - len(lengths)), dtype=torch.int32))

    def prepare(self) -> None:
        self.refill(FIRST)
        self.backend.warm_up(self.step)
        with capture(self.backend, self.pool) as self.graph:
            self.outputs = self.step()

    def run(self, lengths: list[int]) -> list[Tensor]:
        self.refill(lengths)
        churn(self.backend)
        self.graph.replay()
        return self.outputs

    def run_eagerly(self, lengths: list[int]) -> list[Tensor]:
        self.refill(lengths)
        return self.step()


def churn(backend: Backend) -> None:
    """What goes on between two steps: others take the memory that was given back, and write to it."""
    for _ in range(3):
        torch.ones(NUM_REQUESTS, dtype=torch.int32, device=backend.device)


def what_shows(make: Callable[..., Engine], backend: Backend, *, faulty: bool) -> str | None:
    """What a black box sees of an engine over a few steps: None, or "differs", "dangling", "refused", "declined"."""
    engine, eager = make(backend, faulty=faulty), make(backend, faulty=False)
    try:
        eager.run_eagerly(FIRST)  # as the other engine's warm-up
        engine.prepare()
        for lengths in [*STEPS, FIRST]:
            actual: list[Any] = [result.clone() for result in engine.run(lengths)]
            wanted = eager.run_eagerly(lengths)
            if not all(map(torch.equal, actual, wanted)):
                return "differs"
    except NotEmulated:
        return "declined"
    except DanglingPointer:
        return "dangling"
    except RuntimeError:
        return "refused"
    return None
