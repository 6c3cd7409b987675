"""From an operator's flat arguments to the launches of one attention step."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.errors import bad_value
from .interpreter import INTERPRETED
from .kernels.arguments import (
    DeviceScales,
    Outputs,
    PagedKV,
    Partials,
    Queries,
    Requests,
    ScoreRules,
    WorkLists,
    outputs,
)
from .kernels.decode import decode
from .kernels.merge import merge_splits
from .kernels.prefill import prefill
from .tuning import (
    FEW_HEADS,
    Tiles,
    attention_tiles,
    latent_tiles,
    num_programs,
    plan_limits,
    projection_block,
    splits_per_merge_step,
)

# Beyond every length; window arithmetic with it stays inside int32.
LARGEST_WINDOW = 2**30

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def require_device(name: str, tensor: Tensor) -> None:
    """Raise unless the kernels can run where `tensor` lies."""
    if not tensor.is_cuda and not INTERPRETED:
        expected = "a CUDA device, or TRITON_INTERPRET=1 in the environment before pageproof.optimized is imported"
        raise bad_value(name, f"a tensor on {tensor.device}", expected)


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@dataclass(frozen=True)
class Shape:
    """The sizes that kernels are compiled for."""

    num_kv_heads: int
    group: int
    head_size: int
    head_size_v: int
    block_size: int
    arithmetic: torch.dtype  # what tl.dot multiplies, and P is cast to
    rope_size: int = 0
    rank: int = 0  # kv_lora_rank of decompressed MLA
    computed_operands: bool = True  # keys or values are cast, transposed or projected before they are multiplied
    shares_rows: bool = False  # absorbed MLA over a cache in q's format: its rows are keys and values as they are
    shared_memory: int = 0  # bytes that one program may have, where rows are shared

    @property
    def row_bytes(self) -> int:
        dims = sum(padded(size) for size in (self.head_size, self.head_size_v, self.rope_size) if size)
        return int(dims * self.arithmetic.itemsize)

    def tiles(self, *, prefill: bool) -> Tiles:
        latent = self._latent_tiles(prefill) if self.shares_rows else None
        return latent or attention_tiles(
            prefill=prefill,
            row_bytes=self.row_bytes,
            itemsize=self.arithmetic.itemsize,
            value_columns=padded(self.head_size_v),
            computed_operands=self.computed_operands,
        )

    def _latent_tiles(self, prefill: bool) -> Tiles | None:
        columns = padded(self.head_size)
        return latent_tiles(
            few_heads=not prefill and self.group <= FEW_HEADS,
            latent_bytes=(columns + padded(self.rope_size)) * self.arithmetic.itemsize,
            itemsize=self.arithmetic.itemsize,
            columns=columns,
            shared_memory=self.shared_memory,
        )

    @property
    def sizes(self) -> dict[str, Any]:
        """The kernels' compile-time arguments that do not depend on a tile."""
        return {
            "NUM_KV_HEADS": self.num_kv_heads,
            "GROUP": self.group,
            "HEAD_SIZE": self.head_size,
            "HEAD_SIZE_V": self.head_size_v,
            "ROPE_SIZE": self.rope_size,
            "RANK": self.rank,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_D": padded(self.head_size),
            "BLOCK_V": padded(self.head_size_v),
            "BLOCK_R": padded(self.rope_size),
            "BLOCK_C": min(projection_block(), padded(self.rank)),
            "KIND": KINDS[self.arithmetic],
        }


class Step(NamedTuple):
    """An operator's flat arguments, grouped as the kernels take them."""

    requests: Requests
    rules: ScoreRules
    scales: DeviceScales
    outputs: Outputs
    work: WorkLists
    table_stride: int
    sliding_window: int | None
    right_window: int | None
    bias_width: int
    bias_stride: int
    causal: bool

    @property
    def num_requests(self) -> int:
        return self.requests.seq_lens.shape[0]

    @property
    def sizes(self) -> tuple[Any, ...]:
        return self.table_stride, self.sliding_window, self.right_window, self.bias_width, self.bias_stride


STEP_SCHEMA = (
    "Tensor cu_seqlens_q, Tensor seq_lens, Tensor block_table, "
    "float softmax_scale, bool causal, int? sliding_window, int? right_window, float? softcap, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? query_bias, "
    "Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, Tensor? out_scale, "
    "Tensor counts, Tensor offsets, Tensor prefill_items, Tensor decode_items, Tensor merge_items, "
    "Tensor(a!) out, Tensor(b!) lse"
)


def read_step(
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
    sliding_window: int | None,
    right_window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    query_bias: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out_scale: Tensor | None,
    counts: Tensor,
    offsets: Tensor,
    prefill_items: Tensor,
    decode_items: Tensor,
    merge_items: Tensor,
    out: Tensor,
    lse: Tensor,
) -> Step:
    """The groups of STEP_SCHEMA."""
    return Step(
        requests=Requests(cu_seqlens_q, seq_lens, block_table),
        rules=ScoreRules(softmax_scale, softcap, softcap and 1.0 / softcap, alibi_slopes, sinks, query_bias),
        scales=device_scales(q_scale, k_scale, v_scale, out_scale),
        outputs=outputs(out, lse),
        work=WorkLists(counts, offsets, prefill_items, decode_items, merge_items),
        table_stride=block_table.stride(0),
        sliding_window=None if sliding_window is None else min(sliding_window, LARGEST_WINDOW),
        right_window=None if right_window is None else min(right_window, LARGEST_WINDOW),
        bias_width=0 if query_bias is None else query_bias.shape[1],
        bias_stride=0 if query_bias is None else query_bias.stride(0),
        causal=causal,
    )


def device_scales(*tensors: Tensor | None) -> DeviceScales:
    fields: list[Any] = []
    for tensor in tensors:
        fields += (None, None) if tensor is None else (tensor, int(tensor.numel() > 1))
    return DeviceScales(*fields)


def padded(size: int) -> int:
    """The power of two that `size` is padded to, at least the 16 that tl.dot needs."""
    return max(int(triton.next_power_of_2(size)), 16)


def launch_step(queries: Queries, cache: PagedKV, shape: Shape, step: Step) -> None:
    """One step of attention: prefill, decode, and the merge with the padding, each on a persistent grid."""
    limits = plan_limits()
    out = step.outputs.out
    num_tokens = out.shape[0]
    if num_tokens == 0:
        return
    programs = num_programs(out.device)
    with device_guard(out):
        # A buffer of this few tokens cannot hold a request of the prefill list: a fact of its shape.
        if num_tokens > limits.decode_tokens:
            tiles = shape.tiles(prefill=True)
            groups = (queries, cache, step.requests, step.rules, step.scales, step.outputs, step.work)
            prefill[(programs,)](
                *groups,
                *step.sizes,
                CAUSAL=step.causal,
                TILE_TOKENS=limits.tile_tokens,
                **shape.sizes,
                **options(tiles),
            )
        _launch_decode_and_merge(queries, cache, shape, step)


def _launch_decode_and_merge(queries: Queries, cache: PagedKV, shape: Shape, step: Step) -> None:
    limits, tiles = plan_limits(), shape.tiles(prefill=False)
    num_query_heads = shape.num_kv_heads * shape.group
    partials = allocate_partials(limits.partial_rows, num_query_heads, shape.head_size_v, step.outputs.out.device)
    programs = num_programs(step.outputs.out.device)
    groups = (queries, cache, step.requests, step.rules, step.scales, step.outputs, partials, step.work)
    decode[(programs,)](
        *groups,
        step.num_requests,
        *step.sizes,
        CAUSAL=step.causal,
        **shape.sizes,
        WIDE_M=tiles.wide_m,
        **options(tiles),
    )
    merge_splits[(programs,)](
        step.requests,
        step.rules,
        step.scales,
        step.outputs,
        partials,
        step.work,
        step.outputs.out.shape[0],
        step.num_requests,
        NUM_QUERY_HEADS=num_query_heads,
        GROUP=shape.group,
        HEAD_SIZE_V=shape.head_size_v,
        BLOCK_S=splits_per_merge_step(),
        BLOCK_T=16,
        BLOCK_V=padded(shape.head_size_v),
    )


def allocate_partials(rows: int, num_query_heads: int, head_size_v: int, device: torch.device) -> Partials:
    def scratch(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=device)

    return Partials(
        scratch(rows, num_query_heads), scratch(rows, num_query_heads), scratch(rows, num_query_heads, head_size_v)
    )


def options(tiles: Tiles) -> dict[str, int]:
    return {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
