"""The device is waited for once after a replay, and nowhere while one is captured."""

from __future__ import annotations

import pytest
import torch

from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.case import MODES
from pageproof.oracle.replays.machines import machine_of

from .graph_backends import DEVICES

BATCH = BatchShape(query_lens=(1, 1, 4, 1, 1), seq_lens=(9, 4, 17, 3, 1), padding_tokens=2)
CAPTURES = {"full_and_piecewise": 4}  # otherwise one for each of two buckets


class Merging(Reference):
    """The reference's merge, which reads nothing on the host."""

    modes = MODES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["full", "piecewise", "breakable", "full_and_piecewise"])
def test_one_wait_for_each_capture_and_each_replay(device: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = machine_of(torch.device(device), splits_update=False).backend
    owner = torch.cuda if device == "cuda" else backend
    synchronize, waits = owner.synchronize, []

    def counted(*devices: torch.device) -> None:
        waits.append(devices)
        synchronize(*devices)

    monkeypatch.setattr(owner, "synchronize", counted)
    case = Case(spec=Spec(operation="merge_states", dtype="float16"), batch=BATCH, mode=mode, seed=5)
    assert judge(case, Merging(), device).outcome is Outcome.AGREES
    assert len(waits) == CAPTURES.get(mode, 2) + case.replays
