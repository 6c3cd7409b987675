"""The strategies build valid cases, reach every feature, and shrink to plain ones."""

from __future__ import annotations

from hypothesis import Phase, find, given, settings

from pageproof.oracle.building.tensors import build
from pageproof.oracle.case import ATTENTION_OPERATIONS, OPERATIONS, Case
from pageproof.oracle.case_rules import why_invalid
from pageproof.oracle.strategies import LARGEST_KEYS, cases

FEW = settings(max_examples=60)
MANY = settings(max_examples=2000, database=None, derandomize=True)
UNSHRUNK = settings(parent=MANY, phases=(Phase.generate,))


@FEW
@given(cases())
def test_every_case_is_valid_and_can_be_built(case: Case) -> None:
    assert why_invalid(case) is None
    assert max(case.batch.seq_lens, default=0) <= LARGEST_KEYS
    assert build(case).guards.violations() is None


@FEW
@given(cases())
def test_a_case_survives_its_json(case: Case) -> None:
    assert Case.from_json(case.to_json()) == case


@FEW
@given(cases(operations=ATTENTION_OPERATIONS, recipes=("needle",), requests=2))
def test_what_is_asked_for_is_kept_to(case: Case) -> None:
    assert case.spec.operation in ATTENTION_OPERATIONS
    assert case.recipe == "needle"
    assert case.batch.num_requests <= 2


def test_every_operation_is_found() -> None:
    for operation in OPERATIONS:
        found = find(cases(), lambda case, wanted=operation: case.spec.operation == wanted, settings=UNSHRUNK)
        assert found.spec.operation == operation


def test_boundaries_are_found() -> None:
    def window_ends_at_the_context(case: Case) -> bool:
        window = case.spec.sliding_window
        return window is not None and window > 2 and any(n and length == window for n, length in _pairs(case))

    for wanted in (
        window_ends_at_the_context,
        lambda case: any(n > length > 0 for n, length in _pairs(case)),
        lambda case: (0, 0) in _pairs(case),
    ):
        assert wanted(find(cases(), wanted, settings=UNSHRUNK))


def test_a_case_shrinks_to_a_plain_one() -> None:
    smallest = find(
        cases(), lambda case: case.spec.sliding_window is not None and 1 in case.batch.query_lens, settings=MANY
    )
    assert smallest.spec.sliding_window == 1
    assert smallest.batch.query_lens == (1,)
    assert smallest.batch.padding_tokens == smallest.batch.table_slack == smallest.batch.shared_blocks == 0
    assert not smallest.batch.repeated_blocks
    assert smallest.batch.spare_blocks
    spec = smallest.spec
    assert (spec.dtype, spec.kv_dtype, smallest.recipe) == ("float32", "", "normal")
    assert not any((spec.odd_strides, spec.alibi, spec.sinks, spec.softcap, spec.bias_width))


def _pairs(case: Case) -> list[tuple[int, int]]:
    return list(zip(case.batch.query_lens, case.batch.seq_lens, strict=True))
