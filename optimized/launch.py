"""From an operator's flat arguments to the launches of one attention step."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.errors import bad_value
from . import hopper_mla, hopper_prefill
from .interpreter import INTERPRETED
from .kernels.arguments import (
    DeviceScales,
    Numbers,
    Outputs,
    PagedKV,
    Partials,
    Queries,
    Requests,
    ScoreRules,
    Step,
    WorkLists,
    outputs,
    scale,
)
from .kernels.decode import decode
from .kernels.merge import merge_splits
from .kernels.prefill import prefill
from .launching import Description, describe, launch
from .shapes import Shape, decode_constants, merge_constants, prefill_constants
from .tuning import merge_programs, num_programs, plan_limits

# Beyond every length; window arithmetic with it stays inside int32.
LARGEST_WINDOW = 2**30
_NO_GUARD = contextlib.nullcontext()


def require_device(name: str, tensor: Tensor) -> None:
    """Raise unless the kernels can run where `tensor` lies."""
    if not tensor.is_cuda and not INTERPRETED:
        expected = "a CUDA device, or TRITON_INTERPRET=1 in the environment before pageproof.optimized is imported"
        raise bad_value(name, f"a tensor on {tensor.device}", expected)


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The device of `tensor`, for Triton launches on the current one; mostly it is that already."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(tensor.device)


class StepArguments(NamedTuple):
    """What the attention operators have in common, grouped as the kernels take it."""

    requests: Requests
    rules: ScoreRules
    scales: DeviceScales
    outputs: Outputs
    work: WorkLists
    numbers: Numbers
    causal: bool


STEP_SCHEMA = (
    "Tensor block_table, "
    "float softmax_scale, bool causal, int? sliding_window, int? right_window, float? softcap, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? query_bias, "
    "Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, Tensor? out_scale, "
    "Tensor counts, Tensor prefill_items, Tensor decode_items, Tensor merge_items, "
    "Tensor(a!) out, Tensor(b!) lse"
)


def read_step(
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
    prefill_items: Tensor,
    decode_items: Tensor,
    merge_items: Tensor,
    out: Tensor,
    lse: Tensor,
) -> StepArguments:
    """The groups of STEP_SCHEMA: an operator's schema is flat, and this is the one place that knows its order."""
    return StepArguments(
        requests=Requests(block_table),
        rules=ScoreRules(softmax_scale, softcap, softcap and 1.0 / softcap, alibi_slopes, sinks, query_bias),
        scales=DeviceScales(scale(q_scale), scale(k_scale), scale(v_scale), scale(out_scale)),
        outputs=outputs(out, lse),
        work=WorkLists(counts, prefill_items, decode_items, merge_items),
        numbers=Numbers(
            table_stride=block_table.stride(0),
            sliding_window=None if sliding_window is None else min(sliding_window, LARGEST_WINDOW),
            right_window=None if right_window is None else min(right_window, LARGEST_WINDOW),
            bias_width=0 if query_bias is None else query_bias.shape[1],
            bias_stride=0 if query_bias is None else query_bias.stride(0),
        ),
        causal=causal,
    )


def launch_step(queries: Queries, cache: PagedKV, shape: Shape, arguments: StepArguments) -> None:
    """One step of attention: prefill, decode, and the merge with the padding, each on a persistent grid."""
    out, numbers = arguments.outputs.out, arguments.numbers
    num_tokens = out.shape[0]
    if num_tokens == 0:
        return
    step = Step(
        queries, cache, arguments.requests, arguments.rules, arguments.scales, arguments.outputs, arguments.work
    )  # fmt: skip
    num_query_heads = shape.num_kv_heads * shape.group
    partials = allocate_partials(step.work.merge_items.shape[0], num_query_heads, shape.head_size_v, out.device)
    description = describe((step, partials), (*numbers, num_tokens))
    with device_guard(out):
        # A buffer of this few tokens cannot hold a request of the prefill list: a fact of its shape.
        if num_tokens > plan_limits().decode_tokens:
            _launch_prefill(step, partials, shape, arguments, description)
        _launch_decode(step, partials, shape, arguments, description)
        groups = (step.rules, step.scales, step.outputs, partials, step.work)
        sizes = merge_constants(num_query_heads, shape.head_size_v, shape.group)
        programs = merge_programs(out.device)
        launch(merge_splits, programs, groups, (num_tokens,), sizes, description)


def _launch_prefill(
    step: Step, partials: Partials, shape: Shape, arguments: StepArguments, description: Description
) -> None:
    if hopper_prefill.why_portable(shape, step) is None:
        constants = hopper_prefill.constants_of(shape, arguments.causal)
        hopper_prefill.run(step, arguments.numbers, constants, description)
    elif hopper_mla.why_portable(shape, step) is None:
        constants = hopper_mla.constants_of(shape, arguments.causal, prefill=True)
        hopper_mla.run(step, partials, arguments.numbers, constants, description)
    else:
        programs, constants = num_programs(step.outputs.out.device), prefill_constants(shape, arguments.causal)
        launch(prefill, programs, (step,), arguments.numbers, constants, description)


def _launch_decode(
    step: Step, partials: Partials, shape: Shape, arguments: StepArguments, description: Description
) -> None:
    if hopper_mla.why_portable(shape, step) is None:
        constants = hopper_mla.constants_of(shape, arguments.causal, prefill=False)
        hopper_mla.run(step, partials, arguments.numbers, constants, description)
    else:
        programs, constants = num_programs(step.outputs.out.device), decode_constants(shape, arguments.causal)
        launch(decode, programs, (step, partials), arguments.numbers, constants, description)


def allocate_partials(rows: int, num_query_heads: int, head_size_v: int, device: torch.device) -> Partials:
    def scratch(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=device)

    return Partials(
        scratch(rows, num_query_heads), scratch(rows, num_query_heads), scratch(rows, num_query_heads, head_size_v)
    )
