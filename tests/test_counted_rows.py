"""Which rows have a z: those whose roundings are many, and independent of each other."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from pageproof.oracle import BatchShape, Case, Spec, evaluate
from pageproof.oracle.building.tensors import build

from .test_statistics import DECLARED, FLOAT8, rules_with


def test_rows_that_need_no_arithmetic_stay_exact_and_are_not_counted() -> None:
    batch = BatchShape(query_lens=(3, 2), seq_lens=(2000, 0), padding_tokens=2)
    problem = build(Case(spec=Spec(sinks=True), batch=batch), "cpu")
    sinks = torch.tensor([math.inf, 0.5, -math.inf, 2.0])
    problem = replace(problem, arguments={**problem.arguments, "rules": rules_with(problem, sinks=sinks)})
    expected = evaluate(problem, DECLARED)
    assert expected.statistics is not None
    assert (expected.statistics.bounds["out"][3:] == 0).all()
    assert (expected.statistics.bounds["out"][:, 0] == 0).all()
    assert (expected.statistics.bounds["lse"] >= 0).all()
    assert expected.statistics.counted[:3, 1:].all()
    assert not expected.statistics.counted[3:].any()
    assert not expected.statistics.counted[:, 0].any()


def test_keys_that_a_softcap_makes_equal_count_as_one() -> None:
    """Nine needles at the cap are one weight with one rounding: 1.6 standard deviations, and nobody's fault."""
    spec = Spec(
        dtype="float32", q_dtype=FLOAT8, kv_dtype=FLOAT8, scales="head", num_kv_heads=1, group_size=32, block_size=128,
        sliding_window=125, softcap=2.0, query_bias="dense", bias_width=32,
    )  # fmt: skip
    batch = BatchShape(query_lens=(1, 2, 160), seq_lens=(60, 64, 256), shared_blocks=1)
    case = Case(spec=spec, batch=batch, recipe="needle", poison="", seed=2512619027)
    float16 = replace(DECLARED, p_dtype="float16")
    needles, normal = (
        evaluate(build(each, "cpu"), float16).statistics for each in (case, replace(case, recipe="normal"))
    )
    assert needles is not None
    assert normal is not None
    assert not needles.counted[152, 5]
    assert not needles.counted[154, 27]
    assert normal.counted.any()


def test_rows_of_few_keys_are_not_counted() -> None:
    """One weight's rounding is that of all elements of its row; 100 weights' are not."""
    for seq_len, counted in ((4, False), (15, False), (2000, True)):
        case = Case(spec=Spec(), batch=BatchShape(query_lens=(1,), seq_lens=(seq_len,)))
        statistics = evaluate(build(case, "cpu"), DECLARED).statistics
        assert statistics is not None
        assert statistics.counted.eq(counted).all()
