"""Execution modes with real graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pageproof import optimized
from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.campaign.lengths import COMPILED
from pageproof.oracle.campaign.pairs import Model
from pageproof.oracle.campaign.sampler import random_group
from pageproof.oracle.case import MODES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch 2.11 warns of its own modules
]

CASE = Case(spec=Spec(dtype="float16"), batch=BatchShape(query_lens=(1, 40, 0), seq_lens=(900, 300, 0)), seed=3)


class Planted(Ours):
    """Our kernels; what is planted is wrong under a capture only."""

    longest = 0
    plan: Any = None

    def __init__(self, fault: str) -> None:
        super().__init__(name=fault)

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        capturing = torch.cuda.is_current_stream_capturing()
        if self.name == "skipped update" and operation == "update_kv_cache" and capturing:
            return None
        if operation != "attention":
            return super().call(operation, arguments)
        batch = arguments["batch"]
        if not capturing:
            self.longest = int(batch.seq_lens.max())
            columns = batch.max_blocks * arguments["k_cache"].shape[1]
            self.plan = optimized.make_plan(batch, (arguments["q"].shape[0], batch.num_requests, columns))
        if self.name == "frozen length":
            arguments["batch"] = replace(batch, seq_lens=batch.seq_lens.clamp(max=self.longest))
        if self.name == "stale plan":
            arguments["plan"] = self.plan
        return super().call(operation, arguments)


@pytest.mark.parametrize("fault", ["frozen length", "stale plan", "skipped update"])
def test_what_only_a_replay_does_wrong_is_found(fault: str) -> None:
    assert judge(CASE, Planted(fault), "cuda").outcome is Outcome.AGREES
    verdict = judge(replace(CASE, mode="full"), Planted(fault), "cuda")
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert "replay 1 of 6" in verdict.reason


def test_a_healthy_wrapper_is_not_accused() -> None:
    judge(replace(CASE, mode="full"), Planted("none"), "cuda").require()


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("index", range(12))
def test_ours_agrees(mode: str, index: int) -> None:
    for case in random_group(11, index, replace(COMPILED, cases_per_key=2)).cases(Model(extra=True), COMPILED):
        plain = replace(case, check="answer").with_spec(far_pages=False)
        verdict = judge(replace(plain, mode=mode), Ours(), "cuda")
        verdict.require()
        assert verdict.outcome is Outcome.AGREES
        counts = dict(verdict.counts)
        assert counts.pop("recompilations", 0) == 0
        layers = 2 if counts.pop("steps of two cache groups", 0) else 1
        if mode == "full_and_piecewise":
            assert counts["full replays"] + counts["piecewise replays"] // (layers + 1) == 6
        else:
            assert counts == {"piecewise": {"replays": 6 * (layers + 1)}, "compiled": {}}.get(mode, {"replays": 6})
