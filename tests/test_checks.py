"""What is asked of a candidate beyond the one answer."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.case import BatchShape, Case
from pageproof.oracle.case_rules import why_invalid
from pageproof.oracle.judging import judge
from pageproof.oracle.verdict import Outcome

CASE = Case(batch=BatchShape(query_lens=(1, 3), seq_lens=(20, 9)), check="repeat")


class Wavering(Reference):
    """Right within the bound, and every second time by one bit more."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        returned = super().call(operation, arguments)
        lse: Tensor = arguments["lse"]
        if next(self.calls) % 2:
            lse[3, 1] *= 1 + 2.0**-23
        return returned


def test_a_kernel_that_repeats_itself_agrees() -> None:
    assert judge(CASE, Reference()).outcome is Outcome.AGREES


def test_a_kernel_that_does_not_is_found() -> None:
    verdict = judge(CASE, Wavering())
    assert (verdict.outcome, verdict.check) == (Outcome.NONDETERMINISTIC, "repeat")
    assert verdict.reason.startswith("lse: 1 of 16 elements have other bits in a second run, the first at request 1")


def test_what_a_check_says_nothing_of_is_no_case() -> None:
    assert why_invalid(CASE.with_spec(operation="update_kv_cache")) == (
        "check: update_kv_cache is compared bit for bit, so repeating it says nothing more"
    )
