"""A byte that a candidate may not touch cannot change unnoticed, and what it may write can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof import reference
from pageproof.oracle.building import guards
from pageproof.oracle.building.poison import INTEGERS
from pageproof.oracle.building.tensors import Problem, build
from pageproof.oracle.candidate import NumericContract
from pageproof.oracle.case import CACHE_LAYOUTS, FLOAT8, BatchShape, Case, Spec
from pageproof.oracle.execution.eager import run, unzeroed_allocations


@pytest.fixture(autouse=True, params=["together", "one by one"])
def _sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small memories are looked at together, large ones one by one: here all of them are the one or the other."""
    if request.param == "one by one":
        monkeypatch.setattr(guards, "SMALL_BYTES", 0)


def make(operation: str = "attention", **changes: Any) -> Case:
    mla = {"num_kv_heads": 1, "rope_head_size": 8, "nope_head_size": 8} if "mla" in operation else {}
    spec = {"head_size": 16, "head_size_v": 16, "block_size": 8, "sinks": True, "alibi": True, **mla, **changes}
    batch = BatchShape(query_lens=(1, 9, 0), seq_lens=(20, 15, 0), padding_tokens=2, table_slack=1)
    return Case(spec=Spec(operation=operation, **spec), batch=batch)


def flip(tensor: Tensor, index: tuple[int, ...]) -> None:
    """Change the lowest bit of one element, NaN or not."""
    bits = tensor.view(INTEGERS[tensor.element_size()])
    bits[index] ^= 1


def beside(tensor: Tensor, offset: int) -> Tensor:
    """The element of the tensor's memory so many places from its first one."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("odd_strides", [False, True])
@pytest.mark.parametrize("kv_dtype", ["", FLOAT8])
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("q", (3, 1, 5)),
        ("q", (11, 0, 0)),
        ("k_cache", (0, 0, 0, 0)),
        ("k_cache", (2, 7, 1, 15)),
        ("v_cache", (1, 2, 0, 3)),
    ],
)
def test_an_input_that_changes_is_named(
    dtype: str, odd_strides: bool, kv_dtype: str, name: str, index: tuple[int, ...]
) -> None:
    problem = build(make(dtype=dtype, odd_strides=odd_strides, kv_dtype=kv_dtype))
    assert problem.guards.violations() is None
    flip(problem.arguments[name], index)
    found = problem.guards.violations()
    assert found is not None
    assert found.startswith(f"{name} is only to be read")
    assert f"[{', '.join(map(str, index))}]" in found
    flip(problem.arguments[name], index)
    assert problem.guards.violations() is None


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_v_is_told_from_k(layout: str) -> None:
    problem = build(make(cache_layout=layout))
    flip(problem.arguments["v_cache"], (3, 4, 1, 6))
    assert "v_cache is only to be read and changed: element [3, 4, 1, 6]" in str(problem.guards.violations())


@pytest.mark.parametrize("name", ["cu_seqlens_q", "seq_lens", "block_table"])
def test_the_batch_is_watched(name: str) -> None:
    problem = build(make())
    getattr(problem.arguments["batch"], name)[-1] += 1
    assert name in str(problem.guards.violations())


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes", "query_bias"])
def test_the_rules_are_watched(name: str) -> None:
    problem = build(make(query_bias="tree", bias_width=4))
    getattr(problem.arguments["rules"], name)[-1] = 0.5
    assert name in str(problem.guards.violations())


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_the_scales_are_watched(name: str) -> None:
    problem = build(make(q_dtype=FLOAT8, kv_dtype=FLOAT8, out_dtype=FLOAT8, scales="head"))
    getattr(problem.arguments["scales"], name)[-1] *= 2.0
    assert f"scales/{name}" in str(problem.guards.violations())


@pytest.mark.parametrize("odd_strides", [False, True])
@pytest.mark.parametrize("name", ["out", "lse"])
def test_outputs_may_be_written_and_what_is_around_them_may_not(odd_strides: bool, name: str) -> None:
    problem = build(make(odd_strides=odd_strides))
    output = problem.outputs[name]
    output.fill_(1.0)
    assert problem.guards.violations() is None
    end = sum((size - 1) * stride for size, stride in zip(output.shape, output.stride(), strict=True)) + 1
    for offset, words in (
        (-1, "1 elements before"),
        (end, "1 elements after the end of"),
        (end + 700, "701 elements after"),
    ):
        place = beside(output, offset)
        held = place.clone()
        place.fill_(0.0)
        found = str(problem.guards.violations())
        assert words in found
        assert f"{name} changed" in found
        place.view(INTEGERS[place.element_size()]).copy_(held.view(INTEGERS[place.element_size()]))
    assert problem.guards.violations() is None


def test_the_gaps_of_odd_strides_are_guarded() -> None:
    output = (problem := build(make(odd_strides=True))).outputs["out"]
    beside(output, output.stride(1) - 1).fill_(0.0)
    assert "between the rows of out" in str(problem.guards.violations())


@pytest.mark.parametrize("operation", ["update_kv_cache", "update_mla_cache"])
@pytest.mark.parametrize("odd_strides", [False, True])
def test_pools_may_be_written_in_an_update_and_what_is_around_them_may_not(operation: str, odd_strides: bool) -> None:
    problem = build(make(operation, odd_strides=odd_strides))
    for name, cache in problem.outputs.items():
        pristine = problem.pristine[name].view(INTEGERS[cache.element_size()])
        assert torch.equal(cache.view(pristine.dtype), pristine)
        flip(cache, (0,) * cache.dim())
        assert problem.guards.violations() is None
        assert not torch.equal(cache.view(pristine.dtype), pristine)
    cache = next(iter(problem.outputs.values()))
    flip(beside(cache, -3), (0,))
    assert "3 elements before" in str(problem.guards.violations())


def test_inputs_of_an_update_and_of_a_merge_are_watched() -> None:
    for operation, name in (("update_kv_cache", "value"), ("update_mla_cache", "k_pe"), ("merge_states", "lse_b")):
        problem = build(make(operation))
        flip(problem.arguments[name], (0,) * problem.arguments[name].dim())
        assert f"{name} is only to be read" in str(problem.guards.violations())


class Calls:
    """A candidate that does what it is made with."""

    name = "made for a test"

    def __init__(self, function: Any) -> None:
        self._function = function

    def declines(self, case: Case) -> str | None:
        return None

    def contract(self, case: Case) -> NumericContract:
        return NumericContract()

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        return self._function(operation, arguments)


def call_reference(operation: str, arguments: dict[str, Any]) -> Any:
    return getattr(reference, operation)(**arguments)


@pytest.mark.parametrize("operation", ["attention", "mla_attention", "update_kv_cache", "merge_states"])
def test_a_run_returns_the_outputs_by_name(operation: str) -> None:
    problem = build(make(operation))
    found = run(Calls(call_reference), problem)
    assert sorted(found) == (["k_cache", "v_cache"] if operation == "update_kv_cache" else ["lse", "out"])
    for name, output in problem.outputs.items():
        assert found[name].data_ptr() == output.data_ptr()
    if operation == "merge_states":
        assert not any(output.isnan().any() for output in found.values())
    assert problem.guards.violations() is None


def test_a_merge_that_returns_nothing_is_an_error() -> None:
    with pytest.raises(TypeError, match="merge_states: found NoneType"):
        run(Calls(lambda operation, arguments: None), build(make("merge_states")))


def test_what_a_candidate_allocates_was_never_zero() -> None:
    seen: list[Tensor] = []

    def allocate(operation: str, arguments: dict[str, Any]) -> None:
        seen.extend(torch.empty(9, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn))
        seen.append(torch.empty_like(arguments["out"]))
        seen.append(torch.empty(9, dtype=torch.int32))

    run(Calls(allocate), build(make()))
    assert all(scratch.double().isnan().all() for scratch in seen[:4])
    assert (seen[4] == 2**31 - 1).all()


@pytest.mark.parametrize("enabled", [False, True])
def test_torch_is_left_as_it_was_found_after_an_error_too(enabled: bool) -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        )

    def fail(problem: Problem) -> None:
        with unzeroed_allocations():
            assert state() == (True, True, True)
            raise RuntimeError("the candidate's own")

    usual = state()
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = not enabled  # type: ignore[attr-defined]
    try:
        before = state()
        with pytest.raises(RuntimeError, match="the candidate's own"):
            fail(build(make()))
        assert state() == before
    finally:
        torch.use_deterministic_algorithms(usual[0], warn_only=usual[1])
        torch.utils.deterministic.fill_uninitialized_memory = usual[2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("operation", ["attention", "update_kv_cache", "merge_states"])
def test_every_byte_is_put_back(operation: str) -> None:
    problem = build(make(operation))
    watches = problem.guards.watches
    built = [watch.memory.clone() for watch in watches]
    for watch in watches:
        watch.memory.bitwise_not_()
    problem.guards.put_back()
    assert all(watch.memory.equal(before) for watch, before in zip(watches, built, strict=True))


@pytest.mark.parametrize("joined", [0, guards.JOINED_BYTES])
def test_one_byte_of_one_pair_is_a_difference(joined: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "JOINED_BYTES", joined)
    shapes = (
        ((24,), torch.uint8),
        ((5,), torch.uint8),
        ((0,), torch.uint8),
        ((7,), torch.int16),
        ((3, 4), torch.int32),
    )
    pairs = [(torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype)) for shape, dtype in shapes]
    assert not guards.differ(pairs)
    assert not guards.differ([])
    for found, _ in pairs:
        for element in (0, -1) if found.numel() else ():
            found.view(-1)[element] = 0
            assert guards.differ(pairs)
            found.view(-1)[element] = 1
