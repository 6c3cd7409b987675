"""Small steps of every model for the tests, each over memory of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pageproof.oracle.adapters import find
from pageproof.oracle.models import (
    Bucket,
    Buffers,
    ModelShape,
    ModelStep,
    Request,
    Weights,
    random_caches,
    random_weights,
)

from .graph_bucket import same_bits

NUM_BLOCKS, LONGEST = 24, 96
BUCKET = Bucket(num_tokens=16, num_requests=3, seq_len=LONGEST)


def weights_of(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Weights:
    return random_weights(shape, max_positions=LONGEST, dtype=dtype, device=device)


def step_of(shape: ModelShape, weights: Weights, bucket: Bucket = BUCKET, candidate: Any = None) -> ModelStep:
    """A step in memory of its own; the caches' first content is the same for all."""
    dtype, device = weights.embedding.dtype, weights.embedding.device
    buffers = Buffers(bucket, shape.block_size, device)
    caches = random_caches(shape, num_blocks=NUM_BLOCKS, dtype=dtype, device=device)
    return ModelStep(shape, weights, buffers, caches, candidate or find("ours"), keeps_layers=True)


def load(step: ModelStep, requests: list[Request], seed: int) -> None:
    """The same tokens, pages and slots in every step that is loaded with the same seed."""
    step.buffers.load(requests, num_blocks=NUM_BLOCKS, vocabulary=step.shape.vocabulary, seed=seed)


def put_caches(step: ModelStep, other: ModelStep) -> None:
    """The caches of `other` into those of `step`."""
    for mine, theirs in zip(step.caches, other.caches, strict=True):
        for name, cache in mine.items():
            cache.copy_(theirs[name])


def differences(step: ModelStep, results: dict[str, Tensor], other: ModelStep, wanted: dict[str, Tensor]) -> list[str]:
    """The names of everything in which two steps have other bits: operators' outputs, caches, last hidden states."""
    pairs = {name: (tensor, other.outputs[name]) for name, tensor in step.outputs.items()}
    pairs |= {name: (tensor, wanted[name]) for name, tensor in results.items()}
    for index, (mine, theirs) in enumerate(zip(step.caches, other.caches, strict=True)):
        pairs |= {f"{name} {index}": (cache, theirs[name]) for name, cache in mine.items()}
    return [name for name, pair in pairs.items() if not same_bits(*pair)]
