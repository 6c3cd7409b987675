"""What compare says of every kind of element, of a wrong form, and of one bad element in a million."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pageproof.oracle import BatchShape, Case, Expected, Outcome, Spec
from pageproof.oracle.building.poison import sentinel_bits
from pageproof.oracle.building.problem import Problem
from pageproof.oracle.building.tensors import build
from pageproof.oracle.compare import compare

NAN, INF = math.nan, math.inf
UNWRITTEN = "unwritten"  # stands for the NaN that an output is born with
AGREES, DIFFERS, POISONED = Outcome.AGREES, Outcome.DIFFERS, Outcome.POISONED
SMALLEST = 2.0**-149  # of float32

# actual, expected, bound -> outcome, error / bound
TABLE = [
    # finite against finite
    (1.0, 1.0, 0.0, AGREES, 0.0),
    (1.0, 1.0, 0.5, AGREES, 0.0),
    (1.25, 1.0, 0.5, AGREES, 0.5),
    (1.5, 1.0, 0.5, AGREES, 1.0),  # on the bound is inside
    (1.75, 1.0, 0.5, DIFFERS, 1.5),
    (0.25, 1.0, 0.5, DIFFERS, 1.5),
    (1.5, 1.0, 0.0, DIFFERS, INF),
    (SMALLEST, 0.0, 0.0, DIFFERS, INF),
    (0.0, SMALLEST, 0.0, DIFFERS, INF),
    # zeros
    (-0.0, 0.0, 0.0, AGREES, 0.0),
    (0.0, -0.0, 0.0, AGREES, 0.0),
    # infinities have to be met exactly
    (INF, INF, 0.0, AGREES, 0.0),
    (-INF, -INF, 0.0, AGREES, 0.0),
    (-INF, INF, 0.0, DIFFERS, INF),
    (INF, -INF, 1e300, DIFFERS, INF),
    (3e38, INF, 1e300, DIFFERS, INF),
    (0.0, -INF, 1.0, DIFFERS, INF),
    # what is not finite where it should be
    (INF, 1.0, 0.5, POISONED, INF),
    (-INF, 1.0, 1e300, POISONED, INF),
    (NAN, 1.0, 0.5, POISONED, INF),
    (NAN, 0.0, 0.0, POISONED, INF),
    (NAN, 1.0, INF, POISONED, INF),
    (NAN, -INF, 0.0, DIFFERS, INF),
    (NAN, INF, 0.0, DIFFERS, INF),
    (UNWRITTEN, 1.0, 0.5, Outcome.UNWRITTEN, INF),
    (UNWRITTEN, -INF, 0.0, Outcome.UNWRITTEN, INF),
    # an infinite bound leaves open whether a value overflows, but not to which side
    (INF, 65510.0, INF, AGREES, 0.0),
    (65504.0, 65510.0, INF, AGREES, 0.0),
    (-INF, 65510.0, INF, POISONED, INF),
]


@pytest.mark.parametrize(("actual", "expected", "bound", "outcome", "ratio"), TABLE)
def test_one_element(actual: Any, expected: float, bound: float, outcome: Outcome, ratio: float) -> None:
    """Alone among elements that agree, in either output."""
    for name in ("out", "lse"):
        problem, tensors, answer = agreeing()
        tensors[name].view(-1)[-2] = 0.0 if actual == UNWRITTEN else actual
        if actual == UNWRITTEN:
            tensors[name].view(torch.int32).view(-1)[-2] = sentinel_bits(torch.float32)
        answer.values[name].view(-1)[-2] = expected
        answer.bounds[name].view(-1)[-2] = bound
        mismatches, ratios = compare(tensors, answer, problem)
        assert dict(ratios)[name] == ratio
        if outcome is AGREES:
            assert mismatches == ()
        else:
            (mismatch,) = mismatches
            assert (mismatch.output, mismatch.outcome, mismatch.count) == (name, outcome, 1)
            assert mismatch.index == {"out": (1, 1, 2), "lse": (1, 0)}[name]
            assert same(mismatch.expected, expected)
            assert actual == UNWRITTEN or same(mismatch.actual, torch.tensor(actual).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_unwritten_is_told_from_poisoned_in_every_dtype(dtype: torch.dtype) -> None:
    problem = build(case_of(1, 1, 4), "cpu")
    out = torch.zeros(1, 1, 4).to(dtype)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[out.element_size()]
    answer = expected_of({"out": out.float()}, dtype)
    assert compare({"out": out}, answer, problem)[0] == ()
    nan = torch.tensor(NAN).to(dtype)  # not the one that outputs are born with
    out.view(integers).view(-1)[1] = nan.view(integers)
    assert compare({"out": out}, answer, problem)[0][0].outcome is POISONED
    out.view(integers).view(-1)[2] = sentinel_bits(dtype)
    (mismatch,) = compare({"out": out}, answer, problem)[0]
    assert (mismatch.outcome, mismatch.index, mismatch.count) == (Outcome.UNWRITTEN, (0, 0, 2), 2)


@pytest.mark.parametrize("place", [0, 123_456, 999_999])
def test_one_bad_element_in_a_million(place: int) -> None:
    """Not its size but its bound makes it bad: a mean, or one bound for all, would let it through."""
    problem = build(case_of(100, 100, 100), "cpu")
    out = torch.randn(100, 100, 100, generator=torch.Generator().manual_seed(0)) * 1000
    answer = expected_of({"out": out}, torch.float32, bound=1e-2)
    answer.bounds["out"].view(-1)[place] = 1e-6
    assert compare({"out": out}, answer, problem)[0] == ()
    answer.values["out"].view(-1)[place] += 2e-6
    mismatches, ratios = compare({"out": out}, answer, problem)
    (mismatch,) = mismatches
    assert (mismatch.count, mismatch.total) == (1, 1_000_000)
    assert mismatch.index == (place // 10_000, place // 100 % 100, place % 100)
    assert dict(ratios)["out"] == pytest.approx(2.0, rel=1e-6)


def test_worst_element_is_the_one_furthest_outside_and_the_greatest_difference_is_told_too() -> None:
    problem, tensors, answer = agreeing()
    flat, bounds = tensors["out"].view(-1), answer.bounds["out"].view(-1)
    flat[3], bounds[3] = flat[3] + 8.0, 4.0  # twice its bound
    flat[7], bounds[7] = flat[7] + 1.0, 0.125  # eight times
    (mismatch,) = compare(tensors, answer, problem)[0]
    assert (mismatch.index, mismatch.bound) == ((0, 1, 3), 0.125)
    assert (mismatch.greatest, mismatch.greatest_index, mismatch.greatest_bound) == (8.0, (0, 0, 3), 4.0)
    assert mismatch.count == 2


FORMS = [
    ({"out": torch.zeros(2, 2, 5)}, "out has shape (2, 2, 5), expected (2, 2, 4)"),
    ({"out": torch.zeros(2, 2, 4, 1)}, "out has shape (2, 2, 4, 1), expected (2, 2, 4)"),
    ({"out": torch.zeros(2, 2, 4, dtype=torch.float64)}, "out is float64, expected float32"),
    ({"lse": torch.zeros(2, 2, dtype=torch.bfloat16)}, "lse is bfloat16, expected float32"),
    ({"lse": None}, "lse is missing: the outputs are ['out']"),
]


@pytest.mark.parametrize(("change", "words"), FORMS, ids=[words for _, words in FORMS])
def test_wrong_form_differs_in_words(change: dict[str, Any], words: str) -> None:
    problem, tensors, answer = agreeing()
    tensors = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    (mismatch,), ratios = compare(tensors, answer, problem)
    assert (mismatch.outcome, mismatch.where, mismatch.count) == (DIFFERS, words, mismatch.total)
    assert dict(ratios)[mismatch.output] == INF
    assert len(ratios) == 2


def test_both_outputs_are_told() -> None:
    problem, tensors, answer = agreeing()
    tensors["out"][0, 0, 0] = NAN
    tensors["lse"][1, 1] = 99.0
    mismatches, _ = compare(tensors, answer, problem)
    assert [(m.output, m.outcome) for m in mismatches] == [("out", POISONED), ("lse", DIFFERS)]


def test_strides_do_not_matter() -> None:
    problem, tensors, answer = agreeing()
    wide = torch.full((2, 2, 9), NAN)
    wide[..., 1:9:2] = tensors["out"]
    assert compare(tensors | {"out": wide[..., 1:9:2]}, answer, problem)[0] == ()


def test_nothing_to_compare_agrees() -> None:
    problem = build(case_of(0, 2, 4), "cpu")
    tensors = {"out": torch.zeros(0, 2, 4), "lse": torch.zeros(0, 2)}
    assert compare(tensors, expected_of(tensors, torch.float32), problem) == ((), (("out", 0.0), ("lse", 0.0)))


POOLS = [
    (0.0, -0.0, DIFFERS),  # every bit has to match
    (NAN, NAN, AGREES),  # the same NaN, where nothing was written
    (1.0, 1.0 + 2.0**-23, DIFFERS),
    (INF, INF, AGREES),
    (NAN, 1.0, DIFFERS),
]


@pytest.mark.parametrize(("actual", "expected", "outcome"), POOLS)
def test_pools_are_compared_bit_by_bit(actual: float, expected: float, outcome: Outcome) -> None:
    case = Case(
        spec=Spec(operation="update_kv_cache", dtype="float32"), batch=BatchShape(query_lens=(1,), seq_lens=(1,))
    )
    problem = build(case, "cpu")
    pools = {name: torch.zeros_like(pool) for name, pool in problem.outputs.items()}
    dtypes = {name: pool.dtype for name, pool in pools.items()}
    answer = Expected(values={name: pool.clone() for name, pool in pools.items()}, bounds={}, dtypes=dtypes, exact=True)
    pools["v_cache"][1, 5, 1, 7] = actual
    answer.values["v_cache"][1, 5, 1, 7] = expected
    mismatches, ratios = compare(pools, answer, problem)
    assert dict(ratios) == {"k_cache": 0.0, "v_cache": 0.0 if outcome is AGREES else INF}
    assert [mismatch.outcome for mismatch in mismatches] == ([] if outcome is AGREES else [outcome])
    for mismatch in mismatches:
        assert (mismatch.output, mismatch.index, mismatch.count) == ("v_cache", (1, 5, 1, 7), 1)
        assert "block 1, offset 5 (slot 21), kv head 1, dim 7" in mismatch.where


def case_of(num_tokens: int, num_heads: int, head_size: int) -> Case:
    spec = Spec(
        operation="merge_states", num_kv_heads=num_heads, group_size=1, head_size=head_size, head_size_v=head_size
    )
    return Case(spec=spec, batch=BatchShape(query_lens=(num_tokens,), seq_lens=(num_tokens,)))


def expected_of(tensors: dict[str, torch.Tensor], dtype: torch.dtype, bound: float = 0.0) -> Expected:
    return Expected(
        values={name: tensor.double() for name, tensor in tensors.items()},
        bounds={name: torch.full_like(tensor, bound, dtype=torch.float64) for name, tensor in tensors.items()},
        dtypes=dict.fromkeys(tensors, dtype),
    )


def agreeing() -> tuple[Problem, dict[str, torch.Tensor], Expected]:
    """out [2, 2, 4] and lse [2, 2] that are just as they should be, with bounds of 0.25."""
    tensors = {"out": torch.arange(16.0).view(2, 2, 4), "lse": torch.arange(4.0).view(2, 2)}
    return build(case_of(2, 2, 4), "cpu"), tensors, expected_of(tensors, torch.float32, 0.25)


def same(first: float, second: float) -> bool:
    return first == second or (math.isnan(first) and math.isnan(second))


def test_table_says_each_outcome_of_a_comparison() -> None:
    assert {row[3] for row in TABLE} == {AGREES, DIFFERS, POISONED, Outcome.UNWRITTEN}
