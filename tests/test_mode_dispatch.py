"""Mode full_and_piecewise: which batches are where, and what dispatchers and captures for uniform batches get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof import optimized
from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.case import OPERATIONS
from pageproof.oracle.execution.dispatch import FULL, PIECEWISE, dispatch, uniform_query_len, without_padding
from pageproof.oracle.replays.dispatched import TOO_LONG, UNEVEN, UNIFORM
from pageproof.oracle.replays.sequence import LARGE, SMALL, Steps, steps_of
from pageproof.oracle.verdict import Verdict

from .graph_backends import DEVICES, is_capturing

MODE = "full_and_piecewise"
SPEC = Spec(dtype="float16", num_kv_heads=1, head_size=16, head_size_v=16)
CASE = Case(spec=SPEC, batch=BatchShape(query_lens=(1, 5, 0), seq_lens=(20, 5, 0)), mode=MODE, seed=3)

UNIFORM_BATCH = BatchShape(query_lens=(1, 1, 1, 0), seq_lens=(20, 5, 9, 0))

QueryLens = tuple[int, ...]


class UniformOnly(Ours):
    """Right in plain calls; a capture of it does as many tokens of each request as the longest had then."""

    modes = ("eager", "full", MODE)
    name = "uniform only"
    query_len = 0

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation != "attention":
            return super().call(operation, arguments)
        starts = arguments["batch"].cu_seqlens_q
        if not is_capturing():
            self.query_len = int(starts.diff().max())
        return self.attend(arguments, starts)

    def attend(self, arguments: dict[str, Any], starts: Tensor) -> None:
        found = optimized.attention(**{**arguments, "out": None, "lse": None})
        rows = torch.arange(found[0].shape[0], dtype=torch.int32, device=starts.device)
        requests = torch.searchsorted(starts, rows, right=True) - 1
        done = (rows - starts[requests] < self.query_len) | (rows >= starts[-1])
        arguments["out"].copy_(torch.where(done[:, None, None], found[0], arguments["out"]))
        arguments["lse"].copy_(torch.where(done[:, None], found[1], arguments["lse"]))


class StaleQueryLen(UniformOnly):
    """Where each request begins is worked out from the query length at the capture."""

    def attend(self, arguments: dict[str, Any], starts: Tensor) -> None:
        if is_capturing():
            stale = torch.arange(len(starts), dtype=torch.int32, device=starts.device) * self.query_len
            starts = torch.minimum(stale, starts[-1])
        batch = replace(arguments["batch"], cu_seqlens_q=starts)
        optimized.attention(**{**arguments, "batch": batch})


class Dispatching(UniformOnly):
    """With a dispatcher of its own."""

    def __init__(self, choose: Callable[[QueryLens, int], str]) -> None:
        super().__init__()
        self.dispatch = choose


def by_tokens(query_lens: QueryLens, captured: int) -> str:
    """As many tokens as a uniform batch would have."""
    return FULL if query_lens and sum(query_lens) == len(query_lens) * captured else dispatch(query_lens, captured)


def of_any_length(query_lens: QueryLens, captured: int) -> str:
    """Uniform, also with more tokens than were captured."""
    return FULL if uniform_query_len(query_lens) else PIECEWISE


def all_of_none(query_lens: QueryLens, captured: int) -> str:
    """Nothing in an empty batch contradicts."""
    return FULL if all(tokens == query_lens[0] <= captured for tokens in query_lens) else PIECEWISE


def longest_of_none(query_lens: QueryLens, captured: int) -> str:
    """An empty batch has no longest request."""
    return FULL if min(query_lens) == max(query_lens) <= captured else PIECEWISE


def never_full(query_lens: QueryLens, captured: int) -> str:
    return PIECEWISE


def in_other_words(query_lens: QueryLens, captured: int) -> str:
    fits = all(0 < tokens <= captured for tokens in query_lens)
    return FULL if query_lens and fits and len({*query_lens}) == 1 else PIECEWISE


def case_with(wanted: Callable[[Steps], bool], batch: BatchShape = CASE.batch) -> Case:
    cases = (replace(CASE, batch=batch, seed=seed) for seed in range(1000))
    return next(case for case in cases if wanted(steps_of(case)))


def replaying(profile: str) -> Case:
    """A case whose first replay is of this profile; its own batch is of the other kind, as the first replay is not."""
    batch = CASE.batch if profile == UNIFORM else UNIFORM_BATCH
    return case_with(lambda steps: steps.replayed[0].profile == profile, batch)


def shorter_than_captured(steps: Steps) -> bool:
    return any(0 < uniform_query_len(step.case.batch.query_lens) < steps.query_len for step in steps.replayed)


def kinds(case: Case) -> list[str]:
    """Where the steps of a case belong."""
    steps = steps_of(case)
    return [dispatch(step.case.batch.query_lens, steps.query_len) for step in steps.replayed]


@pytest.mark.parametrize(
    ("query_lens", "captured", "expected"),
    [
        ((1, 1, 1), 1, FULL),
        ((1, 1, 0, 0), 1, FULL),
        ((4, 4), 4, FULL),
        ((2, 2), 4, FULL),
        ((4, 4), 1, PIECEWISE),
        ((4,), 2, PIECEWISE),
        ((1, 3), 2, PIECEWISE),
        ((1, 0, 1), 1, PIECEWISE),
        ((0, 1), 1, PIECEWISE),
        ((0, 0), 4, PIECEWISE),
        ((), 4, PIECEWISE),
    ],
)
def test_uniform_batches_up_to_the_captured_length_are_full(
    query_lens: QueryLens, captured: int, expected: str
) -> None:
    assert dispatch(query_lens, captured) == expected
    assert dispatch(without_padding(query_lens), captured) == expected


def test_both_kinds_of_batch_are_replayed_and_both_captures_of_either_bucket() -> None:
    batches = (
        CASE.batch,
        UNIFORM_BATCH,
        BatchShape(),
        BatchShape(query_lens=(4,), seq_lens=(9,)),
    )
    for operation in ("attention", "merge_states"):
        for seed, batch in enumerate(batches * 10):
            case = replace(CASE, batch=batch, seed=seed).with_spec(operation=operation)
            assert all(kinds(case).count(kind) >= 2 for kind in (FULL, PIECEWISE))
            assert set(kinds(replace(case, replays=3))) == {FULL, PIECEWISE}
            steps = steps_of(case)
            order = [(kind, step.bucket) for kind, step in steps.captures(MODE)]
            assert order == [(kind, bucket) for kind in (PIECEWISE, FULL) for bucket in (LARGE, SMALL)]
            assert all(uniform_query_len(step.case.batch.query_lens) == steps.query_len for step in steps.uniform)
            assert all(step.case.batch.num_tokens >= steps.query_len for step in steps.uniform)


def test_batches_that_are_nearly_uniform_are_among_them() -> None:
    replayed = [step for seed in range(60) for step in steps_of(replace(CASE, batch=UNIFORM_BATCH, seed=seed)).replayed]
    assert {UNIFORM, UNEVEN, TOO_LONG, "empty", "mixed"} <= {step.profile for step in replayed}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("odd_strides", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_ours_agrees_and_what_ran_is_counted(operation: str, odd_strides: bool, device: str) -> None:
    """With odd strides and one head the elements of an lse are not side by side in any order."""
    mla = {"num_kv_heads": 1, "rope_head_size": 16, "nope_head_size": 16} if "mla" in operation else {}
    case = CASE.with_spec(operation=operation, group_size=1, odd_strides=odd_strides, **mla)
    verdict = judge(case, Ours(), device)
    verdict.require()
    assert verdict.outcome is Outcome.AGREES
    counts = dict(verdict.counts)
    assert counts["full replays"] == kinds(case).count(FULL)
    assert counts["piecewise replays"] == 2 * kinds(case).count(PIECEWISE)  # a graph on either side of the operation


@pytest.mark.parametrize("device", DEVICES)
def test_a_capture_for_uniform_batches_is_enough(device: str) -> None:
    """It is wrong in mode full, which replays it on others."""
    for seed in range(3):
        judge(replace(CASE, seed=seed), UniformOnly(), device).require()
    assert judge(replace(CASE, mode="full"), UniformOnly(), device).outcome is Outcome.REPLAY_DIFFERS


@pytest.mark.parametrize("device", DEVICES)
def test_a_stale_query_length_is_found(device: str) -> None:
    case = case_with(shorter_than_captured)
    assert judge(replace(case, mode="eager"), StaleQueryLen(), device).outcome is Outcome.AGREES
    verdict = judge(case, StaleQueryLen(), device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert verdict.check == MODE
    assert "dispatched to full, captured on uniform;" in verdict.reason


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("choose", "profile"), [(by_tokens, UNEVEN), (of_any_length, TOO_LONG)])
def test_a_batch_in_a_graph_that_was_not_captured_for_it_is_found_by_its_answer(
    choose: Callable[[QueryLens, int], str], profile: str, device: str
) -> None:
    verdict = judge(replaying(profile), Dispatching(choose), device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert f"replay 1 of 6 ({profile}" in verdict.reason
    assert any(mismatch.outcome is Outcome.UNWRITTEN for mismatch in verdict.mismatches)


def chosen_wrongly(choose: Callable[[QueryLens, int], str], case: Case, device: str) -> Verdict:
    """Of kernels that are right in every graph, so that only the choice is wrong."""
    candidate = Ours()
    candidate.dispatch = choose  # type: ignore[attr-defined]
    return judge(case, candidate, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("choose", "profile", "due"),
    [(of_any_length, TOO_LONG, PIECEWISE), (all_of_none, "empty", PIECEWISE), (never_full, UNIFORM, FULL)],
)
def test_a_choice_that_does_no_harm_is_found_as_well(
    choose: Callable[[QueryLens, int], str], profile: str, due: str, device: str
) -> None:
    verdict = chosen_wrongly(choose, replaying(profile), device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert f"expected it in the {due} one" in verdict.reason
    assert not verdict.mismatches


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("choose", "error"), [(longest_of_none, "ValueError: min()"), (lambda *_: "graph", "dispatch: found 'graph'")]
)
def test_a_dispatcher_that_fails_is_a_crash(choose: Callable[[QueryLens, int], str], error: str, device: str) -> None:
    verdict = chosen_wrongly(choose, replaying("empty"), device)
    assert verdict.outcome is Outcome.CRASHED
    assert error in verdict.reason


@pytest.mark.parametrize("device", DEVICES)
def test_a_dispatcher_of_its_own_that_is_right_agrees(device: str) -> None:
    for profile in (UNEVEN, TOO_LONG, "empty", UNIFORM):
        judge(replace(replaying(profile), replays=3), Dispatching(in_other_words), device).require()
