"""What is asked of a candidate beyond the one answer: correct candidates pass, and what means nothing is no case."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof.oracle.adapters import find
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.case import OPERATIONS, RELATIONS, BatchShape, Case, Spec
from pageproof.oracle.case_checks import applicable, why_not
from pageproof.oracle.case_rules import why_invalid
from pageproof.oracle.judging import judge
from pageproof.oracle.verdict import Outcome

FLOAT8 = "float8_e4m3fn"
SMALL = Spec(dtype="float16", head_size=32, head_size_v=16)
BATCH = BatchShape(query_lens=(1, 3, 0, 2), seq_lens=(33, 19, 0, 2), padding_tokens=2, table_slack=1)
MLA: dict[str, Any] = {"num_kv_heads": 1, "group_size": 3, "head_size": 32, "head_size_v": 16, "rope_head_size": 16}
CASES = {
    "plain": Case(spec=SMALL, batch=BATCH),
    "windowed, with ALiBi and sinks": Case(
        spec=replace(SMALL, sliding_window=7, alibi=True, sinks=True, cache_layout="interleaved", odd_strides=True),
        batch=BATCH,
        recipe="needle",
    ),
    "a tree over float8 caches": Case(
        spec=replace(SMALL, kv_dtype=FLOAT8, scales="head", query_bias="tree", bias_width=3, cache_layout="HND"),
        batch=replace(BATCH, shared_blocks=1),
    ),
    "float8 everywhere": Case(
        spec=replace(
            SMALL, q_dtype=FLOAT8, kv_dtype=FLOAT8, out_dtype=FLOAT8, scales="tensor", sinks=True, softcap=20.0
        ),
        batch=BATCH,
    ),
    "seen from both sides": Case(
        spec=replace(SMALL, causal=False, right_window=2, query_bias="dense", bias_width=2, block_size=1),
        batch=BATCH,
        recipe="extreme",
    ),
    "one head, one page": Case(
        spec=Spec(
            num_kv_heads=1, group_size=1, head_size=16, head_size_v=16, causal=False, odd_strides=True, sinks=True
        ),
        batch=BatchShape(query_lens=(4,), seq_lens=(9,)),
        poison="",
    ),
    "latent": Case(spec=Spec(operation="mla_attention", sinks=True, **MLA), batch=BATCH, recipe="extreme", seed=4),
    "latent, decompressed": Case(
        spec=Spec(operation="mla_attention_decompressed", kv_dtype=FLOAT8, scales="head", nope_head_size=16, **MLA),
        batch=BATCH,
    ),
    **{
        f"pages inside of {layout}, and no spare ones": Case(
            spec=replace(SMALL, num_kv_heads=2, block_size=4, cache_layout=layout),
            batch=BatchShape(query_lens=(1, 1, 1), seq_lens=(9, 14, 6), spare_blocks=False),
        )
        for layout in ("head_major", "slot_major", "sliced", "transposed")
    },
    "two parts": Case(spec=Spec(operation="merge_states", head_size=32), batch=BATCH, recipe="extreme"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_reference_passes_every_check(name: str, seed: int) -> None:
    for check in applicable(CASES[name]):
        judge(replace(CASES[name], check=check, seed=seed), Reference()).require()


@pytest.mark.parametrize("name", ["windowed, with ALiBi and sinks", "a tree over float8 caches", "latent"])
def test_our_kernels_pass_every_check(name: str, pageproof_device: torch.device) -> None:
    for check in applicable(CASES[name]):
        judge(replace(CASES[name], check=check), find("ours"), pageproof_device).require()


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


def test_a_kernel_that_does_not_repeat_itself_is_found() -> None:
    verdict = judge(replace(CASES["plain"], check="repeat"), Wavering())
    assert (verdict.outcome, verdict.check) == (Outcome.NONDETERMINISTIC, "repeat")
    assert verdict.reason.startswith("lse: 1 of 32 elements have other bits in a second run, the furthest at request 1")


def test_a_second_run_that_crashes_is_told_from_a_wrong_one() -> None:
    class Tired(Wavering):
        def call(self, operation: str, arguments: dict[str, Any]) -> Any:
            if next(self.calls):
                raise RuntimeError("no more")
            return Reference.call(self, operation, arguments)

    verdict = judge(replace(CASES["plain"], check="page_order"), Tired())
    assert (verdict.outcome, verdict.check) == (Outcome.CRASHED, "page_order")
    assert verdict.reason.endswith("RuntimeError: no more")


def test_what_a_check_says_nothing_of_is_no_case() -> None:
    update = Case(spec=Spec(operation="update_kv_cache"), batch=BATCH, check="repeat")
    assert why_invalid(update) == ("check: update_kv_cache is compared bit for bit, so repeat says nothing more")


@pytest.mark.parametrize(
    ("check", "case"),
    [
        ("sequential", Case(batch=BatchShape(query_lens=(1,), seq_lens=(9,)))),
        ("sequential", CASES["seen from both sides"]),
        ("sequential", CASES["plain"].with_spec(query_bias="tree", bias_width=3, alibi=True)),
        ("sequential", CASES["plain"].with_spec(causal=False, sliding_window=5)),
        ("key_order", CASES["windowed, with ALiBi and sinks"]),
        ("request_order", CASES["one head, one page"]),
        ("split", CASES["float8 everywhere"]),
        ("split", Case(batch=BatchShape(query_lens=(2,), seq_lens=(9,)))),
        ("shift", CASES["float8 everywhere"]),
        ("rescale", CASES["float8 everywhere"].with_spec(scales="none")),
        ("groups", CASES["one head, one page"]),
        ("swap", CASES["plain"]),
        ("ones", CASES["two parts"]),
        ("ones", CASES["plain"].with_batch(query_lens=(0,), seq_lens=(9,))),
        ("page_order", CASES["plain"].with_spec(far_pages=True)),
    ],
)
def test_a_check_says_where_it_does_not_apply(check: str, case: Case) -> None:
    reason = why_not(replace(case, check=check))
    assert reason is not None
    assert check in reason


def test_every_check_is_asked_of_some_operation() -> None:
    offered = {check for operation in OPERATIONS for check in applicable(CASES["plain"].with_spec(operation=operation))}
    assert offered == set(RELATIONS)
