"""One model's step on one batch in every mode: the same bits first, then what each costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from step_timing import Clock, Times, launches, paired_ratio

from pageproof.oracle.candidate import Candidate
from pageproof.oracle.execution.graphs.interface import Backend
from pageproof.oracle.execution.modes import Machine
from pageproof.oracle.models import (
    RUNNERS,
    Bucket,
    Buffers,
    ModelShape,
    ModelStep,
    Request,
    random_caches,
    random_weights,
)

Row = dict[str, Any]

MOST_KEYS = 1 << 19  # of a batch: the caches of four layers have to fit beside the weights
GOALS = {"step": 1.03, "captured": 1.05}  # breakable / piecewise, at most


@dataclass(frozen=True)
class Batch:
    """One row of the table: a batch, and the tokens of its bucket."""

    name: str
    num_tokens: int
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Sizes:
    """What the batches are made of."""

    tokens: tuple[int, ...]
    context: int
    mixed_keys: int
    prefill: int

    def batches(self) -> Iterator[Batch]:
        """Decode batches of a token for each request, and one decode beside a prefill."""
        for count in self.tokens:
            keys = max(1, min(self.context, MOST_KEYS // count))
            yield Batch(f"{count} x {keys}", count, ((1, keys),) * count)
        mixed = ((1, self.mixed_keys), (self.prefill, self.prefill))
        bucket = 1 << self.prefill.bit_length()  # the next power of two above prefill + 1 tokens
        yield Batch(f"1 x {self.mixed_keys} + {self.prefill}", bucket, mixed)


class Model:
    """A model's weights and caches, which every mode and every bucket share."""

    def __init__(self, shape: ModelShape, batches: Sequence[Batch], dtype: torch.dtype, backend: Backend) -> None:
        self.shape, self.backend = shape, backend
        longest = max(keys for batch in batches for _, keys in batch.requests)
        pages = [sum(-(-keys // shape.block_size) for _, keys in batch.requests) for batch in batches]
        self.num_blocks = max(pages)
        self.weights = random_weights(shape, max_positions=longest, dtype=dtype, device=backend.device)
        self.caches = random_caches(shape, num_blocks=self.num_blocks, dtype=dtype, device=backend.device)

    def step(self, batch: Batch, candidate: Candidate) -> ModelStep:
        longest = max(keys for _, keys in batch.requests)
        bucket = Bucket(num_tokens=batch.num_tokens, num_requests=len(batch.requests), seq_len=longest)
        buffers = Buffers(bucket, self.shape.block_size, self.backend.device)
        buffers.load(batch.requests, num_blocks=self.num_blocks, vocabulary=self.shape.vocabulary, seed=1)
        return ModelStep(self.shape, self.weights, buffers, self.caches, candidate)


@torch.no_grad()
def measure(
    model: Model, batch: Batch, candidate: Candidate, modes: Sequence[str], rounds: int
) -> list[dict[str, Any]]:
    """One row for each mode. All modes write the same keys to the same slots, so each finds the caches alike."""
    backend, clock = model.backend, Clock(model.backend.device)
    rows: dict[str, Row] = {}
    runners = {}
    for mode in modes:
        pool, start = backend.new_pool(), time.perf_counter()
        runners[mode] = RUNNERS[mode](model.step(batch, candidate), Machine(backend, pool))
        backend.synchronize()
        seconds = time.perf_counter() - start
        rows[mode] = {"batch": batch.name, "bucket": batch.num_tokens, "mode": mode, "prepare_s": seconds}
        rows[mode]["captured_bytes"] = backend.pool_bytes(pool)
    hidden = {mode: _hidden(runner, backend) for mode, runner in runners.items()}
    times = clock.interleaved({mode: runner.run for mode, runner in runners.items()}, rounds)
    for mode, runner in runners.items():
        counts = runner.counts()
        rows[mode] |= {"graphs": counts.get("graphs", 0), "nodes": counts.get("nodes", 0)}
        rows[mode] |= launches(runner.run, backend.device)
        rows[mode] |= times[mode].figures()
        rows[mode]["same_bits"] = torch.equal(hidden[mode], hidden[modes[0]])
    for runner in runners.values():
        runner.release()
    _compare(rows, times)
    return list(rows.values())


def _hidden(runner: Any, backend: Backend) -> torch.Tensor:
    runner.run()
    backend.synchronize()
    found: torch.Tensor = runner.results["hidden"]
    return found.clone()


def _compare(rows: dict[str, Row], times: dict[str, Times]) -> None:
    """Breakable against piecewise, where both were measured."""
    if {"breakable", "piecewise"} <= rows.keys():
        mine, theirs = rows["breakable"], rows["piecewise"]
        mine["step_over_piecewise"] = paired_ratio(times["breakable"], times["piecewise"])
        mine["captured_over_piecewise"] = mine["captured_bytes"] / theirs["captured_bytes"]
