"""A verdict cannot be mistaken for a bool, says what torch.testing would say, where it is, and how to replay it."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import torch

from pageproof.oracle import BatchShape, Case, Mismatch, NumericContract, Outcome, Spec, Verdict, judge
from pageproof.oracle.adapters import find
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.building.tensors import build
from pageproof.oracle.locate import locate
from pageproof.oracle.verdict import FAILURES

from .simulated_kernel import Simulated

CASE = Case(spec=Spec(sliding_window=8, sinks=True), batch=BatchShape(query_lens=(1, 4), seq_lens=(30, 20)), seed=7)
MISMATCH = Mismatch(
    output="out",
    outcome=Outcome.DIFFERS,
    count=3,
    total=1200,
    index=(2, 1, 17),
    actual=0.5,
    expected=0.25,
    bound=0.002,
    where="request 1, token 1 of 4",
    dtype="bfloat16",
    greatest=1.0,
    greatest_index=(2, 0, 0),
    greatest_bound=0.01,
)


def verdict(outcome: Outcome, **fields: Any) -> Verdict:
    return Verdict(outcome=outcome, case=CASE, candidate="ours", **fields)


@pytest.mark.parametrize("outcome", list(Outcome))
def test_verdict_has_no_truth_value(outcome: Outcome) -> None:
    with pytest.raises(TypeError, match="a Verdict has no truth value"):
        bool(verdict(outcome))


@pytest.mark.parametrize("outcome", list(Outcome))
def test_failures_are_all_outcomes_but_four(outcome: Outcome) -> None:
    passes = outcome in (Outcome.AGREES, Outcome.DECLINED, Outcome.NOT_JUDGED, Outcome.KNOWN)
    assert verdict(outcome).failed is not passes
    assert (outcome in FAILURES) is not passes
    if passes:
        verdict(outcome).require()
    else:
        with pytest.raises(AssertionError, match=outcome.value):
            verdict(outcome).require()


def test_explanation_line_by_line() -> None:
    lines = verdict(Outcome.DIFFERS, mismatches=(MISMATCH,)).explain().splitlines()
    assert lines[:11] == [
        "Tensor-likes are not close!",
        "",
        "ours: differs",
        "",
        "out: outside of its bound",
        "Mismatched elements: 3 / 1200 (0.25%)",
        "Greatest absolute difference: 1 at index (2, 0, 0) (up to 0.01 allowed)",
        "Furthest outside of its bound: index (2, 1, 17), found 0.5, expected 0.25",
        "Where: request 1, token 1 of 4",
        "Bound there: 0.002; the difference is 125 times that",
        "The reference's own rounding to bfloat16 moves that value by at most 0.000977",
    ]


def test_first_lines_are_those_of_torch_testing() -> None:
    """The words that a reader of torch.testing's messages knows, checked against torch's own."""
    with pytest.raises(AssertionError) as caught:
        torch.testing.assert_close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
    theirs = str(caught.value)
    ours = verdict(Outcome.DIFFERS, mismatches=(MISMATCH,)).explain()
    for words in (
        "Tensor-likes are not close!\n\n",
        "Mismatched elements: ",
        "Greatest absolute difference: ",
        " at index (",
        " allowed)",
    ):
        assert words in theirs
        assert words in ours


@pytest.mark.parametrize(
    ("target", "named", "heading"),
    [
        ("ours", "", "Replay it:"),
        ("mutant:stale_plan", " --target mutant:stale_plan", "Replay it:"),
        ("my module:Mine", " --target 'my module:Mine'", "Replay it:"),
        ("", "", "Replay it, with --target for this candidate as module:attribute:"),
    ],
)
def test_replay_line_writes_the_case_itself(target: str, named: str, heading: str) -> None:
    *_, above, line = verdict(Outcome.CRASHED, reason="boom", target=target).explain().splitlines()
    assert above == heading
    write, run = line.split(" && ")
    assert run == f"python -m pageproof.oracle replay CASE.json{named}"
    words = shlex.split(write)
    assert (words[0], words[2:]) == ("echo", [">", "CASE.json"])
    assert Case.from_json(words[1]) == CASE


@pytest.mark.parametrize("target", ["reference", f"{__name__}:Named"])
def test_a_verdict_keeps_what_its_candidate_was_found_by(target: str) -> None:
    assert judge(CASE, find(target)).target == target


def test_a_candidate_that_was_not_found_by_a_target_has_none() -> None:
    assert judge(CASE, Named()).target == ""


class Named(Reference):
    """Its name is nothing that could be found."""

    name = "a name of its own"


def test_a_crash_and_a_decline_give_their_reason() -> None:
    assert "out of shared memory" in verdict(Outcome.CRASHED, reason="out of shared memory").explain()
    assert "head size 71" in verdict(Outcome.DECLINED, reason="head size 71").explain()
    assert "Tensor-likes" not in verdict(Outcome.CRASHED, reason="boom").explain()


def test_agreement_tells_the_largest_ratio() -> None:
    text = verdict(Outcome.AGREES, ratios=(("out", 0.25), ("lse", 0.01))).explain()
    assert "Largest error / bound: out 0.25, lse 0.01" in text


PLACES = [
    (
        "out",
        (0, 3, 5),
        "request 0, token 0 of 1 at position 29 of 30 keys, sees keys 22..29, query head 3 (kv head 1), dim 5",
    ),
    (
        "out",
        (3, 0, 0),
        "request 2, token 2 of 4 at position 18 of 20 keys, sees keys 11..18, query head 0 (kv head 0), dim 0",
    ),
    ("lse", (5, 2), "request 3, token 0 of 2 at position -1 of 1 keys, sees no key, query head 2 (kv head 1)"),
    ("out", (8, 1, 63), "padding row 1 after the batch's 7 tokens, query head 1 (kv head 0), dim 63"),
]


@pytest.mark.parametrize(("output", "index", "words"), PLACES)
def test_places_in_a_batch(output: str, index: tuple[int, ...], words: str) -> None:
    batch = BatchShape(query_lens=(1, 0, 4, 2), seq_lens=(30, 0, 20, 1), padding_tokens=2)
    problem = build(CASE.with_batch(query_lens=batch.query_lens, seq_lens=batch.seq_lens, padding_tokens=2), "cpu")
    assert locate(problem, output, index) == words


def test_places_in_a_cache() -> None:
    spec = Spec(operation="update_mla_cache", num_kv_heads=1, head_size=64, rope_head_size=32, block_size=8)
    problem = build(Case(spec=spec, batch=BatchShape(query_lens=(3,), seq_lens=(12,)), seed=1), "cpu")
    slots = problem.arguments["slot_mapping"].tolist()
    row = next(row for row, slot in enumerate(slots) if slot >= 0)
    block, offset = divmod(slots[row], 8)
    there = locate(problem, "latent_cache", (block, offset, 70))
    assert there == f"block {block}, offset {offset} (slot {slots[row]}), dim 70, written from row {row}"
    free = next(slot for slot in range(8) if slot not in slots)
    assert locate(problem, "latent_cache", (0, free, 1)).endswith("no row is mapped here, so it had to stay as it was")


def test_a_real_finding_names_the_place() -> None:
    """The last key is dropped: the row that sees it as its only one with weight shows it."""
    case = Case(spec=Spec(causal=True), batch=BatchShape(query_lens=(2,), seq_lens=(2,)), recipe="one_hot")
    found = judge(case, Simulated(NumericContract(p_dtype="bfloat16"), fault="last key dropped"))
    with pytest.raises(AssertionError, match=r"token 1 of 2 at position 1 of 2 keys, sees keys 0\.\.1, query head"):
        found.require()
