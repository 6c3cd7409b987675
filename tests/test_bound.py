"""A kernel that keeps to the arithmetic it declares never leaves the bound, and the bound is not much wider."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
import torch

from pageproof.oracle import BatchShape, Case, NumericContract, Spec, evaluate, judge
from pageproof.oracle.bound.evaluate import stored
from pageproof.oracle.building.tensors import build
from pageproof.oracle.case_rules import why_invalid
from pageproof.reference import Scales

from .simulated_kernel import Simulated
from .simulated_merge import SimulatedMerge

FLOAT8 = "float8_e4m3fn"
RECIPES = ("normal", "needle", "one_hot", "extreme", "extreme")


def draw(seed: int) -> tuple[Case, NumericContract]:
    """A small case over all features of the attention operations, and an arithmetic to compute it in."""
    rng = random.Random(seed)

    def coin(share: float = 0.4) -> bool:
        return rng.random() < share

    operation = rng.choice(["attention"] * 4 + ["mla_attention", "mla_attention_decompressed"])
    spec = Spec(
        operation=operation,
        dtype=rng.choice(["float32", "float16", "bfloat16"]),
        kv_dtype=FLOAT8 if coin(0.25) else "",
        out_dtype=FLOAT8 if coin(0.15) else "",
        causal=coin(0.7),
        sliding_window=rng.choice([1, 7, 33]) if coin() else None,
        softcap=rng.choice([0.5, 20.0, 50.0]) if coin() else None,
        alibi=coin(),
        sinks=coin(),
        block_size=rng.choice([1, 8, 16, 24]),
        group_size=rng.choice([1, 2, 5]),
        head_size=rng.choice([64, 128]),
        head_size_v=rng.choice([16, 64]),
    )
    if operation != "attention":
        spec = replace(spec, num_kv_heads=1, rope_head_size=16)
    if operation == "mla_attention_decompressed":
        spec = replace(spec, nope_head_size=32)
    if spec.kv_dtype or spec.out_dtype:
        spec = replace(spec, q_dtype=spec.kv_dtype if coin() else "", scales=rng.choice(["none", "tensor", "head"]))
    if not spec.causal and coin():
        spec = replace(spec, right_window=rng.choice([0, 5]))
    if coin():
        spec = replace(spec, query_bias=rng.choice(["tree", "dense"]), bias_width=rng.choice([1, 4, 20]))
    query_lens = [rng.choice([1, 1, 2, 5, 17]) for _ in range(rng.randint(1, 3))]
    seq_lens = [max(0, n + rng.choice([-2, 0, 0, 1, 15, 16, 31, 33, 100, 300])) for n in query_lens]
    batch = BatchShape(query_lens=tuple(query_lens), seq_lens=tuple(seq_lens), padding_tokens=rng.choice([0, 2]))
    projected = spec.dtype if operation == "mla_attention_decompressed" else ""
    arithmetic = NumericContract(
        p_dtype=spec.dtype,
        key_dtype=projected,
        value_dtype=projected,
        tanh=rng.choice(["libm", "exp"]),
        exponent_roundings=rng.choice([1, 3]),
        tile_keys=rng.choice([16, 32, 64]),
        split_keys=rng.choice([None, None, 32, 64]),
        late_sink=coin(0.5),
        cast_denominator=coin(0.3),
    )
    return Case(spec=spec, batch=batch, recipe=rng.choice(RECIPES), seed=seed), arithmetic


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_kernel_within_its_declared_arithmetic_agrees(first: int) -> None:
    for seed in range(first, first + 100):
        case, arithmetic = draw(seed)
        assert why_invalid(case) is None
        judge(case, Simulated(arithmetic, seed=seed)).require()


@pytest.mark.parametrize("bits", [24, 14])
def test_sums_that_a_tensor_core_cuts_off_agree(bits: int) -> None:
    for seed in range(1000, 1060):
        case, arithmetic = draw(seed)
        arithmetic = replace(arithmetic, u_score=2.0 ** (1 - bits), u_value=2.0 ** (1 - bits))
        judge(case, Simulated(arithmetic, seed=seed, tensor_core=True)).require()


def test_bound_is_not_much_wider_than_the_errors() -> None:
    """Short rows in 16 bits, whose errors are little more than the roundings of P and of the output.

    Both are seldom at their worst together: these draws have a median of 0.38 of the bound and a largest of 0.45.
    The limits lie so close below that a bound half as wide again fails.
    """
    spec = Spec(dtype="bfloat16")
    ratios = []
    for seed in range(40):
        case = Case(spec=spec, batch=BatchShape(query_lens=(1, 4), seq_lens=(40, 60)), seed=seed)
        verdict = judge(case, Simulated(NumericContract(p_dtype="bfloat16"), seed=seed))
        ratios.append(dict(verdict.ratios)["out"])
    assert 0.25 < statistics.median(ratios) < 1
    assert max(ratios) > 0.4


def test_scale_of_projected_values_is_counted_where_they_cancel() -> None:
    """A latent's scale rounds every W_UV c once: relative to the value's own size, not to the smaller answer's."""
    spec = Spec(
        operation="mla_attention_decompressed",
        dtype="float32",
        kv_dtype=FLOAT8,
        num_kv_heads=1,
        rope_head_size=16,
        nope_head_size=32,
    )
    problem = build(Case(spec=spec, batch=BatchShape(query_lens=(1,), seq_lens=(1,))), "cpu")
    silent = {name: torch.zeros_like(problem.arguments[name]) for name in ("q_nope", "q_pe")}
    bounds, values = {}, {}
    for name, weights in (("signed", problem.arguments["w_uv"]), ("sizes", problem.arguments["w_uv"].abs())):
        for scale in (None, torch.tensor(1.0)):
            arguments = {**problem.arguments, **silent, "w_uv": weights, "scales": Scales(k=scale)}
            if name == "sizes":
                arguments["latent_cache"] = arguments["latent_cache"].float().abs().to(torch.float8_e4m3fn)
            expected = evaluate(replace(problem, arguments=arguments), NumericContract())
            bounds[name, scale is None], values[name] = expected.bounds["out"], expected.values["out"]
    growth = bounds["signed", False] - bounds["signed", True]
    assert (growth >= 2 * 2.0**-24 * values["sizes"]).all()
    assert (values["signed"].abs() < 0.5 * values["sizes"]).any()


def test_rows_that_need_no_arithmetic_are_exact() -> None:
    """Nothing visible, padding, and a sink of +inf: bound 0, but for a sink's logit in lse."""
    batch = BatchShape(query_lens=(3, 2), seq_lens=(1, 0), padding_tokens=2)
    problem = build(Case(spec=Spec(sinks=True), batch=batch), "cpu")
    sinks = torch.tensor([math.inf, 0.5, -math.inf, 2.0])
    arguments = {**problem.arguments, "rules": replace(problem.arguments["rules"], sinks=sinks)}
    expected = evaluate(replace(problem, arguments=arguments), NumericContract())
    empty = [0, 1, 3, 4]  # rows of p < 0, of a request without keys
    for row in empty:
        assert expected.values["lse"][row].tolist() == pytest.approx(sinks.tolist(), abs=0)
    assert (expected.values["lse"][5:] == -math.inf).all()
    exact = [*empty, 5, 6]
    assert (expected.values["out"][exact] == 0).all()
    assert (expected.bounds["out"][exact] == 0).all()
    assert (expected.values["out"][2, 0] == 0).all()  # a visible key beside a sink of +inf
    assert (expected.bounds["out"][2, 0] == 0).all()
    assert expected.bounds["lse"][:, [0, 2]][exact].eq(0).all()
    assert expected.bounds["lse"][empty].max() <= 4 * 2.0**-24 * 2.0
    assert expected.bounds["lse"][2, 1] > 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merge_in_float32_agrees(dtype: str) -> None:
    for seed in range(60):
        spec = Spec(operation="merge_states", dtype=dtype, sinks=seed % 2 == 0)
        batch = BatchShape(query_lens=(3, 1), seq_lens=(9, 2), padding_tokens=seed % 3)
        recipe = RECIPES[seed % len(RECIPES)]
        judge(Case(spec=spec, batch=batch, recipe=recipe, seed=seed), SimulatedMerge(seed=seed)).require()


@pytest.mark.parametrize(
    "fault", ["weights not normalised", "weights swapped", "lse of the larger part", "lse in base 2"]
)
def test_wrong_merge_is_found(fault: str) -> None:
    case = Case(spec=Spec(operation="merge_states"), batch=BatchShape(query_lens=(5,), seq_lens=(5,)))
    assert judge(case, SimulatedMerge(fault=fault)).failed


def test_stored_float8_counts_units_of_the_format_and_saturates() -> None:
    value = torch.tensor([10.0, 1000.0, -1000.0, 0.0], dtype=torch.float64)
    bound = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    value, bound = stored(value, bound, torch.float8_e4m3fn, torch.tensor(2.0))
    assert value.tolist() == [5.0, 448.0, -448.0, 0.0]
    assert bound[0] == pytest.approx(0.5 + 5.5 / 16 + 2.0**-10, rel=1e-6)
    assert bound[3] == 0


def test_stored_float16_knows_where_it_overflows() -> None:
    value = torch.tensor([65600.0, 65519.0, -65600.0, 65000.0], dtype=torch.float64)
    bound = torch.full_like(value, 10.0)
    value, bound = stored(value, bound, torch.float16)
    assert value.tolist() == [math.inf, 65519.0, -math.inf, 65000.0]
    assert bound[:3].tolist() == [0, math.inf, 0]
    assert bound[3] == pytest.approx(10 + 65010 * 2.0**-11, rel=1e-6)


def test_contract_with_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^tanh: found 'fast', expected one of libm, exp, series, approx$"):
        NumericContract(tanh="fast")
    with pytest.raises(ValueError, match=r"^p_dtype: found 'int8', expected one of float32, float16, bfloat16, float8"):
        NumericContract(p_dtype="int8")


@pytest.mark.parametrize(("bias", "says"), [(-1e30, "much"), (1e30, "nothing")])
def test_logit_that_is_not_known_spoils_its_row_only_if_it_may_weigh(bias: float, says: str) -> None:
    """A float32 logit of 1e30 is known to within 1e23; at -1e30 it weighs nothing wherever it is."""
    problem = build(Case(spec=Spec(), batch=BatchShape(query_lens=(2,), seq_lens=(40,))), "cpu")
    rules = replace(problem.arguments["rules"], query_bias=torch.tensor([[bias, 0.0], [0.0, 0.0]]))
    expected = evaluate(replace(problem, arguments={**problem.arguments, "rules": rules}), NumericContract())
    assert (expected.bounds["out"][1] < 0.1).all()
    assert (expected.bounds["out"][0] < 0.1).all() == (says == "much")
    assert expected.bounds["out"][0].isinf().all() == (says == "nothing")
    assert expected.bounds["lse"][0].isinf().all() == (says == "nothing")
