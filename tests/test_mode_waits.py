"""The device is asked once, after the last replay, unless what a replay left is too large to be kept."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.building import guards
from pageproof.oracle.case import MODES
from pageproof.oracle.judging import ReplayRun, begin, finish
from pageproof.oracle.replays import looks

from .graph_backends import DEVICES

BATCH = BatchShape(query_lens=(1, 1, 4, 1, 1), seq_lens=(9, 4, 17, 3, 1), padding_tokens=2)
CASE = Case(spec=Spec(operation="merge_states", dtype="float16"), batch=BATCH, mode="full", seed=5)
LIMITS = [(guards, "SMALL_BYTES"), (looks, "WAITING_BYTES")]
on_devices = pytest.mark.parametrize("device", DEVICES)


class Merging(Reference):
    """The reference's merge, which reads nothing on the host."""

    modes = MODES


class WrongAtTheThirdReplay(Reference):
    """The table changes, which the next step's takes the place of. A capture takes two calls, and so does a step."""

    modes = MODES

    def __init__(self) -> None:
        self.calls = 0

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        returned = super().call(operation, arguments)
        self.calls += operation == "attention"
        if operation == "attention" and self.calls == 2 * 2 + 2 * 2 + 1:
            arguments["batch"].block_table.neg_()
        return returned


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many replays at a time the device is asked whether they left what they have to leave."""
    asked: list[int] = []
    changed = looks.Looks.changed

    def counted(mine: looks.Looks) -> list[looks.Look]:
        asked.extend([len(mine)] if len(mine) else [])
        return changed(mine)

    monkeypatch.setattr(looks.Looks, "changed", counted)
    return asked


@on_devices
@pytest.mark.parametrize("mode", ["full", "piecewise", "breakable", "full_and_piecewise"])
def test_one_question_about_all_replays(device: str, mode: str, questions: list[int]) -> None:
    assert judge(replace(CASE, mode=mode), Merging(), device).outcome is Outcome.AGREES
    assert questions == [CASE.replays]


@on_devices
@pytest.mark.parametrize("limit", LIMITS, ids=["large", "many"])
def test_one_for_each_replay_where_that_is_too_large(
    limit: tuple[ModuleType, str], device: str, questions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*limit, 0)
    assert judge(CASE, Merging(), device).outcome is Outcome.AGREES
    assert questions == [1] * CASE.replays


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # which torch calls a prototype
@pytest.mark.skipif(not torch.cuda.is_available(), reason="nothing to wait for without a CUDA device")
@pytest.mark.parametrize("mode", ["full", "piecewise", "breakable", "full_and_piecewise"])
@pytest.mark.parametrize("operation", ["merge_states", "attention", "update_kv_cache"])
def test_nothing_waits_while_a_case_is_replayed(mode: str, operation: str) -> None:
    case = replace(CASE, mode=mode).with_spec(operation=operation)
    judge(case, Ours(), "cuda").require()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        begun = begin(case, Ours(), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert isinstance(begun, ReplayRun)
    finish(begun).require()


def test_all_that_is_kept_of_replays_is_counted() -> None:
    begun = begin(CASE, Merging(), "cpu")
    assert isinstance(begun, ReplayRun)
    waiting = begun.replayed.matrix.looks._looks
    parts = [small for look in waiting for small in (*look.small, *(layer.small for layer in look.guards))]
    parts += [each.found for look in waiting for each in look.seen]
    kept = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    assert sum(kept.values()) == begun.replayed.matrix.looks.bytes


@on_devices
@pytest.mark.parametrize("limit", [None, *LIMITS], ids=["all", "large", "many"])
def test_what_was_wrong_is_told_of_its_replay(
    limit: tuple[ModuleType, str] | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        monkeypatch.setattr(*limit, 0)
    spec = Spec(dtype="float16", num_kv_heads=1, head_size=16, head_size_v=16)
    verdict = judge(replace(CASE, spec=spec, mode="piecewise"), WrongAtTheThirdReplay(), device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert "replay 3 of 6" in verdict.reason
    assert "block_table is only to be read and changed" in verdict.reason
