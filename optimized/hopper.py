"""When prefill takes the kernel for Hopper, and its launch; everything else goes on with the portable one.

The choice follows from the architecture, the formats, the sizes and the strides of the caches: never from a batch, so
a captured graph holds one of the two.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
from torch import Tensor

from .kernels.arguments import PagedKV, Pages, Step, stride
from .kernels.hopper.sizes import COLUMNS, HopperTile
from .shapes import Shape, attention_sizes, padded
from .tile_table import Operands

# Gluon is an experimental language of Triton's: of other versions it is not known whether they compile this kernel.
GLUON_VERSIONS = ("3.6", "3.7")
TRITON_VERSION = ".".join(triton.__version__.split(".")[:2])

SWIZZLE_ROWS = 8  # slots of a page that a copy brings at least
ALIGNMENT = 8  # elements of 16 bits: what copies ask of strides and addresses
LARGEST_STRIDE = 2**40 // 2  # elements of 16 bits


class Form(NamedTuple):
    """Of a cache [num_blocks, block_size, num_kv_heads, size]: what its copies depend on; strides count elements."""

    num_blocks: int
    strides: tuple[int, int, int, int]
    is_aligned: bool  # its first element lies on 16 bytes


def form_of(pages: Pages) -> Form:
    base = pages.base
    strides = (pages.stride_block, pages.stride_slot, pages.stride_head, pages.stride_dim)
    return Form(base.shape[0], strides, base.data_ptr() % (ALIGNMENT * 2) == 0)


@functools.lru_cache(maxsize=1024)
def why_portable(
    shape: Shape, k: Form, v: Form, *, has_query_bias: bool, triton_version: str = TRITON_VERSION
) -> str | None:
    """Why this prefill takes the portable kernel; None if it takes that for Hopper."""
    if shape.architecture != "sm_90":
        return f"architecture {shape.architecture}"
    if triton_version not in GLUON_VERSIONS:
        return f"Triton {triton_version}, not one of {', '.join(GLUON_VERSIONS)}"
    if shape.operands is not Operands.LOADED or shape.rope_size or shape.arithmetic.itemsize != 2:
        return "keys and values are not multiplied as 16-bit values that lie in the cache"
    if has_query_bias:
        return "a query bias hides keys that may not be read"
    sizes = (shape.head_size, shape.head_size_v)
    if not all(COLUMNS // 2 < size <= 256 for size in sizes):
        return f"head sizes {sizes}, not of {COLUMNS // 2 + 1} to 256"
    if shape.block_size % SWIZZLE_ROWS:
        return f"pages of {shape.block_size} slots, no multiple of {SWIZZLE_ROWS}"
    return next(filter(None, (_why_not_copied(name, form) for name, form in (("k_cache", k), ("v_cache", v)))), None)


def _why_not_copied(name: str, form: Form) -> str | None:
    if form.num_blocks == 0:
        return f"{name} has no pages"
    if not form.is_aligned:
        return f"{name} does not begin on 16 bytes"
    if form.strides[3] != 1:
        return f"{name}'s last dimension is not contiguous"
    if any(step % ALIGNMENT or not 0 < step < LARGEST_STRIDE for step in form.strides[:3]):
        return f"{name}'s strides {form.strides} are not multiples of 16 bytes"
    return None


@functools.lru_cache(maxsize=1024)
def hopper_tile(shape: Shape) -> HopperTile:
    """The tile of a shape that takes the kernel for Hopper.

    128 keys at head size 128 leave no register unused; with 256 columns there is room for 64.
    """
    keys = 128 if max(padded(shape.head_size), padded(shape.head_size_v)) <= 128 else 64
    box_slots = min(shape.block_size & -shape.block_size, keys)
    return HopperTile(rows=64, keys=keys, stages=2, box_slots=box_slots, order="snake")


def takes_hopper(cache: PagedKV, shape: Shape, *, has_query_bias: bool) -> bool:
    """Whether a step's prefill takes the kernel for Hopper."""
    if shape.architecture != "sm_90" or cache.v is None:
        return False
    return why_portable(shape, form_of(cache.k), form_of(cache.v), has_query_bias=has_query_bias) is None


def launch_hopper_prefill(step: Step, numbers: tuple[Any, ...], shape: Shape, causal: bool, programs: int) -> None:
    """Prefill of a step that `takes_hopper`, with so many programs."""
    # Here, so that a Triton without Gluon never imports it.
    from .kernels.hopper.prefill import hopper_prefill

    tile = hopper_tile(shape)
    assert step.cache.v is not None
    hopper_prefill[(programs,)](
        descriptor(step.cache.k.base, tile.box_slots),
        descriptor(step.cache.v.base, tile.box_slots),
        step.queries,
        step.requests,
        step.rules,
        step.scales,
        step.outputs,
        step.work,
        *numbers,
        SIZES=attention_sizes(shape, causal),
        TILE=tile,
        num_warps=4,
    )


def descriptor(cache: Tensor, box_slots: int) -> Any:
    """What the copies need to know of a cache; it holds for as long as the cache stays where it is."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    strides = [stride(cache, dim) for dim in range(4)]
    return TensorDescriptor(cache, list(cache.shape), strides, [1, box_slots, 1, COLUMNS], _box_layout())


@functools.cache
def _box_layout() -> Any:
    from .kernels.hopper.producer import box_layout

    return box_layout(4)
