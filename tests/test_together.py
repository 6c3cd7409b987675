"""The steps of a case evaluated as one problem: each step's answer, bounds and statistics are those it has alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof.oracle import BatchShape, Case, Spec
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.bound.evaluate import Expected, evaluate, evaluate_together
from pageproof.oracle.bound.statistics import why_not_generic
from pageproof.oracle.building.problem import Problem
from pageproof.oracle.building.tensors import build
from pageproof.oracle.candidate import NumericContract
from pageproof.oracle.case import FLOAT8
from pageproof.oracle.compare import compare, ratios_by_case
from pageproof.oracle.execution.eager import run
from pageproof.oracle.replays.sequence import steps_of

BATCH = BatchShape(query_lens=(1, 5, 0, 3), seq_lens=(33, 17, 0, 2), padding_tokens=2)
SPEC = Spec(dtype="float32", num_kv_heads=2, group_size=2, head_size=16, head_size_v=24)
MLA = Spec(operation="mla_attention", num_kv_heads=1, group_size=3, head_size=16, rope_head_size=16)
DECOMPRESSED = replace(MLA, operation="mla_attention_decompressed", nope_head_size=16, head_size_v=24)
FLOATS8 = {"kv_dtype": FLOAT8, "q_dtype": FLOAT8, "out_dtype": FLOAT8}
CONTRACT = NumericContract(p_dtype="bfloat16", tile_keys=64, split_keys=256)

FEATURES = {
    "plain": {},
    "bfloat16": {"dtype": "bfloat16"},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "window": {"sliding_window": 5},
    "both windows": {"causal": False, "sliding_window": 7, "right_window": 2},
    "not causal": {"causal": False},
    "softcap": {"softcap": 2.0},
    "tree": {"query_bias": "tree", "bias_width": 4},
    "dense bias": {"query_bias": "dense", "bias_width": 3, "alibi": True, "sinks": True, "softcap": 15.0},
    "float8": {**FLOATS8, "scales": "tensor"},
    "float8 by head": {**FLOATS8, "scales": "head", "sinks": True},
    "float8 cache": {"kv_dtype": FLOAT8, "scales": "tensor"},
    "odd strides": {"odd_strides": True, "query_bias": "dense", "bias_width": 3},
}


def problems_of(case: Case, device: str = "cpu") -> list[Problem]:
    """Its distinct steps: of both buckets, an empty one and a full one among them, all with padding."""
    steps = steps_of(case)
    return [build(step.case, device) for step in dict.fromkeys((*steps.captured, *steps.replayed))]


def compared(found: Expected, wanted: Expected) -> None:
    assert found.dtypes == wanted.dtypes
    for name, value in wanted.values.items():
        torch.testing.assert_close(found.values[name], value, rtol=1e-12, atol=1e-13)
        near(found.bounds[name], wanted.bounds[name])
    assert (found.statistics is None) == (wanted.statistics is None)
    if found.statistics is not None and wanted.statistics is not None:
        counted = wanted.statistics.counted
        assert found.statistics.counted.equal(counted)
        near(found.statistics.sigma[counted], wanted.statistics.sigma[counted])
        for name, bound in wanted.statistics.bounds.items():
            near(found.statistics.bounds[name], bound)


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0.0)


def apart(problems: Sequence[Problem], whole: Expected) -> list[Expected]:
    parts, first = [], 0
    for problem in problems:
        parts.append(whole.rows(first, first + problem.case.batch.num_tokens))
        first += problem.case.batch.num_tokens
    assert all(len(value) == first for value in whole.values.values())
    return parts


def generic(problem: Problem) -> bool:
    return why_not_generic(problem.case, CONTRACT) is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", ["NHD", "interleaved", "transposed"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("spec", [SPEC, MLA, DECOMPRESSED], ids=lambda spec: spec.operation)
def test_every_step_has_the_answer_that_it_has_alone(
    spec: Spec, features: dict[str, Any], layout: str, device: str
) -> None:
    if spec.is_mla:
        layout = "sliced" if layout == "interleaved" else "NHD"
    for seed in range(2):
        case = Case(spec=replace(spec, cache_layout=layout, **features), batch=BATCH, mode="full", seed=seed)
        problems = problems_of(case, device)
        assert len(problems) >= 5
        whole = evaluate_together(problems, CONTRACT, generic=generic(problems[0]))
        for problem, found in zip(problems, apart(problems, whole), strict=True):
            compared(found, evaluate(problem, CONTRACT))


@pytest.mark.parametrize("recipe", ["needle", "extreme", "census", "tagged", "cancel"])
def test_designed_values_too(recipe: str) -> None:
    case = Case(spec=replace(SPEC, sinks=True, alibi=recipe != "census"), batch=BATCH, mode="full", recipe=recipe)
    problems = problems_of(case)
    whole = evaluate_together(problems, CONTRACT, generic=generic(problems[0]))
    for problem, found in zip(problems, apart(problems, whole), strict=True):
        compared(found, evaluate(problem, CONTRACT))


def test_merges_together() -> None:
    problems = problems_of(Case(spec=replace(SPEC, operation="merge_states"), batch=BATCH, mode="full", seed=3))
    whole = evaluate_together(problems, CONTRACT, generic=False)
    for problem, found in zip(problems, apart(problems, whole), strict=True):
        compared(found, evaluate(problem, CONTRACT))


def test_nothing_is_changed() -> None:
    problems = problems_of(Case(spec=replace(SPEC, sinks=True), batch=BATCH, mode="full"))
    evaluate_together(problems, CONTRACT, generic=True)
    assert all(problem.guards.violations() is None for problem in problems)


LONG = BatchShape(query_lens=(1, 40, 0, 3), seq_lens=(33, 400, 0, 60))


def test_every_case_has_the_ratios_that_it_has_alone() -> None:
    problems = problems_of(Case(spec=replace(SPEC, head_size_v=64), batch=LONG, mode="full"))
    outputs = [run(Reference(), problem) for problem in problems]
    whole = evaluate_together(problems, CONTRACT, generic=True)
    num_tokens = [problem.case.batch.num_tokens for problem in problems]
    joined = {name: torch.cat([actual[name] for actual in outputs]) for name in ("out", "lse")}
    found = ratios_by_case(joined, whole, num_tokens)
    for problem, actual, ratios in zip(problems, outputs, found, strict=True):
        mismatches, wanted = compare(actual, evaluate(problem, CONTRACT), problem)
        assert not mismatches
        assert ratios is not None
        assert dict(ratios) == pytest.approx(dict(wanted), rel=1e-6)
    assert any(dict(ratios or ()).get("out case z", 0.0) > 0 for ratios in found)
    wrong = int(joined["lse"].isfinite().any(dim=1).nonzero()[-1])
    for value in (1.0, torch.nan, torch.inf, -torch.inf):
        joined["lse"][wrong, 0] = value
        right = [ratios is not None for ratios in ratios_by_case(joined, whole, num_tokens)]
        first_rows = accumulate(num_tokens[:-1], initial=0)
        assert right == [not 0 <= wrong - first < n for first, n in zip(first_rows, num_tokens, strict=True)]


def test_a_case_with_large_errors_does_not_hide_among_others() -> None:
    """One in which every error is a little larger than expected, and others in which there is none."""
    problems = problems_of(Case(spec=replace(SPEC, head_size_v=64), batch=LONG, mode="full"))
    whole = evaluate_together(problems, CONTRACT, generic=True)
    statistics = whole.statistics
    assert statistics is not None
    counts = [int(counted.sum()) for counted in statistics.counted.split(statistics.cases)]
    chosen = counts.index(max(counts))
    first = sum(statistics.cases[:chosen])
    right = {name: value.clone() for name, value in whole.values.items()}
    whole = replace(whole, dtypes=dict.fromkeys(right, torch.float64))
    assert None not in ratios_by_case(right, whole, statistics.cases)
    rows = slice(first, first + statistics.cases[chosen])
    right["out"][rows] += 1.1 * statistics.sigma[rows].where(statistics.counted[rows, :, None], 0.0)
    found = ratios_by_case(right, whole, statistics.cases)
    assert [ratios is None for ratios in found] == [index == chosen for index in range(len(found))]
