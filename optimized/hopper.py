"""When prefill takes the kernel for Hopper, and its launch; everything else goes on with the portable one.

The choice follows from the architecture, the formats, the sizes and the strides of the caches: never from a batch, so
a captured graph holds one of the two.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton

from .kernels.arguments import Numbers, PagedKV, Pages, Step
from .kernels.hopper.sizes import COLUMNS, HopperTile
from .shapes import Shape, attention_sizes, padded
from .tile_table import Operands

# Gluon is an experimental language of Triton's: of other versions it is not known whether they compile this kernel.
GLUON_VERSIONS = ("3.6", "3.7")
TRITON_VERSION = ".".join(triton.__version__.split(".")[:2])

SWIZZLE_ROWS = 8  # slots of a page that a copy brings at least
ALIGNMENT = 8  # elements of 16 bits: what copies ask of strides and addresses
LARGEST_STRIDE = 2**40 // 2  # elements of 16 bits
LARGEST_HEAD = 256

# In which order programs take the work. With request order, backwards or not, the program that begins with the longest
# tile of rows has a longer one than the others at every turn.
ORDER = "snake"


class Form(NamedTuple):
    """A cache [num_blocks, block_size, num_kv_heads, size] as its copies see it; strides count elements.

    It holds no memory: one that outlives its cache is still right of whatever has the same form in the same place.
    """

    address: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def data_ptr(self) -> int:
        return self.address


def form_of(pages: Pages) -> Form:
    base = pages.base
    strides = (pages.stride_block, pages.stride_slot, pages.stride_head, pages.stride_dim)
    return Form(base.data_ptr(), base.dtype, tuple(base.shape), strides)


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
    if not all(COLUMNS // 2 < size <= LARGEST_HEAD for size in sizes):
        return f"head sizes {sizes}, not of {COLUMNS // 2 + 1} to {LARGEST_HEAD}"
    if shape.block_size % SWIZZLE_ROWS:
        return f"pages of {shape.block_size} slots, no multiple of {SWIZZLE_ROWS}"
    return next(filter(None, (_why_not_copied(name, form) for name, form in (("k_cache", k), ("v_cache", v)))), None)


def _why_not_copied(name: str, form: Form) -> str | None:
    if form.sizes[0] == 0:
        return f"{name} has no pages"
    if form.address % (2 * ALIGNMENT):
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
    return HopperTile(rows=64, keys=keys, stages=2, box_slots=box_slots, order=ORDER)


def hopper_caches(cache: PagedKV, shape: Shape, *, has_query_bias: bool) -> tuple[Form, Form] | None:
    """The caches of keys and of values, if a step's prefill takes the kernel for Hopper."""
    if shape.architecture != "sm_90" or cache.v is None:
        return None
    k, v = form_of(cache.k), form_of(cache.v)
    return (k, v) if why_portable(shape, k, v, has_query_bias=has_query_bias) is None else None


def launch_hopper_prefill(
    step: Step, numbers: Numbers, caches: tuple[Form, Form], shape: Shape, causal: bool, programs: int
) -> None:
    """Prefill of a step that has `hopper_caches`, with so many programs."""
    # Here, so that a Triton without Gluon never imports it.
    from .kernels.hopper.prefill import hopper_prefill

    tile = hopper_tile(shape)
    k, v = caches
    hopper_prefill[(programs,)](
        descriptor(k, tile.box_slots),
        descriptor(v, tile.box_slots),
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


@functools.lru_cache(maxsize=1024)
def descriptor(cache: Form, box_slots: int) -> Any:
    """What a launch encodes for the copies; kept, because making one takes 6 us."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .kernels.hopper.producer import box_layout

    return TensorDescriptor(cache, list(cache.sizes), list(cache.strides), [1, box_slots, 1, COLUMNS], box_layout(4))
