"""The plan of a step: device work lists, made once from the lengths and shared by all layers."""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from ..reference.errors import bad_type, bad_value
from ..reference.problem import Batch
from . import operators
from .kernels import plan as kernels
from .kernels.work_lists import NUM_COUNTS, RECORD
from .launch import device_guard, require_device
from .launching import Constants, launch
from .tuning import (
    PlanBlock,
    PlanLimits,
    invariant_limits,
    num_programs,
    partial_rows,
    plan_block,
    plan_limits,
    plan_programs,
)

# Positions, windows and their sums stay inside int32, and a split of kernels.WHOLE keys is never cut.
LARGEST_SEQ_LEN = kernels.WHOLE.value - 1

REQUEST_PROGRAMS = 8  # kv heads of most models
LARGEST_REQUEST_PROGRAMS = 2**16  # times all keys of a batch it fits into int64


class Capacity(NamedTuple):
    """The largest sizes that a plan, and a graph captured with it, must hold."""

    num_tokens: int
    num_requests: int
    seq_len: int


class Plan(NamedTuple):
    """Work lists on the device. Only their sizes are fixed when it is made; all values follow the lengths.

    counts [7] int32 and items [capacity, 8] int32: see kernels/work_lists.py. They hold all that attention asks of the
    lengths, and the batch's own are not read again. So a plan is for one step: given that of other lengths, attention
    takes rows, table entries and keys of those, whether they are there or not.
    """

    counts: Tensor
    prefill_items: Tensor
    decode_items: Tensor
    merge_items: Tensor
    num_requests: int
    capacity: Capacity

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.counts, self.prefill_items, self.decode_items, self.merge_items


def make_plan(
    batch: Batch,
    capacity: Capacity | tuple[int, int, int],
    *,
    request_programs: int = REQUEST_PROGRAMS,
    batch_invariant: bool = False,
    validate: bool = False,
) -> Plan:
    """Plan one step: write on the device which program will do what, from `batch`'s lengths as they are there.

    batch: cu_seqlens_q [num_requests + 1], seq_lens [num_requests] int32. capacity: the bucket's largest
    (num_tokens, num_requests, seq_len). Nothing is read on the host, so a captured call plans anew at each replay.
    request_programs: how many programs work side by side on one request of few tokens: the kv heads of the layers that
    share the plan; for absorbed MLA 1 up to 16 query heads, and 2 per 64 beyond. Speed depends on it, and the last
    bits of what is summed over many keys, because it decides how long a split is.
    batch_invariant: split each request by its own lengths, so that its result has the same bits alone and in any batch,
    permuted, padded or replayed, whatever the capacity and `request_programs` are. Partial results then take 32 rows
    for each of the capacity's requests, where they take 512 in all, and small batches keep fewer programs busy.
    Lengths above the capacity are undefined; `validate` looks for them (and synchronises).
    """
    capacity = _check_capacity(batch, capacity)
    if isinstance(request_programs, bool) or not isinstance(request_programs, int):
        raise bad_type("request_programs", request_programs, "an int")
    if not 1 <= request_programs <= LARGEST_REQUEST_PROGRAMS:
        raise bad_value("request_programs", request_programs, f"1 to {LARGEST_REQUEST_PROGRAMS}")
    if not isinstance(batch_invariant, bool):
        raise bad_type("batch_invariant", batch_invariant, "a bool")
    require_device("batch", batch.seq_lens)
    if validate:
        _check_lengths(batch, capacity)
    limits = _limits(batch_invariant)
    num_prefill = capacity.num_tokens // limits.tile_tokens
    num_prefill += min(capacity.num_requests, capacity.num_tokens // (limits.decode_tokens + 1))
    num_partial = partial_rows(limits, capacity.num_requests)
    num_decode = capacity.num_requests + num_partial

    new_empty = batch.seq_lens.new_empty

    def items(count: int) -> Tensor:
        return new_empty((max(count, 1), RECORD.value))

    lists = items(num_prefill), items(num_decode), items(num_partial)
    plan = Plan(new_empty(NUM_COUNTS), *lists, batch.num_requests, capacity)
    operators.call("make_plan", batch.cu_seqlens_q, batch.seq_lens, request_programs, batch_invariant, *plan.tensors)
    return plan


def _limits(batch_invariant: bool) -> PlanLimits:
    return invariant_limits(plan_limits()) if batch_invariant else plan_limits()


def _write_plan(
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    request_programs: int,
    batch_invariant: bool,
    counts: Tensor,
    prefill_items: Tensor,
    decode_items: Tensor,
    merge_items: Tensor,
) -> None:
    num_requests = seq_lens.shape[0]
    block = plan_block(num_requests)
    shares = -(-(num_requests + 1) // block.share)  # triton.cdiv takes 2 us
    tensors = (cu_seqlens_q, seq_lens, counts, prefill_items, decode_items, merge_items)
    numbers = (
        num_requests,
        prefill_items.shape[0],
        decode_items.shape[0],
        merge_items.shape[0],
        request_programs,
        plan_programs(seq_lens.device),
    )
    with device_guard(seq_lens):
        launch(
            kernels.write_plan,
            min(shares, num_programs(seq_lens.device)),
            tensors,
            numbers,
            _constants(_limits(batch_invariant), block),
        )


@functools.lru_cache(maxsize=64)
def _constants(limits: PlanLimits, block: PlanBlock) -> Constants:
    return {"LIMITS": limits, "BLOCK": block.requests, "SHARE": block.share, "num_warps": block.num_warps}


def check_plan(plan: object, batch: Batch, *, num_tokens: int, block_size: int) -> Plan:
    """Raise unless `plan` was made for buffers of these sizes."""
    if not isinstance(plan, Plan):
        raise bad_type("plan", plan, "a Plan from make_plan, or None")
    if plan.num_requests != batch.num_requests:
        raise bad_value("plan", f"one for {plan.num_requests} requests", f"one for {batch.num_requests}")
    if plan.capacity.num_tokens < num_tokens:
        raise bad_value("plan", f"a capacity of {plan.capacity.num_tokens} tokens", f"at least {num_tokens}")
    if batch.num_requests and batch.max_blocks * block_size < plan.capacity.seq_len:
        found = f"{batch.max_blocks} columns of {block_size} keys"
        raise bad_value("block_table", found, f"room for the plan's capacity of {plan.capacity.seq_len} keys")
    if plan.counts.device != batch.device:
        raise bad_value("plan", f"one on {plan.counts.device}", f"one on {batch.device} like the batch")
    return plan


def _check_capacity(batch: Batch, capacity: object) -> Capacity:
    if not isinstance(capacity, tuple) or len(capacity) != 3:
        raise bad_type("capacity", capacity, "a Capacity(num_tokens, num_requests, seq_len)")
    checked = Capacity(*capacity)
    for name, value in checked._asdict().items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad_type(f"capacity.{name}", value, "an int")
        if not 0 <= value <= LARGEST_SEQ_LEN:
            raise bad_value(f"capacity.{name}", value, f"0 to {LARGEST_SEQ_LEN}")
    if checked.num_requests < batch.num_requests:
        raise bad_value("capacity.num_requests", checked.num_requests, f"at least the batch's {batch.num_requests}")
    return checked


def _check_lengths(batch: Batch, capacity: Capacity) -> None:
    rows = int(batch.cu_seqlens_q[-1])
    longest = int(batch.seq_lens.max()) if batch.num_requests else 0
    if rows > capacity.num_tokens:
        raise bad_value("cu_seqlens_q", f"{rows} tokens", f"at most the capacity's {capacity.num_tokens}")
    if longest > capacity.seq_len:
        raise bad_value("seq_lens", f"a length of {longest}", f"at most the capacity's {capacity.seq_len}")


operators.define(
    "make_plan",
    "Tensor cu_seqlens_q, Tensor seq_lens, int request_programs, bool batch_invariant, "
    "Tensor(a!) counts, "
    "Tensor(b!) prefill_items, Tensor(c!) decode_items, Tensor(d!) merge_items",
    _write_plan,
)
