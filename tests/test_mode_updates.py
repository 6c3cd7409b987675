"""The KV update of a captured step: what only a replay does wrong is found in every mode that captures it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.case import MODES
from pageproof.oracle.verdict import Verdict

from .graph_backends import DEVICES, is_capturing

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch 2.11 warns of its own modules
]

SPEC = Spec(dtype="float16", num_kv_heads=1, head_size=16, head_size_v=16)
BATCH = BatchShape(query_lens=(1, 5, 0), seq_lens=(20, 5, 0))
CAPTURED, BETWEEN = (Case(spec=SPEC, batch=BATCH, replays=1, seed=seed) for seed in (4, 5))  # where the update runs
FOUR = replace(CAPTURED, replays=4)
GRAPHS = ("full", "piecewise", "breakable")


class Faulty(Ours):
    """Our kernels; the slots that a captured update writes are not those it was given."""

    name = "faulty"

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "update_kv_cache" and is_capturing():
            slots = self.slots(arguments["slot_mapping"], arguments["k_cache"])
            if slots is None:
                return None
            arguments["slot_mapping"] = slots
        return super().call(operation, arguments)

    def slots(self, given: Tensor, cache: Tensor) -> Tensor | None:
        return given


class AbsentSlots(Faulty):
    """There is no slot mapping when a step is captured, so its update is skipped for ever."""

    def slots(self, given: Tensor, cache: Tensor) -> Tensor | None:
        return None


class PaddingWrites(Faulty):
    """A row without a slot is written to the first one."""

    def slots(self, given: Tensor, cache: Tensor) -> Tensor | None:
        return given.clamp(min=0)


class WrittenOnce(Faulty):
    """A slot that holds something is not written again, as if nothing in it could have been rejected."""

    def slots(self, given: Tensor, cache: Tensor) -> Tensor | None:
        live = given.clamp(min=0)
        held = cache[live // cache.shape[1], live % cache.shape[1]]
        return torch.where(held.isfinite().flatten(1).all(1), -1, given)


class LateUpdate(Ours):
    """A captured step writes its caches after it has read them."""

    name = "late update"
    late: dict[str, Any] | None = None

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "update_kv_cache" and is_capturing():
            self.late = arguments
            return None
        super().call(operation, arguments)
        if operation == "attention" and is_capturing() and self.late is not None:
            super().call("update_kv_cache", self.late)
        return None


def judged(candidate: Ours, mode: str, device: str, case: Case = CAPTURED) -> Verdict:
    return judge(replace(case, mode=mode), candidate, device)


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_healthy_wrapper_is_not_accused(mode: str, device: str) -> None:
    judged(Faulty(), mode, device, FOUR).require()


@pytest.mark.parametrize("mode", GRAPHS)
@pytest.mark.parametrize("make", [AbsentSlots, PaddingWrites], ids=lambda make: make.__name__)
def test_wrong_slots_are_found_in_every_mode_that_captures_the_update(
    make: type[Faulty], mode: str, device: str
) -> None:
    verdict = judged(make(), mode, device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert f"mode {mode}, replay 1 of 1" in verdict.reason
    assert "a plain call agrees" in verdict.reason


@pytest.mark.parametrize("mode", ["piecewise", "breakable"])
def test_an_update_between_the_graphs_sees_the_slots_of_every_step(mode: str, device: str) -> None:
    judged(AbsentSlots(), mode, device, BETWEEN).require()


def test_an_update_that_the_compiler_does_not_see_is_missed(device: str) -> None:
    verdict = judged(AbsentSlots(), "compiled", device)
    assert verdict.outcome is Outcome.CRASHED
    assert "OperatorsMoved: compiled: found the operators" in verdict.reason


@pytest.mark.parametrize("mode", GRAPHS)
def test_slots_of_rejected_tokens_are_written_again(mode: str, device: str) -> None:
    """Nothing but the replay in which the slots hold what was rejected shows the fault."""
    verdict = judged(WrittenOnce(), mode, device, FOUR)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert "replay 4 of 4 (the same batch, rejected: other values in its slots" in verdict.reason
    judged(WrittenOnce(), mode, device, replace(CAPTURED, replays=3)).require()


def test_a_step_reads_what_it_has_written(device: str) -> None:
    """Afterwards the caches are right; the outputs were made from what lay there before."""
    verdict = judged(LateUpdate(), "full", device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert {mismatch.output for mismatch in verdict.mismatches} == {"out", "lse"}


def test_the_compiled_step_keeps_the_order_of_the_plain_one(device: str) -> None:
    verdict = judged(LateUpdate(), "compiled", device)
    assert verdict.outcome is Outcome.CRASHED
    assert "OperatorsMoved" in verdict.reason
