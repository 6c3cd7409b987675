"""A step whose layers keep their caches in two groups, each with pages, a table and a slot mapping of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.campaign.lengths import COMPILED, INTERPRETED, total_work
from pageproof.oracle.campaign.pairs import Model
from pageproof.oracle.campaign.sampler import random_group
from pageproof.oracle.case import ATTENTION_OPERATIONS, MODES
from pageproof.oracle.case_layers import layers_of
from pageproof.oracle.case_rules import why_invalid
from pageproof.oracle.replays.sequence import steps_of
from pageproof.oracle.verdict import Verdict

from .graph_backends import DEVICES, is_capturing

SPEC = Spec(dtype="float16", num_kv_heads=1, head_size=16, head_size_v=16)
BATCH = BatchShape(query_lens=(1, 5, 0), seq_lens=(40, 5, 0))
CASE = Case(spec=SPEC, batch=BATCH, mode="full", replays=2, cache_groups=2, seed=4)
GRAPHS = ("full", "piecewise", "breakable")
on_devices = pytest.mark.parametrize("device", DEVICES)
ignores_torch = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11 warns of its own modules


class OneGroup(Ours):
    """A captured step keeps its metadata by the size of its bucket: the first layer's serves the layers after it."""

    name = "one group"

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.operation = operation
        self.kept: dict[int, Any] = {}

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == self.operation and is_capturing():
            name, rows = {"update_kv_cache": ("slot_mapping", "key"), "attention": ("batch", "q")}[operation]
            kept = self.kept.setdefault(arguments[rows].shape[0], arguments[name])
            arguments[name] = self._inside(kept, arguments["k_cache"])
        return super().call(operation, arguments)

    def _inside(self, given: Any, cache: Any) -> Any:
        """No place beyond this cache's pages: wrong values are to be found, no memory is to be broken."""
        num_blocks, block_size = cache.shape[:2]
        if self.operation == "update_kv_cache":
            return given.clamp(max=num_blocks * block_size - 1)
        return replace(given, block_table=given.block_table.clamp(0, num_blocks - 1))


def judged(candidate: Ours, device: str, case: Case = CASE) -> Verdict:
    return judge(case, candidate, device)


@on_devices
@ignores_torch
@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("seed", [4, 5])
def test_ours_agrees(mode: str, seed: int, device: str) -> None:
    verdict = judged(Ours(), device, replace(CASE, mode=mode, seed=seed))
    verdict.require()
    counts = dict(verdict.counts)
    assert counts["steps of two cache groups"] == 2
    if mode in GRAPHS:
        assert counts["replays"] == 2 * (3 if mode == "piecewise" else 1)


@on_devices
@pytest.mark.parametrize("mode", GRAPHS)
def test_slots_of_another_group_are_found(mode: str, device: str) -> None:
    verdict = judged(OneGroup("update_kv_cache"), device, replace(CASE, mode=mode))
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert "the caches after the KV update, in the other cache group (block_size 32, sliding_window" in verdict.reason


@on_devices
def test_a_table_of_another_group_is_found(device: str) -> None:
    verdict = judged(OneGroup("attention"), device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS
    assert "in the other cache group" in verdict.reason


@on_devices
@pytest.mark.parametrize("operation", ["update_kv_cache", "attention"])
def test_one_group_does_not_show_the_fault(operation: str, device: str) -> None:
    judged(OneGroup(operation), device, replace(CASE, cache_groups=1)).require()


def test_what_a_target_declines_of_the_other_group_it_declines() -> None:
    class FullOnly(Ours):
        def declines(self, case: Case) -> str | None:
            return "windows" if case.spec.sliding_window else None

    verdict = judge(CASE, FullOnly())
    assert (verdict.outcome, verdict.reason) == (Outcome.DECLINED, "the other cache group: windows")


def random_cases(count: int) -> list[Case]:
    sizes = replace(COMPILED, cases_per_key=4)
    drawn = [case for index in range(count) for case in random_group(7, index, sizes).cases(Model(extra=True), sizes)]
    replayed = [case for case in drawn if case.mode != MODES[0] and case.spec.operation in ATTENTION_OPERATIONS]
    return [replace(case, check="answer", cache_groups=2) for case in replayed if case.batch.num_requests < 1000]


def test_the_other_group_is_a_valid_case_with_the_same_requests() -> None:
    cases = random_cases(60)
    assert len(cases) > 50
    for case in cases:
        own, other = layers_of(case)
        assert own == replace(case, cache_groups=1)
        assert why_invalid(case) is why_invalid(other) is None
        assert (own.batch, own.recipe) == (other.batch, other.recipe)
        assert own.spec.block_size != other.spec.block_size
        assert (own.spec.sliding_window is None) != (other.spec.sliding_window is None)
        for step in steps_of(case).replayed:
            first, second = step.layers
            assert first.case.batch.query_lens == second.case.batch.query_lens
            assert first.case.batch.seq_lens == second.case.batch.seq_lens
            assert why_invalid(second.case) is None


@pytest.mark.parametrize(
    "case",
    [replace(CASE, mode="eager"), replace(CASE, cache_groups=3), CASE.with_spec(operation="update_kv_cache")],
    ids=["eager", "three", "update"],
)
def test_only_replayed_attention_has_groups(case: Case) -> None:
    assert str(why_invalid(case)).startswith("cache_groups: found ")


def test_a_share_of_the_replayed_cases_has_two() -> None:
    groups = [random_group(7, index, INTERPRETED) for index in range(200)]
    cases = [case for group in groups for case in group.cases(Model(extra=True), INTERPRETED)]
    replayed = [case for case in cases if case.mode != MODES[0] and case.spec.operation in ATTENTION_OPERATIONS]
    grouped = [case for case in cases if case.cache_groups == 2]
    assert 0.15 < len(grouped) / len(replayed) < 0.35
    for case in grouped:
        for layer in layers_of(case):
            assert total_work(layer.spec, layer.batch, INTERPRETED) <= 2 * max(INTERPRETED.work)
