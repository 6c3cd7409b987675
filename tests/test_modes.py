"""Execution modes: ours agrees in every one, and what only a replay does wrong is found and said."""

from __future__ import annotations

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
from pageproof.oracle.case import MODES, OPERATIONS
from pageproof.oracle.execution.graphs.emulation import EmulatedBackend
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


class SkippedUpdate(Ours):
    """No KV update in a capture that began without slots."""

    name = "skipped update"

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "update_kv_cache" and is_capturing():
            return None
        return super().call(operation, arguments)


class FullOfPadding(Ours):
    """A negative slot writes the last one of the pool: only padded slots show it."""

    name = "last slot"

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "update_kv_cache":
            slots, cache = arguments["slot_mapping"], arguments["k_cache"]
            arguments["slot_mapping"] = slots.remainder(cache.shape[0] * cache.shape[1])
        return super().call(operation, arguments)


def judged(candidate: Any, mode: str = "full", case: Case = CASE) -> Verdict:
    return judge(replace(case, mode=mode), candidate)


@pytest.mark.parametrize("make", [FrozenLength, StalePlan, NewBuffer, SkippedUpdate], ids=lambda make: make.__name__)
def test_what_only_a_replay_does_wrong_is_found(make: Callable[[], Ours]) -> None:
    candidate = make()
    assert judge(CASE, candidate).outcome is Outcome.AGREES
    verdict = judged(candidate)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert verdict.check == "full"
    assert "replay 1 of 6" in verdict.reason or "replay 2 of 6" in verdict.reason
