"""A replay has the bits of a plain call, its tail saw finished outputs, and results kept from another graph stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.case import MODES
from pageproof.oracle.execution.modes import RUNNERS, Full, Machine
from pageproof.oracle.execution.program import Program

from .graph_backends import DEVICES, is_capturing

BATCH = BatchShape(query_lens=(1, 1, 4, 1, 1), seq_lens=(9, 4, 17, 3, 1), padding_tokens=2)
CASE = Case(spec=Spec(operation="merge_states", dtype="float16"), batch=BATCH, mode="full", seed=5)


class Merging(Reference):
    """The reference's merge, which reads nothing on the host."""

    modes = MODES


class OneBitOff(Merging):
    """Far inside of every bound, in a capture only."""

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        out, lse = super().call(operation, arguments)
        off = torch.where(lse.isfinite(), torch.nextafter(lse, torch.zeros_like(lse)), lse)
        return out, off if is_capturing() else lse


class AnotherForm(Merging):
    """What is captured is right; a plain call returns another dtype, be it of the same bytes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        out, lse = super().call(operation, arguments)
        other = out.view(self.dtype) if self.dtype.itemsize == out.itemsize else out.to(self.dtype)
        return out if is_capturing() else other, lse


class Remembering(Reference):
    """Rows that were stored in these caches once are taken to be there still."""

    modes = MODES

    def __init__(self) -> None:
        self.stored: set[tuple[int, bytes]] = set()

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        rows = arguments["key"].cpu().view(torch.uint8).flatten().numpy().tobytes()
        known = (arguments["k_cache"].data_ptr(), rows)
        if known not in self.stored:
            self.stored.add(known)
            super().call(operation, arguments)


class WrongOnce(Reference):
    """In the plain call after the first replay; two calls come before for each of the two captures."""

    modes = MODES
    calls = 0

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        super().call(operation, arguments)
        self.calls += 1
        if self.calls == 2 * 2 + 2:
            arguments["k_cache"].zero_()


class EarlyTail(Full):
    """What the tail made is of outputs that were not finished."""

    def run(self) -> None:
        super().run()
        self.results[0]["lse"].add_(1.0)


class Overwriting(Full):
    """Replays write where an earlier capture's results lie."""

    earlier: list[Full]

    def __init__(self, layers: Sequence[Program], machine: Machine) -> None:
        super().__init__(layers, machine)
        self.before = list(self.earlier)
        self.earlier.append(self)

    def run(self) -> None:
        super().run()
        for runner in self.before:
            runner.results[0]["out"].zero_()


@pytest.mark.parametrize("device", DEVICES)
def test_other_bits_than_those_of_a_plain_call_are_found(device: str) -> None:
    assert judge(replace(CASE, mode="eager"), OneBitOff(), device).outcome is Outcome.AGREES
    verdict = judge(CASE, OneBitOff(), device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert "replay 1 of 6" in verdict.reason
    assert "other bits than a plain call's" in verdict.reason
    assert [mismatch.output for mismatch in verdict.mismatches] == ["lse"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int16, torch.float64])
def test_a_plain_call_of_another_form_is_found(dtype: torch.dtype, device: str) -> None:
    verdict = judge(CASE, AnotherForm(dtype), device)
    assert verdict.outcome is Outcome.DIFFERS
    assert [mismatch.output for mismatch in verdict.mismatches] == ["out"]


@pytest.mark.parametrize("device", DEVICES)
def test_of_a_plain_update_that_was_wrong_once_the_replay_is_not_said_to_be(device: str) -> None:
    case = replace(CASE, mode="piecewise", replays=3).with_spec(operation="update_kv_cache")
    verdict = judge(case, WrongOnce(), device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert "replay 1 of 3" in verdict.reason
    assert verdict.reason.endswith("differs: other bits than a plain call's")


@pytest.mark.parametrize("device", DEVICES)
def test_a_tail_that_saw_something_else_is_found(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNNERS, "full", EarlyTail)
    verdict = judge(CASE, Merging(), device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert "what reads the outputs" in verdict.reason


@pytest.mark.parametrize("device", DEVICES)
def test_results_that_were_kept_from_another_graph_stay(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay 3 is the first of the small bucket, which is captured after the large one."""
    monkeypatch.setattr(Overwriting, "earlier", [], raising=False)
    monkeypatch.setitem(RUNNERS, "full", Overwriting)
    judge(replace(CASE, replays=2), Merging(), device).require()
    monkeypatch.setattr(Overwriting, "earlier", [])
    verdict = judge(CASE, Merging(), device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert "replay 3 of 6" in verdict.reason
    assert "results of another graph, held during this replay" in verdict.reason


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_that_comes_again_is_done_again(device: str) -> None:
    """What is known of it from the first time is its answer only; its memory is as it was then."""
    case = replace(CASE, mode="piecewise").with_spec(operation="update_kv_cache")
    judge(replace(case, replays=5), Remembering(), device).require()
    verdict = judge(case, Remembering(), device)
    assert verdict.outcome is Outcome.DIFFERS  # as in a second plain call
    assert dict(verdict.counts)["replays"] == 2 * 6  # a graph on either side of each call
