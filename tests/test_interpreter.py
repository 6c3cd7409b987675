"""On a CPU the kernels compute what the hardware computes: the interpreter's faults are repaired or avoided."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pageproof.optimized import interpreter
from pageproof.oracle import BatchShape, Case, Spec, judge
from pageproof.oracle.adapters.ours import Ours

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels are compiled here, not interpreted")

MIXED = BatchShape(query_lens=(1, 3, 18), seq_lens=(70, 40, 18), padding_tokens=2)


def test_the_probe_is_content() -> None:
    lines = interpreter.probe()
    assert len(lines) == 2
    assert "repaired" in lines[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    from triton import language as tl

    kind = {torch.bfloat16: tl.bfloat16, torch.float8_e4m3fn: tl.float8e4nv}[dtype]
    values = torch.linspace(-300.0, 300.0, 10_007)
    got = torch.from_numpy(interpreter.convert(values.numpy(), tl.float32, kind)).view(dtype)
    assert torch.equal(got.float(), values.to(dtype).float())


def test_the_probe_sees_an_unrepaired_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import language as tl

    right = interpreter.convert

    def truncating(data: Any, source: Any, target: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return right(data, source, target)
        return (np.ascontiguousarray(data).view(np.uint32) >> 16).astype(np.uint16)

    monkeypatch.setattr(interpreter, "convert", truncating)
    with pytest.raises(RuntimeError, match=r"computes wrongly here: casts to torch\.bfloat16$"):
        interpreter.probe()


@pytest.mark.parametrize(
    "spec",
    [
        Spec(dtype="bfloat16", sinks=True, alibi=True, softcap=3.0),
        Spec(dtype="bfloat16", kv_dtype="float8_e4m3fn", scales="head"),
        Spec(operation="mla_attention", dtype="bfloat16", num_kv_heads=1, group_size=4, rope_head_size=16),
        Spec(operation="update_kv_cache", dtype="bfloat16", kv_dtype="float8_e4m3fn", scales="tensor"),
        Spec(operation="merge_states", dtype="bfloat16"),
    ],
    ids=lambda spec: spec.operation + spec.kv_dtype,
)
def test_kernels_never_calculate_on_bit_patterns(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 and float8 values are patterns in the interpreter; adding two of them would give nonsense."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    patterns = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
    original = InterpreterBuilder.binary_op
    calls = []

    def checked(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        calls.append(op)
        assert lhs.dtype.scalar not in patterns, op
        assert rhs.dtype.scalar not in patterns, op
        return original(self, lhs, rhs, op)

    monkeypatch.setattr(InterpreterBuilder, "binary_op", checked)
    judge(Case(spec=spec, batch=MIXED), Ours()).require()
    assert calls


def test_a_launch_patches_the_language_once_for_each_module(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter as triton_interpreter

    patch, patched = triton_interpreter._patch_lang, []

    def recording(function: Any) -> Any:
        patched.append(function.__module__)
        return patch(function)

    monkeypatch.setattr(triton_interpreter, "_patch_lang", recording)
    judge(Case(spec=Spec(head_size=16, head_size_v=16), batch=MIXED), Ours(), torch.device("cpu")).require()
    assert 6 < len(patched) < 60  # of five launches, in which device functions are called hundreds of times
