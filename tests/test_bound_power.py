"""Seeded faults in a simulated kernel leave the bound, on the recipes made for them; the right kernel does not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pageproof.oracle import BatchShape, Case, NumericContract, Spec, judge
from pageproof.oracle.building.recipes import variant

from .simulated_kernel import Simulated

DECODE = BatchShape(query_lens=(1, 1, 1), seq_lens=(70, 129, 33))
PREFILL = BatchShape(query_lens=(5, 17, 2), seq_lens=(40, 17, 98), padding_tokens=2)
EMPTY_ROWS = BatchShape(query_lens=(5, 3), seq_lens=(3, 0))
SPEC = Spec(dtype="bfloat16", num_kv_heads=2, group_size=3, head_size=64, head_size_v=64)
FLOAT8 = "float8_e4m3fn"
ARITHMETIC = NumericContract(p_dtype="bfloat16", tile_keys=16, split_keys=32)

# What is wrong -> (the features without which it cannot show, the batches, the least share of cases that tell).
FAULTS: dict[str, tuple[dict[str, Any], tuple[BatchShape, ...], float]] = {
    "window one key wider": ({"sliding_window": 20}, (DECODE, PREFILL), 1.0),
    "window one key narrower": ({"sliding_window": 20}, (DECODE, PREFILL), 1.0),
    "causal mask off by one": ({}, (PREFILL,), 1.0),
    "last key dropped": ({}, (DECODE, PREFILL), 1.0),
    "first key of a tile dropped": ({}, (DECODE, PREFILL), 0.75),
    "sink doubled": ({"sinks": True}, (DECODE, PREFILL), 0.6),  # beside a needle a sink weighs little
    "sink left out": ({"sinks": True}, (DECODE, PREFILL), 0.6),
    "sink in every split": ({"sinks": True}, (DECODE, PREFILL), 0.6),
    "softcap left out": ({"softcap": 2.0}, (DECODE, PREFILL), 1.0),
    "softcap after the bias": ({"softcap": 2.0, "alibi": True}, (DECODE, PREFILL), 1.0),
    "ALiBi from key 0": ({"alibi": True, "sinks": True}, (DECODE, PREFILL), 1.0),
    "query bias one key late": ({"query_bias": "tree", "bias_width": 6}, (PREFILL,), 1.0),
    "no rescale of the accumulator": ({}, (DECODE, PREFILL), 1.0),
    "splits averaged": ({}, (DECODE, PREFILL), 1.0),
    "query heads mapped round robin": ({}, (DECODE, PREFILL), 1.0),
    "key scale squared": ({"kv_dtype": FLOAT8, "scales": "head"}, (DECODE, PREFILL), 1.0),
    "value scale left out": ({"kv_dtype": FLOAT8, "scales": "head"}, (DECODE, PREFILL), 1.0),
    "page of the neighbour": ({}, (DECODE, PREFILL), 1.0),
    "lse in base 2": ({}, (DECODE, PREFILL), 1.0),
    "last token not written": ({}, (DECODE, PREFILL), 1.0),
    "empty rows left as they were": ({}, (EMPTY_ROWS,), 1.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault: str) -> None:
    features, batches, least = FAULTS[fault]
    spec = replace(SPEC, **features)
    cases = [
        Case(spec=spec, batch=batches[seed % len(batches)], recipe=recipe, seed=seed)
        for recipe in ("one_hot", "needle")
        for seed in range(6)
    ]
    assert share_found(fault, cases) >= least


def test_running_maximum_that_starts_at_zero_shows_where_all_logits_are_low() -> None:
    fault = "running maximum starts at 0"
    draws = (Case(spec=SPEC, batch=DECODE, recipe="extreme", seed=seed) for seed in range(100))
    assert share_found(fault, [case for case in draws if variant(case) == "floor"]) == 1.0
    ordinary = [Case(spec=SPEC, batch=DECODE, seed=seed) for seed in range(3)]
    assert share_found(fault, ordinary) == 0.0  # in ordinary data it is no fault at all


UNDECLARED = {
    "weights rounded to bfloat16": NumericContract(p_dtype="bfloat16"),
    "sums cut off at 14 bits": NumericContract(u_score=2.0**-13, u_value=2.0**-13),
}


@pytest.mark.parametrize("arithmetic", UNDECLARED.values(), ids=UNDECLARED)
def test_arithmetic_that_was_not_declared_is_found(arithmetic: NumericContract) -> None:
    case = Case(spec=replace(SPEC, dtype="float32"), batch=BatchShape(query_lens=(1,), seq_lens=(300,)))
    declared = NumericContract()
    judge(case, Simulated(declared, tensor_core=True)).require()
    judge(case, Simulated(arithmetic, tensor_core=True)).require()
    assert judge(case, Misdeclared(arithmetic, tensor_core=True, declared=declared)).failed


@dataclass(frozen=True)
class Misdeclared(Simulated):
    """A simulated kernel that says something else about itself."""

    declared: NumericContract = field(default_factory=NumericContract)

    def contract(self, case: Case) -> NumericContract:
        return self.declared


def share_found(fault: str, cases: list[Case]) -> float:
    """Of these cases; the same kernel without the fault has to agree on each."""
    arithmetic = replace(ARITHMETIC, late_sink=fault != "sink in every split")
    found = 0
    for case in cases:
        judge(case, Simulated(arithmetic, seed=case.seed)).require()
        found += judge(case, Simulated(arithmetic, fault=fault, seed=case.seed)).failed
    return found / len(cases)
