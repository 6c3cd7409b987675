"""Absorbed MLA decode on Hopper: when its own kernel is taken instead of the portable one, and its launch."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from .kernels.arguments import Numbers, Partials, Queries, Step
from .shapes import Shape, attention_sizes
from .tile_table import Operands
from .tuning import PER_MULTIPROCESSOR, num_programs, prefetched_steps

RANK, ROPE_SIZE = 512, 64  # of every published model with latent attention
ROWS = 64  # (token, head) pairs that a tile has room for
LARGEST_BOX = 64  # keys of one copy; the smallest is the 8 rows of a swizzle
GLUON_VERSIONS = ("3.6", "3.7")  # of Triton, with which the kernel was compiled
ALIGNMENT = 16  # bytes, of an address or stride that the copy engine takes


def why_portable(shape: Shape, step: Step) -> str | None:
    """Why the portable kernel takes this step, or None: the Hopper one does. Looks at sizes, formats and strides."""
    return _why_not_shape(shape, triton.__version__) or _why_not_step(step)


@functools.lru_cache(maxsize=1024)
def _why_not_shape(shape: Shape, triton_version: str) -> str | None:
    if shape.architecture != "sm_90":
        return f"made for sm_90, not {shape.architecture}"
    if not triton_version.startswith(tuple(f"{known}." for known in GLUON_VERSIONS)):
        return f"Triton {triton_version} is none of {', '.join(GLUON_VERSIONS)}"
    if shape.operands is not Operands.LATENT or shape.arithmetic not in (torch.float16, torch.bfloat16):
        return "not absorbed MLA with q and the cache in the same 16-bit format"
    if (shape.head_size, shape.rope_size) != (RANK, ROPE_SIZE):
        return f"rows of {shape.head_size} + {shape.rope_size} columns, not {RANK} + {ROPE_SIZE}"
    if shape.group < ROWS:
        return f"{shape.group} query heads fill no tile of {ROWS} rows"
    if shape.block_size % 8:
        return f"blocks of {shape.block_size} keys are not made of copies of 8"
    return None


def _why_not_step(step: Step) -> str | None:
    rules, scales, out = step.rules, step.scales, step.outputs.out
    if rules.query_bias is not None:
        return "a query bias"
    if out.element_size() == 1 or any(scale is not None and scale.base is not None for scale in scales):
        return "float8 output or scales"
    latent = step.cache.k
    if latent.stride_dim != 1 or not _copyable(latent.base, latent.stride_block, latent.stride_slot):
        return "the cache's strides"
    queries = step.queries
    if not _copyable(queries.main, queries.stride_token, queries.stride_head):
        return "q's strides"
    num_heads = queries.main.shape[1]
    if num_heads % ROWS and queries.stride_token != num_heads * queries.stride_head:
        return "tiles over several tokens whose heads are not evenly spaced"
    return None


def _copyable(tensor: Tensor, *strides: int) -> bool:
    """Whether the copy engine takes a tensor with these strides, whose last dimension is contiguous."""
    size = tensor.element_size()
    places = (tensor.data_ptr(), *(size * each for each in strides))
    return tensor.numel() > 0 and min(strides) > 0 and not any(place % ALIGNMENT for place in places)


def box_rows(block_size: int) -> int:
    """Keys of one copy: the largest power of two up to 64 that divides a block."""
    return min(block_size & -block_size, LARGEST_BOX)


def launch(step: Step, partials: Partials, shape: Shape, causal: bool, numbers: Numbers) -> None:
    """The decode list of a step that `why_portable` says nothing against."""
    # Here, because Gluon is Triton's to change, and missing elsewhere.
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .kernels.hopper.layouts import SWIZZLED_BOX
    from .kernels.hopper.mla_decode import decode_mla

    q, latent = step.queries, step.cache.k
    box = box_rows(shape.block_size)
    # Passed to the kernel by value: a captured launch keeps them.
    queries = TensorDescriptor(q.main, *_query_rows(q), [1, ROWS, 64], SWIZZLED_BOX.value)
    rows = list(latent.base.shape)
    strides = [latent.stride_block, latent.stride_slot, 1]
    cache = TensorDescriptor(latent.base, rows, strides, [1, box, 64], SWIZZLED_BOX.value)
    decode_mla[(num_programs(q.main.device) // PER_MULTIPROCESSOR,)](
        queries,
        cache,
        step,
        partials,
        *numbers,
        SIZES=attention_sizes(shape, causal),
        AHEAD=prefetched_steps(),
        num_warps=4,
    )


def _query_rows(queries: Queries) -> tuple[list[int], list[int]]:
    """Shape and strides of q for its descriptor: with all rows in one dimension, if tiles reach over several tokens."""
    num_tokens, num_heads, size = queries.main.shape
    if num_heads % ROWS == 0:
        return [num_tokens, num_heads, size], [queries.stride_token, queries.stride_head, 1]
    rows = num_tokens * num_heads
    return [1, rows, size], [rows * queries.stride_head, queries.stride_head, 1]
