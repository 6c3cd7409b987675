"""Execution modes: ours agrees in every one, and what only a replay does wrong is found and said."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof import optimized
from pageproof.optimized import Batch, interpreter
from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.campaign.lengths import INTERPRETED, total_work
from pageproof.oracle.campaign.pairs import Model
from pageproof.oracle.campaign.sampler import random_group
from pageproof.oracle.case import MODES
from pageproof.oracle.execution.graphs.emulation import EmulatedBackend
from pageproof.oracle.replays.sequence import steps_of
from pageproof.oracle.verdict import Verdict

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels are compiled here, not interpreted")

CAPTURING = MODES[1:]
SMALL = Spec(dtype="float16", num_kv_heads=1, head_size=16, head_size_v=16)
CASE = Case(spec=SMALL, batch=BatchShape(query_lens=(1, 5, 0), seq_lens=(20, 5, 0)), seed=3)


def is_capturing() -> bool:
    return EmulatedBackend().is_capturing()


class Planted(Ours):
    """Our kernels behind a wrapper that is right in every plain call; what it gets wrong needs a capture."""

    name = "planted"

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation != "attention":
            return super().call(operation, arguments)
        return self.attend(arguments)

    def attend(self, arguments: dict[str, Any]) -> Any:
        raise NotImplementedError


class FrozenLength(Planted):
    """The longest sequence is a number that the host knew when it captured."""

    longest = 0

    def attend(self, arguments: dict[str, Any]) -> Any:
        batch: Batch = arguments["batch"]
        if not is_capturing():
            self.longest = int(batch.seq_lens.max())
        seq_lens = batch.seq_lens.clamp(max=self.longest)
        return optimized.attention(**{**arguments, "batch": replace(batch, seq_lens=seq_lens)})


class StalePlan(Planted):
    """The plan is made outside of the capture."""

    plan: Any = None

    def attend(self, arguments: dict[str, Any]) -> Any:
        batch: Batch = arguments["batch"]
        if not is_capturing():
            columns = batch.max_blocks * arguments["k_cache"].shape[1]
            self.plan = optimized.make_plan(batch, (arguments["q"].shape[0], batch.num_requests, columns))
        return optimized.attention(**arguments, plan=self.plan)


class NewBuffer(Planted):
    """Every plain call makes a new workspace, also after one was captured."""

    workspace: Tensor | None = None

    def attend(self, arguments: dict[str, Any]) -> Any:
        batch: Batch = arguments["batch"]
        if not is_capturing():
            self.workspace = torch.empty_like(batch.seq_lens)
        assert self.workspace is not None
        self.workspace.copy_(batch.seq_lens)
        return optimized.attention(**{**arguments, "batch": replace(batch, seq_lens=self.workspace)})


class SkippedPadding(Planted):
    """Only the rows that were padding at the capture are written as such."""

    rows = 0

    def attend(self, arguments: dict[str, Any]) -> Any:
        if not is_capturing():
            self.rows = int(arguments["batch"].cu_seqlens_q[-1])
        out, lse = optimized.attention(**{**arguments, "out": None, "lse": None})
        live = torch.arange(out.shape[0]) < arguments["batch"].cu_seqlens_q[-1]
        live[self.rows :] = True
        arguments["out"].copy_(torch.where(live[:, None, None], out, arguments["out"]))
        arguments["lse"].copy_(torch.where(live[:, None], lse, arguments["lse"]))


class HostSync(Planted):
    """Reads a length on the host at every call."""

    def attend(self, arguments: dict[str, Any]) -> Any:
        assert int(arguments["batch"].seq_lens.sum()) >= 0
        return optimized.attention(**arguments)


class SkippedUpdate(Ours):
    """Slots are taken to be absent at the capture, and the KV update is skipped for ever."""

    name = "skipped update"

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "update_kv_cache" and is_capturing():
            return None
        return super().call(operation, arguments)


class LastSlot(Ours):
    """A negative slot writes the last one of the pool."""

    name = "last slot"

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "update_kv_cache":
            slots, cache = arguments["slot_mapping"], arguments["k_cache"]
            arguments["slot_mapping"] = slots.remainder(cache.shape[0] * cache.shape[1])
        return super().call(operation, arguments)


def judged(candidate: Any, mode: str = "full", case: Case = CASE) -> Verdict:
    return judge(replace(case, mode=mode), candidate)


def captured_on(profile: str) -> Case:
    cases = (replace(CASE, seed=seed) for seed in range(1000))
    return next(case for case in cases if steps_of(case).captured[0].profile == profile)


@pytest.mark.parametrize("make", [FrozenLength, StalePlan, NewBuffer, SkippedUpdate], ids=lambda make: make.__name__)
def test_what_only_a_replay_does_wrong_is_found(make: Callable[[], Ours]) -> None:
    assert judge(CASE, make()).outcome is Outcome.AGREES
    verdict = judged(make())
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert verdict.check == "full"
    assert "mode full, replay 1 of 6" in verdict.reason
    assert "captured on one token" in verdict.reason
    assert "lengths" in verdict.reason
    assert "pages and slots" in verdict.reason


def test_the_place_is_said_and_the_line_that_replays_it() -> None:
    verdict = judged(SkippedUpdate())
    assert verdict.mismatches[0].output in ("k_cache", "v_cache")
    assert "written from row" in verdict.mismatches[0].where
    assert '"mode": "full"' in verdict.replay_line()


def test_rows_that_become_padding_are_written() -> None:
    """Nothing is padding at the capture."""
    assert judge(CASE, SkippedPadding()).outcome is Outcome.AGREES
    verdict = judged(SkippedPadding(), case=captured_on("full"))
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert any("padding row" in mismatch.where for mismatch in verdict.mismatches)
    assert all(mismatch.outcome is Outcome.UNWRITTEN for mismatch in verdict.mismatches)


def test_memory_that_is_gone_is_named() -> None:
    assert "were freed" in judged(NewBuffer()).reason


def test_a_step_that_was_captured_at_the_longest_is_right_where_the_length_is_frozen() -> None:
    """Of the frozen length only shorter captures show anything; this is why they are drawn."""
    longest = captured_on("longest")
    assert judged(FrozenLength(), case=replace(longest, replays=2)).outcome is Outcome.AGREES


@pytest.mark.parametrize("mode", CAPTURING)
def test_what_is_wrong_in_plain_calls_too_is_called_what_it_is_there(mode: str) -> None:
    verdict = judged(LastSlot(), mode)
    assert verdict.outcome is Outcome.OUT_OF_BOUNDS
    assert verdict.check == ""


def test_a_host_read_is_fine_between_graphs_and_refused_inside_of_one() -> None:
    for mode in ("piecewise", "breakable"):
        assert judged(HostSync(), mode).outcome is Outcome.AGREES
    verdict = judged(HostSync(), "full")
    assert verdict.outcome is Outcome.CRASHED
    assert "CaptureError" in verdict.reason


@pytest.mark.parametrize("mode", CAPTURING)
def test_a_candidate_that_names_no_mode_declines(mode: str) -> None:
    verdict = judged(Reference(), mode)
    assert verdict.outcome is Outcome.DECLINED
    assert verdict.reason == f"mode {mode}: reference offers eager"


@pytest.mark.parametrize("splits_update", [False, True])
def test_what_ran_is_counted(splits_update: bool) -> None:
    case = replace(CASE, seed=4 + splits_update, replays=6)
    assert dict(judged(Ours(), "full", case).counts) == {"replays": 6}
    assert dict(judged(Ours(), "piecewise", case).counts) == {"replays": 12, "recompilations": 0}
    assert dict(judged(Ours(), "breakable", case).counts) == {"replays": 6, "recompilations": 0}
    assert dict(judged(Ours(), "compiled", case).counts) == {"recompilations": 0}


def random_cases(count: int) -> list[Case]:
    drawn = (random_group(7, index, INTERPRETED).cases(Model(extra=True), INTERPRETED) for index in range(1000))
    cheap = (case for group in drawn for case in group if total_work(case.spec, case.batch, INTERPRETED) <= 2)
    return [replace(case, check="answer", replays=3) for case in itertools.islice(cheap, count)]


@pytest.mark.parametrize("mode", CAPTURING)
@pytest.mark.parametrize("case", random_cases(20), ids=range(20))
def test_ours_agrees(case: Case, mode: str) -> None:
    verdict = judged(Ours(), mode, case)
    verdict.require()
    assert verdict.outcome is Outcome.AGREES
