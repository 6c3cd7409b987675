"""Absorbed MLA decode on Hopper, judged: heads x tokens x blocks x lengths x rules, plain and in captured steps.

Every case says that the Hopper kernel took it: a step that goes to the portable kernel proves nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pageproof.optimized import hopper_mla
from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.case import MODES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch 2.11 warns of its own modules
]

SPEC = Spec(
    operation="mla_attention",
    dtype="bfloat16",
    num_kv_heads=1,
    group_size=128,
    head_size=512,
    rope_head_size=64,
    block_size=64,
)
# Around tiles of 64 keys, steps of 128 and splits of 256; no keys, fewer keys than new tokens, and a padding request.
DECODE_LENGTHS = (1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1000, 0, 0)
DECODE = BatchShape(query_lens=(*(1,) * 14, 0), seq_lens=DECODE_LENGTHS, padding_tokens=2)
SPECULATIVE = BatchShape(query_lens=(2, 3, 16, 1, 5, 4, 0), seq_lens=(2, 64, 300, 129, 3, 1025, 0), padding_tokens=1)
PREFILL = BatchShape(query_lens=(17, 64, 200, 65, 0), seq_lens=(1000, 64, 333, 20, 0), padding_tokens=1)
LONG = BatchShape(query_lens=(1, 2), seq_lens=(9000, 40))
MIXED = BatchShape(query_lens=(1, 70, 3), seq_lens=(500, 200, 129))
CASE = Case(spec=SPEC, batch=DECODE, seed=7)


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.fail("these tests are for a GPU of compute capability 9.0")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The query heads of each launch of the Hopper kernel."""
    heads: list[int] = []
    run: Callable[..., None] = hopper_mla.run

    def counted(step: Any, *rest: Any) -> None:
        heads.append(step.queries.main.shape[1])
        run(step, *rest)

    monkeypatch.setattr(hopper_mla, "run", counted)
    return heads


def judge_taken(case: Case, taken: list[int]) -> None:
    judge(case, Ours(), "cuda").require()
    assert case.spec.group_size in taken


@pytest.mark.parametrize(
    "batch", [DECODE, SPECULATIVE, LONG, MIXED, PREFILL], ids=["decode", "speculative", "long", "mixed", "prefill"]
)
@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 48, 64, 128])
def test_blocks_and_lengths(block_size: int, batch: BatchShape, taken: list[int]) -> None:
    judge_taken(replace(CASE, batch=batch).with_spec(block_size=block_size), taken)


@pytest.mark.parametrize("batch", [DECODE, SPECULATIVE, PREFILL], ids=["decode", "speculative", "prefill"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("heads", [1, 5, 8, 16, 64, 71, 128, 192])
def test_heads_and_formats(heads: int, dtype: str, batch: BatchShape, taken: list[int]) -> None:
    judge_taken(replace(CASE, batch=batch).with_spec(group_size=heads, dtype=dtype, block_size=16), taken)


@pytest.mark.parametrize(
    "batch", [DECODE, SPECULATIVE, LONG, PREFILL], ids=["decode", "speculative", "long", "prefill"]
)
@pytest.mark.parametrize(
    "rules",
    [
        {"causal": False},
        {"causal": False, "right_window": 1},
        {"causal": False, "right_window": 0, "sliding_window": 70},
        {"sliding_window": 1},
        {"sliding_window": 64},
        {"sliding_window": 65},
        {"sliding_window": 300},
        {"softcap": 3.0},
        {"alibi": True},
        {"sinks": True},
        {"softcap": 3.0, "alibi": True, "sinks": True, "sliding_window": 100},
    ],
    ids=str,
)
def test_rules(rules: dict[str, Any], batch: BatchShape, taken: list[int]) -> None:
    judge_taken(replace(CASE, batch=batch).with_spec(block_size=16, **rules), taken)


@pytest.mark.parametrize("recipe", ["needle", "extreme", "census", "one_hot", "cancel"])
def test_recipes(recipe: str, taken: list[int]) -> None:
    judge_taken(replace(CASE, batch=SPECULATIVE, recipe=recipe), taken)


@pytest.mark.parametrize("layout", ["sliced", "slot_major"])
def test_layouts(layout: str, taken: list[int]) -> None:
    judge_taken(CASE.with_spec(cache_layout=layout, block_size=16), taken)


def test_pages_past_two_to_the_31_elements(taken: list[int]) -> None:
    judge_taken(CASE.with_spec(far_pages=True), taken)


@pytest.mark.parametrize("check", ["repeat", "interference", "request_order", "page_order", "reads"])
def test_relations(check: str, taken: list[int]) -> None:
    judge_taken(replace(CASE, batch=SPECULATIVE, check=check), taken)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "eager"])
@pytest.mark.parametrize("rules", [{}, {"sliding_window": 100, "sinks": True}], ids=["plain", "window and sinks"])
def test_modes(mode: str, rules: dict[str, Any], taken: list[int]) -> None:
    batch = BatchShape(query_lens=(1, 4, 2, 40, 0), seq_lens=(700, 400, 64, 90, 0), padding_tokens=1)
    judge_taken(replace(CASE, batch=batch, mode=mode, replays=4).with_spec(block_size=16, **rules), taken)


@pytest.mark.parametrize("requests", [150, 300])
def test_programs_with_several_works(requests: int, taken: list[int]) -> None:
    """More works than multiprocessors, some without a key: buffers and barriers go from one to the next."""
    generator = torch.Generator().manual_seed(requests)
    lengths = torch.randint(0, 700, (requests,), generator=generator)
    batch = BatchShape(query_lens=(1,) * requests, seq_lens=tuple(lengths.tolist()))
    judge_taken(replace(CASE, batch=batch).with_spec(block_size=16), taken)


class Shorter(Ours):
    """Without each request's last key."""

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        batch = arguments["batch"]
        arguments["batch"] = replace(batch, seq_lens=batch.seq_lens - 1)
        return super().call(operation, arguments)


def test_a_key_that_is_left_out_is_found(taken: list[int]) -> None:
    batch = BatchShape(query_lens=(1, 1), seq_lens=(300, 65))
    assert judge(replace(CASE, batch=batch), Shorter(), "cuda").outcome is not Outcome.AGREES
    assert taken
