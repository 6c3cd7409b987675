"""judge, from a case to a verdict: what a candidate may do wrong, and that it never sees the answer."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from pageproof.oracle import BatchShape, Case, NumericContract, Outcome, Spec, judge, questions
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.building.guards import Guards
from pageproof.oracle.case import OPERATIONS, RECIPES

FLOAT8 = "float8_e4m3fn"
BATCH = BatchShape(query_lens=(1, 5, 0, 3), seq_lens=(33, 17, 0, 2), padding_tokens=2)
ATTENTION = Case(spec=Spec(dtype="float32"), batch=BATCH)
UPDATE = Case(spec=Spec(operation="update_kv_cache"), batch=BATCH)


@dataclass
class Spoiled(Reference):
    """The reference, and then something that it should not have done."""

    spoil: Any
    name: str = "spoiled"

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        returned = super().call(operation, arguments)
        return self.spoil(arguments, returned)


def spec_of(operation: str, **fields: Any) -> Spec:
    sizes: dict[str, Any] = {}
    if "mla" in operation:
        sizes = {"num_kv_heads": 1, "group_size": 4, "head_size": 64, "head_size_v": 32, "rope_head_size": 16}
    if operation == "mla_attention_decompressed":
        sizes["nope_head_size"] = 32
    return Spec(operation=operation, **sizes, **fields)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_reference_agrees_with_itself(operation: str, recipe: str) -> None:
    features = {
        "softcap": 20.0,
        "alibi": True,
        "sinks": True,
        "sliding_window": 9,
        "query_bias": "tree",
        "bias_width": 3,
    }
    for number, dtype in enumerate(("float32", "float16", "bfloat16")):
        judge(
            Case(spec=spec_of(operation, dtype=dtype), batch=BATCH, recipe=recipe, seed=number), Reference()
        ).require()
        spec = spec_of(operation, dtype=dtype, **features)
        judge(Case(spec=spec, batch=BATCH, recipe=recipe, seed=number), Reference()).require()
        if operation != "merge_states":
            spec = spec_of(operation, dtype=dtype, kv_dtype=FLOAT8, scales="head")
            judge(Case(spec=spec, batch=BATCH, recipe=recipe, seed=number), Reference()).require()


@pytest.mark.parametrize("operation", OPERATIONS[:3])
def test_reference_agrees_with_itself_in_float8_out(operation: str) -> None:
    spec = spec_of(operation, q_dtype=FLOAT8, kv_dtype=FLOAT8, out_dtype=FLOAT8, scales="tensor")
    for recipe in RECIPES:
        judge(Case(spec=spec, batch=BATCH, recipe=recipe), Reference()).require()


def test_verdict_of_agreement_carries_the_ratios() -> None:
    verdict = judge(ATTENTION, Reference())
    assert verdict.outcome is Outcome.AGREES
    names = ["out", "lse", "out sub-gaussian", "lse sub-gaussian"]  # and no z: there are too few rows
    assert [name for name, _ in verdict.ratios] == names
    designed = judge(replace(ATTENTION, recipe="one_hot"), Reference())
    assert [name for name, _ in designed.ratios] == names[:2]
    assert all(0 <= ratio <= 1 for _, ratio in verdict.ratios)


def test_decline_stops_before_anything_is_built() -> None:
    class Declining(Reference):
        def declines(self, case: Case) -> str | None:
            return "no softcap"

        def call(self, operation: str, arguments: dict[str, Any]) -> Any:
            raise AssertionError("called although it declined")

    verdict = judge(ATTENTION, Declining())
    assert (verdict.outcome, verdict.reason, verdict.failed) == (Outcome.DECLINED, "no softcap", False)


@pytest.mark.parametrize(("error", "is_its_own"), [(torch.OutOfMemoryError(), True), (RuntimeError("lost"), False)])
def test_memory_for_its_own_guards_is_no_fault_of_the_candidate(
    error: Exception, is_its_own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(guards: Guards) -> str | None:
        raise error

    monkeypatch.setattr(Guards, "violations", fail)
    if is_its_own:
        with pytest.raises(torch.OutOfMemoryError):
            judge(ATTENTION, Reference())
    else:
        assert judge(ATTENTION, Reference()).outcome is Outcome.CRASHED


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), AssertionError("boom"), MemoryError()]
)
def test_exception_is_a_crash_with_the_last_lines_of_its_traceback(error: Exception) -> None:
    def spoil(arguments: dict[str, Any], returned: Any) -> Any:
        raise error

    verdict = judge(ATTENTION, Spoiled(spoil))
    assert verdict.outcome is Outcome.CRASHED
    assert verdict.reason.splitlines()[-1].startswith(type(error).__name__)
    assert str(error) in verdict.reason
    assert "in spoil" in verdict.reason
    assert verdict.mismatches == ()


def test_interrupt_passes_through() -> None:
    def spoil(arguments: dict[str, Any], returned: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(ATTENTION, Spoiled(spoil))


def put(name: str, value: float, *index: int) -> Any:
    def spoil(arguments: dict[str, Any], returned: Any) -> Any:
        arguments[name][index] = value
        return returned

    return spoil


SPOILED = [
    (ATTENTION, put("out", 1.0, 3, 2, 5), Outcome.DIFFERS),
    (ATTENTION, put("out", float("nan"), 3, 2, 5), Outcome.POISONED),
    (ATTENTION, put("out", float("inf"), 0, 0, 0), Outcome.POISONED),
    (ATTENTION, put("lse", 0.0, 4, 1), Outcome.DIFFERS),
    (ATTENTION, put("out", 1e-30, 10, 0, 0), Outcome.DIFFERS),  # a padding row
    (ATTENTION, put("lse", -1e30, 10, 0), Outcome.DIFFERS),
    (ATTENTION, put("q", 0.0, 0, 0, 0), Outcome.OUT_OF_BOUNDS),
    (ATTENTION, put("k_cache", 7.0, 0, 0, 0, 0), Outcome.OUT_OF_BOUNDS),
    (UPDATE, put("k_cache", 1.0, 0, 0, 0, 0), Outcome.DIFFERS),  # the null block, which no row is mapped to
    (UPDATE, put("key", 1.0, 0, 0, 0), Outcome.OUT_OF_BOUNDS),
]


@pytest.mark.parametrize(("case", "spoil", "outcome"), SPOILED)
def test_what_a_candidate_may_do_wrong(case: Case, spoil: Any, outcome: Outcome) -> None:
    judge(case, Reference()).require()
    verdict = judge(case, Spoiled(spoil))
    assert verdict.outcome is outcome
    assert verdict.failed
    assert verdict.explain()


def test_output_that_is_never_written() -> None:
    class Idle(Reference):
        def call(self, operation: str, arguments: dict[str, Any]) -> Any:
            return None

    verdict = judge(ATTENTION, Idle())
    assert verdict.outcome is Outcome.UNWRITTEN
    assert [mismatch.output for mismatch in verdict.mismatches] == ["out", "lse"]
    assert all(mismatch.count == mismatch.total for mismatch in verdict.mismatches)
    assert judge(UPDATE, Idle()).outcome is Outcome.DIFFERS


def test_write_beside_an_output_is_out_of_bounds_even_if_all_agrees() -> None:
    def spoil(arguments: dict[str, Any], returned: Any) -> Any:
        out = arguments["out"]
        out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(3.0)

    verdict = judge(ATTENTION, Spoiled(spoil))
    assert verdict.outcome is Outcome.OUT_OF_BOUNDS
    assert verdict.mismatches == ()
    assert "before out" in verdict.reason


def test_merge_that_returns_the_wrong_dtype_or_nothing() -> None:
    case = Case(spec=Spec(operation="merge_states", dtype="bfloat16"), batch=BATCH)
    verdict = judge(case, Spoiled(lambda arguments, returned: (returned[0].float(), returned[1])))
    assert verdict.outcome is Outcome.DIFFERS
    assert "out is float32, expected bfloat16" in verdict.explain()
    verdict = judge(case, Spoiled(lambda arguments, returned: None))
    assert verdict.outcome is Outcome.CRASHED


def test_candidate_runs_before_the_answer_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    evaluate = questions.evaluate_together

    def watched(*args: Any, **named: Any) -> Any:
        order.append("evaluate")
        return evaluate(*args, **named)

    monkeypatch.setattr(questions, "evaluate_together", watched)
    judge(ATTENTION, Spoiled(lambda arguments, returned: order.append("call")))
    assert order == ["call", "evaluate"]


def test_importing_the_oracle_brings_in_no_torch() -> None:
    code = "import sys, pageproof.oracle; print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_unknown_name_in_the_oracle_is_an_attribute_error() -> None:
    import pageproof.oracle

    with pytest.raises(AttributeError, match="has no attribute 'jugde'"):
        _ = pageproof.oracle.jugde


def test_bound_follows_the_declared_contract() -> None:
    """The same answer, judged by what two kernels say of themselves."""
    case = Case(spec=Spec(dtype="float32"), batch=BatchShape(query_lens=(1,), seq_lens=(40,)))

    class Rounding(Reference):
        def __init__(self, p_dtype: str) -> None:
            self.p_dtype = p_dtype

        def contract(self, case: Case) -> NumericContract:
            return NumericContract(p_dtype=self.p_dtype)

        def call(self, operation: str, arguments: dict[str, Any]) -> Any:
            super().call(operation, arguments)
            arguments["out"].mul_(1 + 2.0**-12)

    assert judge(case, Rounding("float32")).outcome is Outcome.DIFFERS
    assert judge(case, Rounding("bfloat16")).outcome is Outcome.AGREES


def test_a_contract_that_is_none_or_raises_is_the_candidates_fault() -> None:
    class Wrong(Reference):
        def contract(self, case: Case) -> NumericContract:
            return None  # type: ignore[return-value]

    class Raising(Reference):
        def contract(self, case: Case) -> NumericContract:
            return NumericContract(p_dtype="fp16")

    for candidate, words in ((Wrong(), "contract: found NoneType"), (Raising(), "p_dtype: found 'fp16'")):
        verdict = judge(ATTENTION, candidate)
        assert verdict.outcome is Outcome.CRASHED
        assert words in verdict.reason


def test_a_case_that_means_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^case: "):
        judge(ATTENTION.with_spec(right_window=3, causal=True), Reference())
