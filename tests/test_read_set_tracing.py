"""What the tracer sees of a kernel: every address, at its width, without the lanes that are masked off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pageproof.optimized.interpreter import INTERPRETED
from pageproof.oracle.checks.reads_memory import Memory, Region, regions, resolve
from pageproof.oracle.execution.tracing import StrayAccess, Trace, tracing

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, not interpreted")


@triton.jit
def copy_masked(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + lanes, tl.load(source + lanes, mask=lanes < count), mask=lanes < count)


@triton.jit
def add_up(source, total, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, BLOCK)
    tl.atomic_add(total + lanes * 0, tl.load(source + lanes), mask=lanes < 3)


@triton.jit
def swap(flag):  # type: ignore[no-untyped-def]
    tl.atomic_cas(flag, 0, 1)


@triton.jit
def through_a_descriptor(source, target):  # type: ignore[no-untyped-def]
    tl.store(target + tl.arange(0, 8), source.load([4]))


def traced(launch: Any, **tensors: Tensor) -> tuple[Trace, Memory]:
    with tracing(tensors.values()) as recorder:
        launch(*tensors.values())
    trace = recorder.trace()
    return trace, resolve(trace, regions(tensors))


def test_masked_lanes_are_not_touched() -> None:
    source, target = torch.arange(12.0), torch.zeros(12)
    trace, memory = traced(lambda a, b: copy_masked[(3,)](a, b, 6, BLOCK=4), source=source, target=target)
    assert trace.launches == 1
    assert trace.programs.tolist() == [0, 0, 1, 1, 2, 2]
    assert trace.lanes.tolist() == [4, 4, 2, 2, 0, 0]
    assert trace.is_store.tolist() == [False, True] * 3
    assert memory.loads["source"].elements.tolist() == [0, 1, 2, 3, 4, 5]
    assert memory.stores["target"].elements.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(memory.stores["source"].elements) == len(memory.loads["target"].elements) == 0


def test_atomics_are_a_load_and_a_store() -> None:
    _, memory = traced(lambda a, b: add_up[(1,)](a, b, BLOCK=4), source=torch.ones(4), total=torch.zeros(2))
    assert memory.loads["total"].elements.tolist() == memory.stores["total"].elements.tolist() == [0, 0, 0]
    _, memory = traced(lambda a: swap[(1,)](a), flag=torch.zeros(1, dtype=torch.int32))
    assert memory.loads["flag"].elements.tolist() == memory.stores["flag"].elements.tolist() == [0]


def test_descriptors_keep_to_their_bounds() -> None:
    """The kernel is given its tensor inside of the descriptor only."""
    source = torch.ones(8)
    with tracing([]) as recorder:
        through_a_descriptor[(1,)](TensorDescriptor(source, [8], [1], [8]), torch.zeros(8))
    memory = resolve(recorder.trace(), {"source": Region("source", source)})
    assert memory.loads["source"].elements.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("element", "lane", "elements"),
    [(torch.uint8, torch.int32, [0, 1, 2, 3]), (torch.int32, torch.int8, [0] * 4), (torch.int16, torch.int16, [0])],
)
def test_lanes_of_another_width_are_told_apart(element: torch.dtype, lane: torch.dtype, elements: list[int]) -> None:
    """Packed loads cover several elements; an element that is written in parts is written once."""
    source, target = torch.zeros(4, dtype=element), torch.zeros(4, dtype=element)
    count = max(1, source.element_size() // lane.itemsize)
    launch = lambda a, b: copy_masked[(1,)](a.view(lane), b.view(lane), count, BLOCK=4)  # noqa: E731
    _, memory = traced(launch, source=source, target=target)
    assert memory.loads["source"].elements.tolist() == elements
    assert memory.stores["target"].elements.tolist() == sorted(set(elements))


def test_scratch_is_nobodys_concern_and_guard_bytes_are() -> None:
    """A tensor is told from the memory around it; what only the candidate knows of is its own."""
    whole = torch.zeros(16)
    with tracing([whole[4:8]]) as recorder:
        copy_masked[(1,)](torch.ones(8), whole, 8, BLOCK=8)
    memory = resolve(recorder.trace(), {"mine": Region("mine", whole[4:8])})
    assert memory.stores["mine"].elements.tolist() == [0, 1, 2, 3]
    assert (memory.stores_beside - whole.data_ptr()).tolist() == [0, 4, 8, 12]
    assert len(memory.loads_beside) == 0


def test_an_address_in_nobodys_memory_is_not_touched() -> None:
    source = torch.ones(4)
    bits = {name: dict(vars(owner)) for name, owner in _owners().items()}
    with tracing([source]) as recorder, pytest.raises(Exception, match=r"load from address 0x"):
        copy_masked[(1,)](source, torch.zeros(1 << 20), 1 << 20, BLOCK=1 << 20)
    assert isinstance(recorder.stray, StrayAccess)
    assert (recorder.stray.width, recorder.stray.is_store) == (4, False)
    assert bits == {name: dict(vars(owner)) for name, owner in _owners().items()}, "the interpreter is as it was"


def _owners() -> dict[str, Any]:
    from triton.runtime import interpreter

    return {"builder": interpreter.InterpreterBuilder, "executor": interpreter.GridExecutor}


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((), ()), ((5,), (3,)), ((3, 4), (1, 3)), ((2, 3, 4), (40, 4, 1)), ((1, 4), (1_000_003, 2)), ((2, 0), (1, 1))],
)
def test_addresses_lead_back_to_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    tensor = torch.zeros(200, dtype=torch.int16).as_strided(shape, strides, 7)
    region = Region("tensor", tensor)
    numbers = np.arange(tensor.numel(), dtype=np.int64)
    index = np.unravel_index(numbers, shape) if shape else ()
    offsets = sum((np.asarray(i) * s for i, s in zip(index, strides, strict=True)), np.zeros_like(numbers))
    assert region.elements(tensor.data_ptr() + 2 * offsets).tolist() == numbers.tolist()
    others = np.setdiff1d(np.arange(-8, 150), offsets)
    assert (region.elements(tensor.data_ptr() + 2 * others) == -1).all()
