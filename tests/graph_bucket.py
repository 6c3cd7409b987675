"""Persistent buffers of one token bucket, and the step that an engine captures over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pageproof import optimized, reference
from pageproof.optimized import Batch, Capacity, Rules, Scales


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a bucket is made for."""

    num_tokens: int
    num_requests: int
    seq_len: int
    block_size: int
    num_kv_heads: int
    group: int
    head_size: int
    kv_lora_rank: int
    rope: int

    @property
    def num_blocks(self) -> int:
        return self.num_requests * self.seq_len // self.block_size + 1


@dataclass
class Bucket:
    """Persistent buffers of one token bucket, refilled between replays as an engine does."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    sizes: Sizes
    device: torch.device

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(7)
        sizes, heads = self.sizes, self.sizes.num_kv_heads * self.sizes.group

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        self.q = zeros(sizes.num_tokens, heads, sizes.head_size, dtype=self.dtype)
        self.key = zeros(sizes.num_tokens, sizes.num_kv_heads, sizes.head_size, dtype=self.dtype)
        self.value = zeros(sizes.num_tokens, sizes.num_kv_heads, sizes.head_size, dtype=self.dtype)
        self.q_latent = zeros(sizes.num_tokens, heads, sizes.kv_lora_rank, dtype=self.dtype)
        self.q_pe = zeros(sizes.num_tokens, heads, sizes.rope, dtype=self.dtype)
        self.latent_cache = zeros(sizes.num_blocks, sizes.block_size, sizes.kv_lora_rank + sizes.rope, dtype=self.dtype)
        self.k_cache = zeros(
            sizes.num_blocks, sizes.block_size, sizes.num_kv_heads, sizes.head_size, dtype=self.kv_dtype
        )
        self.v_cache = torch.zeros_like(self.k_cache)
        self.slot_mapping = zeros(sizes.num_tokens, dtype=torch.int64)
        cu_seqlens_q = zeros(sizes.num_requests + 1, dtype=torch.int32)
        table = zeros(sizes.num_requests, sizes.seq_len // sizes.block_size, dtype=torch.int32)
        self.batch = Batch(cu_seqlens_q, zeros(sizes.num_requests, dtype=torch.int32), table)
        ones = torch.ones(sizes.num_kv_heads, device=self.device)
        self.scales = Scales(k=ones * 0.37, v=ones * 1.9) if self.kv_dtype == torch.float8_e4m3fn else None
        slopes = torch.linspace(0.01, 0.3, heads, device=self.device)
        sinks = torch.linspace(-2.0, 3.0, heads, device=self.device)
        plain = Rules(sizes.head_size**-0.5)
        self.layers = [
            plain,
            Rules(sizes.head_size**-0.5, sliding_window=100, softcap=5.0, alibi_slopes=slopes, sinks=sinks),
        ]

    def fill(self, tensor: Tensor) -> None:
        values = torch.randn(tensor.shape, generator=self.generator, device=self.device)
        tensor.copy_(values.to(tensor.dtype))

    def load(self, requests: list[tuple[int, int]]) -> None:
        """A new step: other values everywhere, other pages, padding rows and unused table entries poisoned."""
        for tensor in (self.q, self.key, self.value, self.q_latent, self.q_pe, self.latent_cache):
            self.fill(tensor)
        for cache in (self.k_cache, self.v_cache):
            self.fill(cache)
        requests = requests + [(0, 0)] * (self.sizes.num_requests - len(requests))
        lengths = torch.tensor([query_len for query_len, _ in requests])
        rows = int(lengths.sum())
        self.batch.cu_seqlens_q.copy_(torch.cat([torch.zeros(1), lengths.cumsum(0)]))
        self.batch.seq_lens.copy_(torch.tensor([seq_len for _, seq_len in requests]))
        pages = torch.randperm(self.sizes.num_blocks - 1, generator=self.generator, device=self.device) + 1
        self.batch.block_table.copy_(pages.view(self.sizes.num_requests, -1))
        slots = []
        for request, (query_len, seq_len) in enumerate(requests):
            used = -(-seq_len // self.sizes.block_size)
            self.batch.block_table[request, used:] = 2_147_480_000
            positions = torch.arange(seq_len - query_len, seq_len, device=self.device)
            places = (
                self.batch.block_table[request, (positions // self.sizes.block_size).clamp(min=0)]
                * self.sizes.block_size
            )
            slots.append(torch.where(positions >= 0, places + positions % self.sizes.block_size, -1))
        self.slot_mapping.fill_(-1)
        self.slot_mapping[:rows] = torch.cat(slots)
        for tensor in (self.q, self.key, self.value, self.q_latent, self.q_pe):
            tensor[rows:] = float("nan")

    def step(self) -> list[Tensor]:
        """What an engine captures: plan once, then per layer a KV update and attention, and MLA beside them."""
        plan = optimized.make_plan(
            self.batch, Capacity(self.sizes.num_tokens, self.sizes.num_requests, self.sizes.seq_len)
        )
        results: list[Tensor] = []
        for rules in self.layers:
            optimized.update_kv_cache(
                self.key, self.value, self.k_cache, self.v_cache, self.slot_mapping, scales=self.scales
            )
            results += optimized.attention(
                self.q, self.k_cache, self.v_cache, self.batch, rules, scales=self.scales, plan=plan
            )
            results += optimized.mla_attention(
                self.q_latent, self.q_pe, self.latent_cache, self.batch, rules, plan=plan
            )
        results += optimized.merge_states(results[0], results[1], results[4], results[5])
        return results

    def expected(self) -> list[Tensor]:
        """The same step by the reference, in float64, on clones of the caches."""
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        results: list[Tensor] = []
        for rules in self.layers:
            reference.update_kv_cache(self.key, self.value, k_cache, v_cache, self.slot_mapping, scales=self.scales)
            for operation, queries, caches in (
                (reference.attention, (self.q,), (k_cache, v_cache)),
                (reference.mla_attention, (self.q_latent, self.q_pe), (self.latent_cache,)),
            ):
                width = (caches[1] if len(caches) == 2 else queries[0]).shape[-1]
                out = torch.empty((*queries[0].shape[:2], width), dtype=torch.float64, device=self.device)
                lse = torch.empty(queries[0].shape[:2], dtype=torch.float64, device=self.device)
                scales = self.scales if len(caches) == 2 else None
                results += operation(*queries, *caches, self.batch, rules, scales=scales, out=out, lse=lse)
        results += reference.merge_states(results[0], results[1], results[4], results[5])
        return [*results, k_cache, v_cache]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
