"""The logic of absorbed MLA for Hopper, run on a CPU by an emulation of Gluon (emulated_hopper.py).

Plans are the interpreter's: splits of 64 keys. On a GPU tests/test_hopper_mla.py judges the kernel itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pageproof.optimized import interpreter, tuning
from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.ours import Ours

from . import gluon_memory
from .emulated_hopper import emulate, emulated

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels are compiled here, not interpreted")

SPEC = Spec(
    operation="mla_attention",
    dtype="bfloat16",
    num_kv_heads=1,
    group_size=64,
    head_size=512,
    rope_head_size=64,
    block_size=16,
)
DECODE = BatchShape(query_lens=(1, 1, 0, 1), seq_lens=(65, 0, 0, 130), padding_tokens=1)
SPECULATIVE = BatchShape(query_lens=(3, 1), seq_lens=(130, 63))
# More new tokens than decode takes: with and without keys before them, in several items, and beside a decode.
PREFILL = BatchShape(query_lens=(17, 1, 40, 33), seq_lens=(150, 70, 40, 20), padding_tokens=1)
CASE = Case(spec=SPEC, batch=SPECULATIVE, seed=5)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements each launch of the kernel stored."""
    return emulate("mla", monkeypatch).stored


@pytest.fixture
def unsplit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits whose partial results would have to fit into one row: there are none."""
    monkeypatch.setattr(tuning, "INTERPRETER_LIMITS", replace(tuning.INTERPRETER_LIMITS, partial_rows=1))


def judge_taken(case: Case, launched: list[int]) -> None:
    judge(case, Ours()).require()
    assert launched


@pytest.mark.parametrize("block_size", [8, 48, 64])
def test_splits(block_size: int, launched: list[int]) -> None:
    judge_taken(replace(CASE, batch=DECODE).with_spec(block_size=block_size), launched)


@pytest.mark.usefixtures("unsplit")
@pytest.mark.parametrize("batch", [DECODE, SPECULATIVE], ids=["decode", "speculative"])
def test_whole_requests(batch: BatchShape, launched: list[int]) -> None:
    judge_taken(replace(CASE, batch=batch), launched)


RULES = [
    {"group_size": 71},
    {"group_size": 16, "sliding_window": 70},
    {"group_size": 5},
    {"group_size": 128, "dtype": "float16"},
    {"causal": False, "right_window": 1},
    {"sliding_window": 70, "sinks": True},
    {"softcap": 3.0, "alibi": True, "sinks": True},
    {"cache_layout": "slot_major", "sliding_window": 1},
]


@pytest.mark.parametrize("changes", RULES, ids=str)
def test_heads_rules_and_layouts_in_splits(changes: dict[str, Any], launched: list[int]) -> None:
    judge_taken(CASE.with_spec(**changes), launched)


@pytest.mark.parametrize(
    "changes",
    [{"group_size": 2}, {"group_size": 3}, {"group_size": 16, "sliding_window": 20, "sinks": True}, {"causal": False}],
    ids=str,
)
def test_prefill(changes: dict[str, Any], launched: list[int]) -> None:
    judge_taken(replace(CASE, batch=PREFILL).with_spec(**changes), launched)
    assert len(launched) == 2  # and the decode list


@pytest.mark.usefixtures("unsplit")
@pytest.mark.parametrize("changes", RULES[5:], ids=str)
def test_rules_in_whole_requests(changes: dict[str, Any], launched: list[int]) -> None:
    judge_taken(CASE.with_spec(**changes), launched)


def test_rows_that_are_not_cleared_are_found(launched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated("mla_products"), "clear_rows", lambda *_: None)
    assert judge(CASE, Ours()).outcome is Outcome.POISONED
    assert launched


@pytest.mark.usefixtures("launched")
def test_a_producer_that_waits_for_the_wrong_phase_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second work of a program would be copied over the first."""
    producer = emulated("mla_producer")
    fill = producer.fill_left
    monkeypatch.setattr(producer, "fill_left", lambda *args: fill(*args[:3], 0, *args[4:]))
    monkeypatch.setattr(gluon_memory, "PATIENCE", 0.5)
    assert judge(CASE, Ours()).outcome is Outcome.CRASHED
