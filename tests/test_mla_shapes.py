"""A compiled MLA step takes any sizes: it is compiled once, not once for every shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from pageproof import optimized
from pageproof.optimized import Batch, Rules
from pageproof.oracle.execution.compiled import registered_operators, split_at_operators

from .graph_backends import DEVICES

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch 2.11 warns of its own modules
]

Sizes = tuple[int, int, int]  # tokens, requests, columns of the block table
NUM_SHAPES, BLOCK_SIZE = 100, 16
FIRST = (23, 3, 2)  # torch takes sizes that are equal in the first shape to be equal in all: none are
OPERATORS = ["update_mla_cache", "make_plan", "mla_attention"]


def step(latent: Tensor, q: Tensor, cache: Tensor, slot_mapping: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """One layer: the new rows into the cache, then absorbed attention."""
    optimized.update_mla_cache(latent * 0.5, latent + 1.0, cache, slot_mapping)
    out, lse = optimized.mla_attention(q * 0.5, q + 1.0, cache, batch, Rules(0.25))
    return out * 2.0, lse


def arguments(sizes: Sizes, device: str) -> tuple[Any, ...]:
    """Requests with and without a cached prefix, by turns; every request's pages are its own."""
    num_tokens, num_requests, columns = sizes
    query_lens = torch.full((num_requests,), num_tokens // num_requests)
    query_lens[0] += num_tokens - int(query_lens.sum())
    seq_lens = (query_lens + 7 * (torch.arange(num_requests) % 2)).clamp(max=columns * BLOCK_SIZE)
    starts = torch.cat([torch.zeros(1), query_lens.cumsum(0)])
    table = torch.randperm(num_requests * columns).view(num_requests, columns)
    requests = torch.arange(num_requests).repeat_interleave(query_lens)
    positions = (seq_lens - starts[1:]).long()[requests] + torch.arange(num_tokens)
    slots = table[requests, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    latent, q = torch.randn(num_tokens, 16).half(), torch.randn(num_tokens, 1, 16).half()
    cache = torch.randn(num_requests * columns, BLOCK_SIZE, 32).half()
    batch = Batch(*(part.to(device, torch.int32) for part in (starts, seq_lens, table)))
    return latent.to(device), q.to(device), cache.to(device), slots.to(device), batch


class Compiled:
    """The compiled step, and what it was compiled to.

    What is asked here is how often that happened: interpreted kernels are slow, and run for few of the shapes only.
    """

    def __init__(self, *, dynamic: bool | None) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.graphs: list[GraphModule] = []
        self._runs = False
        self._step = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=self._compile)

    def __call__(self, given: tuple[Any, ...], *, runs: bool) -> tuple[Tensor, Tensor]:
        self._runs = runs
        return self._step(*given)

    def _compile(self, module: GraphModule, _inputs: Any) -> Callable[..., Any]:
        split = split_at_operators(module)
        self.graphs.append(split)
        return lambda *given: split(*given) if self._runs else (given[-1], given[-1])


def shapes(smallest: int) -> list[Sizes]:
    """Different ones, from `smallest` in every size."""
    drawn: dict[Sizes, None] = {}
    generator = torch.Generator().manual_seed(3)
    while len(drawn) < NUM_SHAPES:
        requests, columns = (int(torch.randint(smallest, 5, (), generator=generator)) for _ in range(2))
        tokens = int(torch.randint(requests, min(34, requests * columns * BLOCK_SIZE), (), generator=generator))
        drawn[tokens, requests, columns] = None
    return list(drawn)


def test_a_hundred_shapes_are_compiled_once(device: str) -> None:
    compiled = Compiled(dynamic=True)
    for index, sizes in enumerate([FIRST, *shapes(smallest=2)]):
        given, runs = arguments(sizes, device), index % 10 == 0
        out, lse = compiled(given, runs=runs)
        if runs:
            wanted = step(*given)
            assert torch.equal(out, wanted[0])
            assert torch.equal(lse, wanted[1])
    assert len(compiled.graphs) == counters["stats"]["unique_graphs"] == 1
    assert [name.partition("::")[2] for name in registered_operators(compiled.graphs[0])] == OPERATORS


def test_sizes_of_one_stay_within_the_limit(device: str) -> None:
    """torch compiles a size of 1 apart, and by default a first shape as it is; the limit is as it comes."""
    compiled = Compiled(dynamic=None)
    drawn = shapes(smallest=1)
    assert any(1 in sizes for sizes in drawn)
    for sizes in drawn:
        compiled(arguments(sizes, device), runs=False)
    assert len(compiled.graphs) <= torch._dynamo.config.recompile_limit == 8


def test_without_dynamic_sizes_the_limit_is_hit(device: str) -> None:
    compiled, drawn = Compiled(dynamic=False), shapes(smallest=2)
    for sizes in drawn[: torch._dynamo.config.recompile_limit]:
        compiled(arguments(sizes, device), runs=False)
    with pytest.raises(FailOnRecompileLimitHit):
        compiled(arguments(drawn[-1], device), runs=False)
