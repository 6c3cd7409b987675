"""Prefill on Hopper: when its own kernel is taken instead of the portable one, and its launch."""

from __future__ import annotations

import functools

from . import hopper
from .hopper import Form
from .kernels.arguments import Numbers, PagedKV, Pages, Queries, Step
from .kernels.hopper.sizes import CHUNK, SWIZZLE_ROWS, PrefillTile
from .launching import Constants, Description, launch
from .shapes import Shape, attention_sizes, padded
from .tile_table import Operands
from .tuning import hopper_programs

LARGEST_HEAD = 256
MOST_TOKENS = 128  # of a work: one for each row of its consumers

# In which order programs take the work. With request order, backwards or not, the program that begins with the longest
# tile of rows has a longer one than the others at every turn.
ORDER = "snake"


def why_portable(shape: Shape, step: Step) -> str | None:
    """Why the portable kernel takes this step's prefill, or None: that for Hopper does."""
    return (
        hopper.why_not_compiled(shape.architecture)
        or _why_not_shape(shape)
        or _why_not_queries(step.queries, shape.group)
        or _why_not_step(step)
    )


@functools.lru_cache(maxsize=1024)
def _why_not_shape(shape: Shape) -> str | None:
    if shape.operands is not Operands.LOADED or shape.rope_size or shape.arithmetic.itemsize != 2:
        return "keys and values are not multiplied as 16-bit values that lie in the cache"
    sizes = (shape.head_size, shape.head_size_v)
    if not all(CHUNK // 2 < size <= LARGEST_HEAD for size in sizes):
        return f"head sizes {sizes}, not of {CHUNK // 2 + 1} to {LARGEST_HEAD}"
    if shape.head_size * shape.arithmetic.itemsize % hopper.ALIGNMENT:
        return f"queries of {shape.head_size} columns, no multiple of {hopper.ALIGNMENT} bytes"
    if shape.block_size % SWIZZLE_ROWS:
        return f"pages of {shape.block_size} slots, no multiple of {SWIZZLE_ROWS}"
    return None


def _why_not_step(step: Step) -> str | None:
    if step.rules.query_bias is not None:
        return "a query bias hides keys that may not be read"
    if step.rules.softmax_scale < 0.0:
        return "with a negative softmax scale the largest product is not the largest score"
    k, v = _forms(step.cache)
    return hopper.why_not_copied("k_cache", k) or hopper.why_not_copied("v_cache", v)


def _why_not_queries(queries: Queries, group: int) -> str | None:
    """Rows of queries are copied so many bytes at a time; within a work they are counted in 32 bits."""
    main, strides = queries.main, (queries.stride_token, queries.stride_head)
    if main.data_ptr() % hopper.ALIGNMENT:
        return f"queries do not begin on {hopper.ALIGNMENT} bytes"
    if any(stride * main.element_size() % hopper.ALIGNMENT for stride in strides):
        return f"queries' strides {strides} are not multiples of {hopper.ALIGNMENT} bytes"
    if MOST_TOKENS * strides[0] + group * strides[1] >= 2**31:
        return f"queries' strides {strides} take a work of theirs beyond 32 bits"
    return None


@functools.lru_cache(maxsize=1024)
def tile_of(shape: Shape) -> PrefillTile:
    """The tile of a shape that takes the kernel for Hopper.

    128 keys at head size 128 leave no register unused; with 256 columns there is room for 64. A third tile of 128 keys
    has room, and is 1% at most.
    """
    keys = 128 if max(padded(shape.head_size), padded(shape.head_size_v)) <= 128 else 64
    return PrefillTile(rows=64, keys=keys, stages=2, box_slots=hopper.box_slots(shape.block_size, keys), order=ORDER)


@functools.lru_cache(maxsize=1024)
def constants_of(shape: Shape, causal: bool) -> Constants:
    return {"SIZES": attention_sizes(shape, causal), "TILE": tile_of(shape), "num_warps": 4}


def run(step: Step, numbers: Numbers, constants: Constants, description: Description) -> None:
    """The prefill list of a step that `why_portable` says nothing against. description: of the step, or of more."""
    # Here, so that a Triton without Gluon never imports it.
    from .kernels.hopper.prefill import hopper_prefill

    k, v = (hopper.descriptor(form, 1, constants["TILE"].box_slots, 1) for form in _forms(step.cache))
    groups = (k, v, step.queries, step.requests, step.rules, step.scales, step.outputs, step.work)
    launch(hopper_prefill, hopper_programs(step.outputs.out.device), groups, numbers, constants, description)


def _forms(cache: PagedKV) -> tuple[Form, Form]:
    """Those of keys and of values; a cache that is multiplied as it was loaded has both."""
    assert cache.v is not None
    return _form(cache.k), _form(cache.v)


def _form(pages: Pages) -> Form:
    base = pages.base
    strides = (pages.stride_block, pages.stride_slot, pages.stride_head, pages.stride_dim)
    return Form(base.data_ptr(), base.dtype, tuple(base.shape), strides)
