"""What a launch is remembered by is at least as fine as what this installation of Triton compiles a kernel for."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pageproof.optimized import launching
from pageproof.optimized.launching import describe


class Scaled(NamedTuple):
    tensor: Tensor | None
    stride: int | None


class Group(NamedTuple):
    tensor: Tensor | None
    stride: int | None
    factor: float | None
    scaled: Scaled


def kernel(group, other, count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Never compiled."""


MEMORY = torch.zeros(64)
TENSORS = (MEMORY, MEMORY[1:], MEMORY[4:], MEMORY.half(), MEMORY.to(torch.float8_e4m3fn), torch.zeros(0), None)
INTEGERS = (-(2**31) - 1, -(2**31), -16, -1, 0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**63 - 1, None)
FLOATS = (0.0, 1.0, 16.0, float("inf"), None)


@pytest.mark.parametrize("changed", ["tensors", "integers", "numbers", "floats"])
def test_one_description_is_one_binary(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "IS_REMEMBERED", True)
    function: Any = JITFunction(kernel, do_not_specialize=["count"])
    bind = create_function_from_signature(function.signature, function.params, make_backend(GPUTarget("cuda", 90, 32)))
    choices: dict[str, tuple[tuple[Any, ...], ...]] = {
        "tensors": (TENSORS, (64,), FLOATS[:1], TENSORS, (2,), TENSORS[:2], (3,)),
        "integers": ((MEMORY,), INTEGERS, FLOATS[:1], (None,), INTEGERS, (MEMORY,), (3,)),
        "numbers": ((MEMORY,), (64,), FLOATS[:1], (None,), (2,), (MEMORY,), INTEGERS),
        "floats": ((MEMORY,), (1, 64), FLOATS, (None,), (2,), (MEMORY,), (1, 3)),
    }
    compiled: dict[Any, str] = {}
    for tensor, stride, factor, inner, inner_stride, other, count in itertools.product(*choices[changed]):
        groups = (Group(tensor, stride, factor, Scaled(inner, inner_stride)), other)
        _, specialisation, _ = bind(*groups, count, SIZE=3)
        described = describe(groups, (count,))
        assert compiled.setdefault(described, str(specialisation)) == str(specialisation), described
    assert len(set(compiled.values())) > 1
