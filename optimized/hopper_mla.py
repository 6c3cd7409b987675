"""Absorbed MLA on Hopper: when its own kernel is taken instead of the portable ones, and its launches."""

from __future__ import annotations

import functools

from . import hopper
from .hopper import Form
from .kernels.arguments import Numbers, Pages, Partials, Queries, Step
from .kernels.hopper.sizes import MLA_KEYS, MLA_RANK, MLA_ROPE, MLA_ROWS, SWIZZLE_ROWS
from .launching import Constants, Description, launch
from .shapes import Shape, attention_sizes
from .tile_table import Operands
from .tuning import hopper_programs, prefetched_steps


def why_portable(shape: Shape, step: Step) -> str | None:
    """Why the portable kernels take this step, or None: that for Hopper does, prefill and decode."""
    return hopper.why_not_compiled(shape.architecture) or _why_not_shape(shape) or _why_not_step(step)


@functools.lru_cache(maxsize=1024)
def _why_not_shape(shape: Shape) -> str | None:
    if shape.operands is not Operands.LATENT or shape.arithmetic.itemsize != 2:
        return "not absorbed MLA with q and the cache in the same 16-bit format"
    if (shape.head_size, shape.rope_size) != (MLA_RANK, MLA_ROPE):
        return f"rows of {shape.head_size} + {shape.rope_size} columns, not {MLA_RANK} + {MLA_ROPE}"
    if shape.block_size % SWIZZLE_ROWS:
        return f"pages of {shape.block_size} slots, no multiple of {SWIZZLE_ROWS}"
    return None


def _why_not_step(step: Step) -> str | None:
    scales, queries = step.scales, step.queries
    if step.rules.query_bias is not None:
        return "a query bias"
    if step.outputs.out.element_size() == 1 or any(scale is not None and scale.base is not None for scale in scales):
        return "float8 output or scales"
    num_heads = queries.main.shape[1]
    if not _has_whole_tiles(num_heads) and queries.stride_token != num_heads * queries.stride_head:
        return "tiles over several tokens whose heads are not evenly spaced"
    latent, rows = _latent_form(step.cache.k), _query_form(queries)
    return hopper.why_not_copied("latent_cache", latent) or hopper.why_not_copied("q_nope", rows)


@functools.lru_cache(maxsize=1024)
def constants_of(shape: Shape, causal: bool, *, prefill: bool) -> Constants:
    """For one of the two lists."""
    sizes = attention_sizes(shape, causal)
    return {"SIZES": sizes, "PREFILL": prefill, "AHEAD": prefetched_steps(), "num_warps": 4}


def run(step: Step, partials: Partials, numbers: Numbers, constants: Constants, description: Description) -> None:
    """One list of a step that `why_portable` says nothing against. description: of the step and the partial results."""
    # Here, so that a Triton without Gluon never imports it.
    from .kernels.hopper.mla import attend_latent

    queries = hopper.descriptor(_query_form(step.queries), *_query_box(step.queries.main.shape[1]))
    box = hopper.box_slots(constants["SIZES"].block_size, MLA_KEYS)
    cache = hopper.descriptor(_latent_form(step.cache.k), 1, box)
    programs = hopper_programs(step.outputs.out.device)
    launch(attend_latent, programs, (queries, cache, step, partials), numbers, constants, description)


def _latent_form(latent: Pages) -> Form:
    base = latent.base
    return Form(
        base.data_ptr(), base.dtype, tuple(base.shape), (latent.stride_block, latent.stride_slot, latent.stride_dim)
    )


def _has_whole_tiles(num_heads: int) -> bool:
    """Whether a tile of rows is heads of one token, or all heads of several: what one copy can bring by its strides."""
    return num_heads % MLA_ROWS == 0 or MLA_ROWS % num_heads == 0


def _query_box(num_heads: int) -> tuple[int, int]:
    """The rows of a copy, by the first two dimensions of `_query_form`."""
    return (MLA_ROWS // num_heads, num_heads) if MLA_ROWS % num_heads == 0 else (1, MLA_ROWS)


def _query_form(queries: Queries) -> Form:
    """That of q, without the rotary part; with all rows in one dimension, if a tile has parts of several tokens."""
    q, stride_head = queries.main, queries.stride_head
    num_tokens, num_heads, size = q.shape
    if _has_whole_tiles(num_heads):
        return Form(q.data_ptr(), q.dtype, (num_tokens, num_heads, size), (queries.stride_token, stride_head, 1))
    rows = num_tokens * num_heads
    return Form(q.data_ptr(), q.dtype, (1, rows, size), (rows * stride_head, stride_head, 1))
