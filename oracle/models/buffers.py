"""Persistent memory of one token bucket: what a step reads, refilled between two replays, and the layers' caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...reference.problem import Batch
from .shapes import ModelShape
from .weights import normal_values

Request = tuple[int, int]  # (new tokens, keys with the new ones)
Caches = list[dict[str, Tensor]]

GARBAGE = 2_147_480_000  # in table entries that lead to no key


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The largest step that buffers hold."""

    num_tokens: int
    num_requests: int
    seq_len: int


@dataclass
class Buffers:
    """One bucket's inputs. Their addresses never change; rows past a step's own are padding."""

    bucket: Bucket
    block_size: int
    device: torch.device
    tokens: Tensor = field(init=False)  # [num_tokens] int64
    positions: Tensor = field(init=False)  # [num_tokens] int64
    slot_mapping: Tensor = field(init=False)  # [num_tokens] int64; -1: padding
    batch: Batch = field(init=False)

    def __post_init__(self) -> None:
        bucket = self.bucket
        width = -(-bucket.seq_len // self.block_size)

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        self.tokens = zeros(bucket.num_tokens, dtype=torch.int64)
        self.positions = zeros(bucket.num_tokens, dtype=torch.int64)
        self.slot_mapping = torch.full_like(self.positions, -1)
        self.batch = Batch(
            cu_seqlens_q=zeros(bucket.num_requests + 1, dtype=torch.int32),
            seq_lens=zeros(bucket.num_requests, dtype=torch.int32),
            block_table=zeros(bucket.num_requests, width, dtype=torch.int32),
        )

    @property
    def capacity(self) -> tuple[int, int, int]:
        """Of a plan: the largest num_tokens, num_requests and seq_len."""
        return self.bucket.num_tokens, self.bucket.num_requests, self.bucket.seq_len

    def load(self, requests: Sequence[Request], *, num_blocks: int, vocabulary: int, seed: int) -> None:
        """Put a step into the buffers: new tokens and scattered pages drawn from `seed`, everything else padding.

        Raises ValueError where the requests do not fit into the bucket, or into `num_blocks` pages.
        """
        query_lens, seq_lens = np.array(requests, dtype=np.int64).reshape(-1, 2).T
        pages = -(-seq_lens // self.block_size)
        self._require_fitting(query_lens, seq_lens, int(pages.sum()), num_blocks)
        rng = np.random.default_rng(seed)
        table = np.full(tuple(self.batch.block_table.shape), GARBAGE, dtype=np.int32)
        table[: len(pages)][np.arange(table.shape[1]) < pages[:, None]] = rng.permutation(num_blocks)[: pages.sum()]

        owner = np.repeat(np.arange(len(requests)), query_lens)
        first = (seq_lens - query_lens - (query_lens.cumsum() - query_lens))[owner]
        positions = (np.arange(len(owner)) + first).astype(np.int64)
        slots = table[owner, positions // self.block_size].astype(np.int64) * self.block_size
        _fill(self.tokens, rng.integers(0, vocabulary, len(owner)), padding=0)
        _fill(self.positions, positions, padding=0)
        _fill(self.slot_mapping, slots + positions % self.block_size, padding=-1)
        _fill(self.batch.cu_seqlens_q, np.insert(query_lens.cumsum(), 0, 0), padding=len(owner))
        _fill(self.batch.seq_lens, seq_lens, padding=0)
        self.batch.block_table.copy_(torch.from_numpy(table))

    def _require_fitting(
        self, query_lens: NDArray[np.int64], seq_lens: NDArray[np.int64], pages: int, num_blocks: int
    ) -> None:
        bucket = self.bucket
        if (query_lens > seq_lens).any():
            raise ValueError("requests: found more new tokens than keys, expected keys that count the new tokens too")
        for what, found, most in (
            ("tokens", int(query_lens.sum()), bucket.num_tokens),
            ("requests", len(query_lens), bucket.num_requests),
            ("keys of one request", int(seq_lens.max(initial=0)), bucket.seq_len),
            ("pages", pages, num_blocks),
        ):
            if found > most:
                raise ValueError(f"requests: found {found} {what}, expected at most {most}")


def _fill(tensor: Tensor, values: NDArray[np.int64], *, padding: int) -> None:
    whole = np.full(tensor.shape, padding, dtype=np.int64)
    whole[: len(values)] = values
    tensor.copy_(torch.from_numpy(whole))


def random_caches(
    shape: ModelShape, *, num_blocks: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Caches:
    """Every layer's cache, full of the keys and values of some context: hashed, of variance 1."""
    rows = (num_blocks, shape.block_size)
    if shape.is_mla:
        sizes: dict[str, tuple[int, ...]] = {"latent_cache": (*rows, shape.kv_lora_rank + shape.rope_head_size)}
    else:
        sizes = {
            "k_cache": (*rows, shape.num_kv_heads, shape.head_size),
            "v_cache": (*rows, shape.num_kv_heads, shape.head_size_v),
        }
    return [
        {name: normal_values(seed, f"{layer}/{name}", size, device).to(dtype) for name, size in sizes.items()}
        for layer in range(shape.num_layers)
    ]
