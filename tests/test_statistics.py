"""Independent roundings: a right kernel keeps what they allow, and it shows what no hard bound can."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from pageproof.oracle import BatchShape, Case, Expected, NumericContract, Outcome, Spec, evaluate, judge
from pageproof.oracle.bound.statistics import CASE_Z, ROW_Z, Statistics, why_not_generic
from pageproof.oracle.building.problem import Problem
from pageproof.oracle.building.tensors import build
from pageproof.oracle.compare import compare
from pageproof.oracle.execution.eager import run

from .simulated_kernel import Simulated

FLOAT8 = "float8_e4m3fn"
LONG = BatchShape(query_lens=(1, 1, 4, 2), seq_lens=(1030, 2000, 1500, 1200))
BFLOAT16 = Case(spec=Spec(num_kv_heads=2, group_size=4), batch=LONG)
DECLARED = NumericContract(p_dtype="bfloat16", tile_keys=64)
STATISTICS = {"sub-gaussian", "row z", "case z"}


def draw(seed: int) -> tuple[Case, NumericContract, bool]:
    """A case that has statistics, an arithmetic to compute it in, and whether sums are a tensor core's."""
    rng = random.Random(seed)
    spec = Spec(
        operation=rng.choice(["attention", "attention", "mla_attention"]),
        dtype=rng.choice(["float32", "float16", "bfloat16"]),
        kv_dtype=rng.choice(["", "", FLOAT8]),
        causal=rng.random() < 0.7,
        sliding_window=rng.choice([None, None, 1, 33, 500]),
        softcap=rng.choice([None, None, 0.5, 20.0]),
        alibi=rng.random() < 0.25,
        sinks=rng.random() < 0.25,
        group_size=rng.choice([2, 5]),
        head_size=rng.choice([64, 128]),
        head_size_v=rng.choice([32, 64, 128]),
    )
    if spec.operation == "mla_attention":
        spec = replace(spec, num_kv_heads=1, rope_head_size=16)
    if spec.kv_dtype:
        spec = replace(spec, scales=rng.choice(["none", "tensor", "head"]))
    query_lens = [rng.choice([1, 2, 17]) for _ in range(rng.randint(1, 3))]
    tensor_core = rng.random() < 0.3
    longest = 6 if tensor_core else 10
    batch = BatchShape(
        query_lens=tuple(query_lens), seq_lens=tuple(n + int(2 ** rng.uniform(0, longest)) for n in query_lens)
    )
    u_sum = 2.0**-23 if tensor_core or spec.dtype != "float32" else 2.0**-24
    arithmetic = NumericContract(
        p_dtype=spec.dtype,
        u_score=u_sum,
        u_value=u_sum,
        tanh=rng.choice(["libm", "exp"]),
        exponent_roundings=rng.choice([1, 3]),
        tile_keys=rng.choice([16, 64]),
        split_keys=rng.choice([None, 64]),
        late_sink=rng.random() < 0.5,
        cast_denominator=rng.random() < 0.3,
    )
    return Case(spec=spec, batch=batch, recipe=rng.choice(["normal", "needle"]), seed=seed), arithmetic, tensor_core


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_kernel_within_its_declared_arithmetic_agrees(first: int) -> None:
    names = set()
    for seed in range(first, first + 40):
        case, arithmetic, tensor_core = draw(seed)
        assert why_not_generic(case, arithmetic) is None
        verdict = judge(case, Simulated(arithmetic, seed=seed, tensor_core=tensor_core))
        verdict.require()
        names |= {name for name, _ in verdict.ratios}
    assert names - {"out case z"} == {"out", "lse", "out sub-gaussian", "lse sub-gaussian", "out row z"}
    assert ("out case z" in names) == (first > 0)  # a case needs 64 counted rows for it


@pytest.mark.parametrize("seed", range(0, 24, 2))
def test_bounds_are_never_wider_than_the_hard_ones(seed: int) -> None:
    case, arithmetic, _ = draw(seed)
    expected = evaluate(build(case, "cpu"), arithmetic)
    assert expected.statistics is not None
    for name, bound in expected.statistics.bounds.items():
        assert (bound <= expected.bounds[name]).all()
        assert (bound >= 0).all()


def test_bound_of_many_keys_is_much_narrower() -> None:
    expected = evaluate(build(BFLOAT16, "cpu"), DECLARED)
    assert expected.statistics is not None
    for name, factor in (("out", 2.5), ("lse", 1.6)):
        assert expected.statistics.bounds[name].mean() * factor < expected.bounds[name].mean()


def test_logits_of_which_nothing_is_known_bound_nothing() -> None:
    problem = build(Case(spec=Spec(), batch=BatchShape(query_lens=(2,), seq_lens=(40,))), "cpu")
    rules = rules_with(problem, query_bias=torch.tensor([[1e30, 0.0], [0.0, 0.0]]))
    expected = evaluate(replace(problem, arguments={**problem.arguments, "rules": rules}), DECLARED)
    assert expected.statistics is not None
    assert expected.statistics.bounds["out"][0].isinf().all()
    assert expected.statistics.bounds["lse"][0].isinf().all()
    assert expected.statistics.bounds["out"][1].isfinite().all()


REASONS: list[tuple[Case, NumericContract, str]] = [
    (BFLOAT16.with_spec(operation="update_kv_cache"), DECLARED, "update_kv_cache: "),
    (BFLOAT16.with_spec(operation="mla_attention_decompressed"), DECLARED, "mla_attention_decompressed: "),
    (replace(BFLOAT16, recipe="one_hot"), DECLARED, "recipe one_hot: "),
    (replace(BFLOAT16, recipe="extreme"), DECLARED, "recipe extreme: "),
    (BFLOAT16.with_batch(shared_blocks=2), DECLARED, "shared_blocks: "),
    (BFLOAT16.with_batch(repeated_blocks=True), DECLARED, "repeated_blocks: "),
    (BFLOAT16.with_spec(out_dtype=FLOAT8), DECLARED, "out_dtype: "),
    (BFLOAT16, replace(DECLARED, tf32=True), "tf32: "),
    (BFLOAT16, replace(DECLARED, key_dtype="bfloat16"), "key_dtype: "),
]


@pytest.mark.parametrize(("case", "contract", "words"), REASONS, ids=[words for *_, words in REASONS])
def test_where_roundings_are_not_independent_nothing_is_asked(
    case: Case, contract: NumericContract, words: str
) -> None:
    assert why_not_generic(BFLOAT16, DECLARED) is None
    assert str(why_not_generic(case, contract)).startswith(words)


def test_what_equal_weights_have_in_common_is_counted() -> None:
    """Equal scores below a sink's are all rounded by the same part, and equal values do not let it cancel."""
    problem = build(BFLOAT16.with_spec(dtype="float32").with_batch(query_lens=(1,), seq_lens=(300,)), "cpu")
    arguments = {**problem.arguments, "rules": rules_with(problem, sinks=torch.full((8,), 2.768768))}
    for name, value in (("q", 0.0), ("v_cache", 1.0)):
        arguments[name] = torch.full_like(arguments[name], value)
    problem = replace(problem, arguments=arguments)
    kernel = Simulated(replace(DECLARED, late_sink=False))  # its weights: (1 + 0.49 / 2**7) / 16 before the cast
    actual = run(kernel, problem)
    ratios = dict(compare(actual, evaluate(problem, kernel.arithmetic), problem)[1])
    assert 0.5 < ratios["out sub-gaussian"] < 1


@dataclass(frozen=True)
class Planted(Simulated):
    """A simulated kernel in which another one writes what `where` says."""

    declared: NumericContract = DECLARED
    other: Simulated = field(default_factory=Simulated)
    changes: dict[str, Any] = field(default_factory=dict)  # of the other's rules
    take: Callable[[dict[str, Any], dict[str, Any]], None] = field(default=lambda own, others: None)

    def contract(self, case: Case) -> NumericContract:
        return self.declared

    def call(self, operation: str, arguments: dict[str, Any]) -> None:
        super().call(operation, arguments)
        others = {name: torch.empty_like(arguments[name]) for name in ("out", "lse")}
        rules = arguments["rules"]
        changed = {name: change(getattr(rules, name)) for name, change in self.changes.items()}
        self.other.call(operation, {**arguments, **others, "rules": replace(rules, **changed)})
        self.take(arguments, others)


def take_out(own: dict[str, Any], others: dict[str, Any]) -> None:
    own["out"].copy_(others["out"])


def take_one_row_of_out(own: dict[str, Any], others: dict[str, Any]) -> None:
    own["out"][1, 3] = others["out"][1, 3]


UNDECLARED = Planted(
    NumericContract(p_dtype="float16", tile_keys=64),
    declared=NumericContract(p_dtype="float16", tile_keys=64),
    other=Simulated(DECLARED),
    take=take_out,
)
WRONG_SCALE = Planted(
    DECLARED, other=Simulated(DECLARED), changes={"softmax_scale": lambda scale: scale * 1.01}, take=take_out
)
DROPPED_KEY = Planted(
    DECLARED, other=Simulated(DECLARED, fault="first key of a tile dropped"), take=take_one_row_of_out
)


@pytest.mark.parametrize(
    ("kernel", "least"), [(UNDECLARED, 4), (WRONG_SCALE, 4), (DROPPED_KEY, 3)], ids=["P", "scale", "one row's key"]
)
def test_fault_that_stays_inside_of_the_hard_bound_is_found(kernel: Planted, least: int) -> None:
    """P rounded to bfloat16 and not to float16, a scale 1% off in out, and 1 key of 2000 missing in 1 row of out."""
    found = 0
    for seed in range(4):
        case = replace(BFLOAT16, seed=seed)
        right = replace(kernel, seed=seed, take=lambda own, others: None)
        judge(case, right).require()
        verdict = judge(case, replace(kernel, seed=seed))
        found += verdict.check in STATISTICS
    assert found >= least


def test_verdict_explains_what_is_too_large_together() -> None:
    verdict = judge(replace(BFLOAT16, seed=1), replace(UNDECLARED, seed=1))
    assert verdict.outcome is Outcome.DIFFERS
    checks = [mismatch.check for mismatch in verdict.mismatches]
    assert verdict.check == checks[0] == "sub-gaussian"
    assert "row z" in checks
    text = verdict.explain()
    assert "inside of its hard bound, but outside of what independent roundings make likely" in text
    assert "together they are larger than the declared roundings can make them, within a row" in text
    assert "up to 1.5 allowed" in text
    assert "Rows (token, query head) above that: " in text


# By hand: 64 rows of 64 elements, all values 0, hard bounds 1, sigma 0.01.


def test_z_of_rows_and_of_the_case() -> None:
    problem, actual, expected = by_hand()
    actual["out"][:] = 0.01 * 1.04
    mismatches, ratios = compare(actual, expected, problem)
    assert mismatches == ()
    assert dict(ratios)["out row z"] == pytest.approx(1.04, rel=1e-6)
    assert dict(ratios)["out case z"] == pytest.approx(1.04, rel=1e-6)
    actual["out"] *= 0.5
    actual["out"][5, 1] = -0.01 * 1.6
    (row,) = compare(actual, expected, problem)[0]
    assert (row.check, row.index, row.count, row.bound) == ("row z", (5, 1), 1, ROW_Z)
    assert row.actual == pytest.approx(1.6, rel=1e-6)
    assert "query head 1" in row.where
    actual["out"][:] = 0.01 * 1.06
    (case,) = compare(actual, expected, problem)[0]
    assert (case.check, case.index, case.bound) == ("case z", (), CASE_Z)
    assert case.actual == pytest.approx(1.06, rel=1e-6)


def test_rows_that_are_not_counted_have_no_z() -> None:
    problem, actual, expected = by_hand()
    assert expected.statistics is not None
    actual["out"][5, 1] = 0.1
    assert [mismatch.check for mismatch in compare(actual, expected, problem)[0]] == ["row z", "case z"]
    expected.statistics.counted[5, 1] = False
    mismatches, ratios = compare(actual, expected, problem)
    assert mismatches == ()
    assert [name for name, _ in ratios] == ["out", "lse", "out sub-gaussian", "lse sub-gaussian"]  # 63 rows are too few


def test_narrower_bound_is_held() -> None:
    problem, actual, expected = by_hand()
    assert expected.statistics is not None
    actual["lse"][3, 0] = 0.6
    (mismatch,) = compare(actual, expected, problem)[0]
    assert (mismatch.output, mismatch.check, mismatch.index) == ("lse", "sub-gaussian", (3, 0))
    assert (mismatch.bound, mismatch.count) == (0.5, 1)
    expected.statistics.bounds["lse"][3, 0] = math.inf
    assert compare(actual, expected, problem)[0] == ()


def test_statistics_say_nothing_more_where_a_hard_bound_is_broken() -> None:
    problem, actual, expected = by_hand()
    actual["out"][5, 1] = 0.1
    actual["lse"][3, 0] = 2.0
    assert [(m.output, m.check) for m in compare(actual, expected, problem)[0]] == [("lse", "bound")]
    actual["out"][5, 1, 7] = math.nan
    mismatches, _ = compare(actual, expected, problem)
    assert [(m.output, m.outcome, m.check) for m in mismatches] == [
        ("out", Outcome.POISONED, "bound"),
        ("lse", Outcome.DIFFERS, "bound"),
    ]


def by_hand() -> tuple[Problem, dict[str, torch.Tensor], Expected]:
    case = Case(spec=Spec(dtype="float32", group_size=1), batch=BatchShape(query_lens=(32,), seq_lens=(32,)))
    actual = {"out": torch.zeros(32, 2, 64), "lse": torch.zeros(32, 2)}
    wide = {name: tensor.double() for name, tensor in actual.items()}
    statistics = Statistics(
        bounds={name: torch.full_like(tensor, 0.5) for name, tensor in wide.items()},
        sigma=torch.full_like(wide["out"], 0.01),
        counted=torch.ones(32, 2, dtype=torch.bool),
    )
    expected = Expected(
        values=wide,
        bounds={name: torch.ones_like(tensor) for name, tensor in wide.items()},
        dtypes=dict.fromkeys(wide, torch.float32),
        statistics=statistics,
    )
    return build(case, "cpu"), actual, expected


def rules_with(problem: Problem, **changes: Any) -> Any:
    return replace(problem.arguments["rules"], **changes)
