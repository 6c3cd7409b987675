"""A problem as a peer takes it: without rows and requests of padding, its pages as lists, its keys contiguous."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pageproof.oracle import Spec
from pageproof.oracle.building.problem import Problem
from pageproof.reference.problem import Batch, Rules, Scales

from . import Unsupported

_RULES = ("softcap", "sliding_window", "right_window", "alibi", "sinks", "query_bias")


@dataclass(frozen=True)
class Live:
    """What of a problem's buffers is no padding. A bucket's table may be wider than its longest request needs."""

    problem: Problem
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    batch: Batch

    @property
    def spec(self) -> Spec:
        return self.problem.case.spec

    @property
    def rules(self) -> Rules:
        rules: Rules = self.problem.arguments["rules"]
        return rules

    @property
    def rows(self) -> int:
        return sum(self.query_lens)

    @property
    def window_left(self) -> int:
        """As most peers write a window: keys left of the token itself; -1 for none."""
        return -1 if self.rules.sliding_window is None else self.rules.sliding_window - 1

    def argument(self, name: str) -> Tensor:
        """A tensor of tokens, cut to those there are."""
        tensor: Tensor = self.problem.arguments[name]
        return tensor[: self.rows]

    def new_out(self) -> tuple[Tensor, dict[str, Tensor]]:
        """An output of the peer's own for the live rows, and the whole with padding rows that are 0."""
        whole = torch.zeros_like(self.problem.outputs["out"], memory_format=torch.contiguous_format)
        return whole[: self.rows], {"out": whole}

    def slots(self, first: list[int], stop: list[int]) -> Tensor:
        """int64: where each request's keys first .. stop - 1 lie in the pool, request after request."""
        size = self.spec.block_size
        offsets = torch.arange(size, device=self.batch.device)
        parts = []
        for request, (begin, end) in enumerate(zip(first, stop, strict=True)):
            pages = self.batch.block_table[request, begin // size : -(-end // size)].long()
            places = (pages[:, None] * size + offsets).flatten()
            parts.append(places[begin % size :][: end - begin])
        return torch.cat(parts)

    def all_slots(self) -> Tensor:
        return self.slots([0] * len(self.seq_lens), list(self.seq_lens))

    def page_lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """(indptr, indices, entries in the last page), int32 on the device."""
        size = self.spec.block_size
        counts = [-(-length // size) for length in self.seq_lens]
        indices = torch.cat([self.batch.block_table[r, :count] for r, count in enumerate(counts)])
        last = [(length - 1) % size + 1 for length in self.seq_lens]
        return self.indptr(counts), indices.contiguous(), self.ints(last)

    def indptr(self, counts: list[int]) -> Tensor:
        return self.ints([0, *torch.tensor(counts).cumsum(0).tolist()])

    def ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.batch.device)

    def scale(self, name: str) -> float:
        """A scale as a number of the host; synchronises."""
        scales: Scales | None = self.problem.arguments.get("scales")
        tensor = None if scales is None else getattr(scales, name)
        return 1.0 if tensor is None else float(tensor.reshape(-1)[0])


def live(problem: Problem) -> Live:
    batch: Batch = problem.arguments["batch"]
    query_lens, seq_lens = live_lengths(problem)
    count = len(query_lens)
    cut = Batch(batch.cu_seqlens_q[: count + 1], batch.seq_lens[:count], batch.block_table[:count])
    return Live(problem, query_lens, seq_lens, cut)


def live_lengths(problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the requests that are no padding, which stand in front."""
    shape = problem.case.batch
    count = sum(length > 0 for length in shape.query_lens)
    return shape.query_lens[:count], shape.seq_lens[:count]


def require(problem: Problem, *, rules: tuple[str, ...] = (), float8: bool = False) -> None:
    """Raise Unsupported for a rule that is on and not among `rules`, and for float8 caches without `float8`."""
    spec: Any = problem.case.spec
    for name in _RULES:
        if getattr(spec, name) not in (None, False, "none") and name not in rules:
            raise Unsupported(f"no {name}")
    if not spec.causal:
        raise Unsupported("not causal")
    if spec.kv_dtype and not float8:
        raise Unsupported(f"no {spec.kv_dtype} caches")


def require_one_token(found: Live) -> None:
    if set(found.query_lens) != {1}:
        raise Unsupported("one token per request only")
