"""Enough of Gluon, on torch tensors and Python threads, to run the kernels for Hopper on a CPU (emulated_hopper.py).

Barriers, rings, boxes of a copy and where they land in shared memory are kept as on the hardware, layouts of registers
are not, and a product is done when it is asked for. So what this shows is a kernel's logic: which keys meet which rows,
who waits for what, and what is cleared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from .gluon_memory import Barrier, Barriers, Block, Pointer, Shared, block

float32, int32, int64, float8e4nv = torch.float32, torch.int32, torch.int64, torch.float8_e4m3fn
static_range = range
program = threading.local()
stored: list[int] = []  # elements of each store


class Whole(int):
    @property
    def value(self) -> int:
        return int(self)


def constexpr(value: Any) -> Any:
    return Whole(value) if isinstance(value, int) else value


def jit(function: Any = None, **_: Any) -> Any:
    return function if function is not None else lambda wrapped: wrapped


constexpr_function = jit


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Block:
    places, wanted = torch.broadcast_tensors(torch.as_tensor(pointer.offset), torch.as_tensor(mask))
    found = pointer.memory()[torch.where(wanted, places, 0).long()]
    return block(torch.where(wanted, found, torch.as_tensor(other).to(found.dtype)))


def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    places, wanted, values = torch.broadcast_tensors(torch.as_tensor(pointer.offset), torch.as_tensor(mask), value)
    # Through bytes of the same size: an index may not set float8.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[pointer.base.element_size()]
    stored.append(int(wanted.sum()))
    pointer.memory().view(bits)[places[wanted].long()] = values[wanted].contiguous().view(bits)


def multiple_of(value: Any, factor: int) -> Any:
    assert (torch.as_tensor(value) % factor == 0).all()
    return value


def inline_asm_elementwise(_text: str, _constraints: str, places: list[Any], **_: Any) -> None:
    """A prefetch, the only use there is: what it asks for has to exist."""
    for pointer in places:
        load(pointer)


def where(condition: Any, left: Any, right: Any) -> Block:
    return block(torch.where(torch.as_tensor(condition), torch.as_tensor(left), torch.as_tensor(right)))


def _of_two(function: Callable[..., Any]) -> Callable[[Any, Any], Block]:
    return lambda left, right: block(function(torch.as_tensor(left), torch.as_tensor(right)))


def _of_one(function: Callable[..., Any]) -> Callable[[Any], Block]:
    return lambda value: block(function(torch.as_tensor(value)))


maximum, minimum, div_rn = map(_of_two, (torch.maximum, torch.minimum, torch.div))
exp2, log, abs, to_tensor, zeros_like = map(_of_one, (torch.exp2, torch.log, torch.abs, torch.clone, torch.zeros_like))


reshape, permute = (lambda value, to: block(value.reshape(to))), (lambda value, to: block(value.permute(to)))


def split(value: Any) -> tuple[Block, ...]:
    return tuple(block(part) for part in value.unbind(-1))


def cdiv(left: Any, right: Any) -> Any:
    return -(-left // right)


def max(value: Any, axis: int) -> Block:
    return block(value.amax(axis))


def sum(value: Any, axis: int) -> Block:
    return block(value.sum(axis))


def arange(start: int, end: int, layout: Any = None) -> Block:
    return block(torch.arange(start, end))


def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Block:
    return block(torch.full(tuple(shape), value, dtype=dtype))


def zeros(shape: Any, dtype: Any, layout: Any = None) -> Block:
    return full(shape, 0, dtype)


def convert_layout(value: Any, layout: Any) -> Any:
    return value


def cast(value: Any, dtype: Any) -> Any:
    return value.to(dtype)


def program_id(axis: int) -> int:
    return int(program.index)


def num_programs(axis: int) -> int:
    return int(program.count)


def num_warps() -> int:
    return 4


def _nothing(*_: Any, **__: Any) -> None:
    """Layouts, and waits that order what is in order here."""


NVMMASharedLayout = SwizzledSharedLayout = BlockedLayout = SliceLayout = NVMMADistributedLayout = _nothing
DotOperandLayout = DistributedLinearLayout = barrier = fence_async_shared = _nothing


def allocate_shared_memory(dtype: Any, shape: Any, layout: Any) -> Any:
    if dtype is int64:
        return Barrier() if len(shape) == 1 else Barriers(Barrier() for _ in range(shape[0]))
    # NaN where nothing has been brought: what is used too early, or never came, shows.
    return Shared(torch.full((torch.Size(shape).numel(),), float("nan"), dtype=dtype), tuple(shape))


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = int(count)


def _wait(barrier: Barrier, phase: Any, pred: Any = True) -> None:
    if pred:
        barrier.wait(int(phase))


def _copy(descriptor: Any, corner: list[Any], barrier: Barrier, target: Shared) -> None:
    """A box of a tensor; what lies outside of the tensor comes as zeros."""
    assert tuple(descriptor.block_shape) == tuple(target.shape)
    box = torch.zeros(descriptor.block_shape, dtype=target.dtype)
    ranges = zip(corner, box.shape, descriptor.shape, strict=True)
    inside = [slice(min(int(at), size), min(int(at) + count, size)) for at, count, size in ranges]
    found = descriptor.tensor[tuple(inside)]
    box[tuple(slice(0, n) for n in found.shape)] = found
    target.store(box.reshape(-1, box.shape[-1]))
    barrier.update(came=box.numel() * box.element_size())


def _copy_later(target: Shared, pointer: Pointer, mask: Any) -> None:
    """Neither what was there before nor what comes may be used before it is waited for."""
    target.store(torch.full((target.shape[0], target.shape[1]), float("nan"), dtype=target.dtype))
    program.copies.append((target, pointer, mask))


def _commit_group() -> None:
    program.groups.append(program.copies)
    program.copies = []


def _wait_group(pending: int) -> None:
    while len(program.groups) > pending:
        for target, pointer, mask in program.groups.pop(0):
            target.store(load(pointer, mask))


async_copy = SimpleNamespace(
    async_copy_global_to_shared=_copy_later, commit_group=_commit_group, wait_group=_wait_group
)
mbarrier = SimpleNamespace(
    MBarrierLayout=_nothing,
    init=_init,
    wait=_wait,
    expect=lambda barrier, count: barrier.update(arrivals=1, announced=count),
    arrive=lambda barrier, count: barrier.update(arrivals=count),
)
tma = SimpleNamespace(async_copy_global_to_shared=_copy)


def warpgroup_mma(left: Any, right: Shared, sums: Any, use_acc: bool = True, is_async: bool = False) -> Block:
    assert is_async
    left = left.load() if isinstance(left, Shared) else left
    assert left.dtype == right.dtype
    product = left.float() @ right.load().float()
    return block(sums + product if use_acc else product)


def warpgroup_mma_wait(pending: int, deps: list[Any]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)


def warp_specialize(partitions: Any, warps: Any, registers: Any) -> None:
    index, count, failures = program.index, program.count, []

    def run(function: Any, arguments: Any) -> None:
        program.index, program.count = index, count
        program.copies, program.groups = [], []  # a thread's own, not yet in a group and not yet waited for
        try:
            function(*arguments)
            assert not program.copies
            assert not program.groups
        except BaseException as failure:  # raised again by the thread that waits
            failures.append(failure)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
