"""The device is waited for once, after the last replay, unless what a replay left is too large to be kept."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.building import guards
from pageproof.oracle.case import MODES
from pageproof.oracle.replays import looks
from pageproof.oracle.replays.machines import machine_of

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


def waits_of(device: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.device, ...]]:
    """One for each time that the device is waited for from now on."""
    backend = machine_of(torch.device(device), splits_update=False).backend
    owner = torch.cuda if device == "cuda" else backend
    synchronize, waits = owner.synchronize, []

    def counted(*devices: torch.device) -> None:
        waits.append(devices)
        synchronize(*devices)

    monkeypatch.setattr(owner, "synchronize", counted)
    return waits


@on_devices
@pytest.mark.parametrize("mode", ["full", "piecewise", "breakable", "full_and_piecewise"])
def test_one_wait_for_all_captures_and_replays(device: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = waits_of(device, monkeypatch)
    assert judge(replace(CASE, mode=mode), Merging(), device).outcome is Outcome.AGREES
    assert len(waits) == 1


@on_devices
@pytest.mark.parametrize(
    ("module", "limit"), [(guards, "SMALL_BYTES"), (looks, "WAITING_BYTES")], ids=["large", "many"]
)
def test_one_for_each_replay_where_that_is_too_large(
    module: ModuleType, limit: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, limit, 0)
    waits = waits_of(device, monkeypatch)
    assert judge(CASE, Merging(), device).outcome is Outcome.AGREES
    assert len(waits) == CASE.replays


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
