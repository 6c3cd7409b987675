"""The logic of the prefill for Hopper, run on a CPU by an emulation of Gluon: whatever a GPU is needed for is left out.

The kernels around it (plan, decode, merge) run in Triton's interpreter, and the oracle judges the whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pageproof import optimized
from pageproof.optimized import hopper, hopper_prefill, interpreter
from pageproof.optimized.kernels.hopper.sizes import ORDERS
from pageproof.optimized.tuning import plan_limits
from pageproof.oracle import BatchShape, Case, Spec, judge
from pageproof.oracle.adapters import find
from pageproof.oracle.building.tensors import build
from pageproof.oracle.case import FLOAT8
from pageproof.oracle.case_rules import why_invalid

from .emulated_hopper import emulate

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels are compiled here, not interpreted")

BATCH = BatchShape(query_lens=(17, 1, 0, 20, 60), seq_lens=(150, 9, 0, 7, 131), padding_tokens=3, table_slack=1)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements each launch of the kernel stored."""
    return emulate("prefill", monkeypatch).stored


def agree(spec: Spec, *, batch: BatchShape = BATCH, recipes: tuple[str, ...] = ("needle",)) -> None:
    for seed, recipe in enumerate(recipes):
        case = Case(spec=spec, batch=batch, recipe=recipe, seed=seed)
        assert why_invalid(case) is None
        judge(case, find("ours"), torch.device("cpu")).require()


RULES: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"sliding_window": 1},
    {"sliding_window": 20, "block_size": 24},
    {"causal": False, "sliding_window": 30, "right_window": 2},
    {"causal": False, "right_window": 0},
    {"softcap": 2.0, "alibi": True, "sinks": True, "sliding_window": 70},
    {"out_dtype": FLOAT8, "scales": "head"},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_rules(launched: list[int], rules: dict[str, Any]) -> None:
    agree(Spec(**{"group_size": 3, "head_size": 64, "head_size_v": 64, "block_size": 8} | rules))
    assert launched


def test_a_window_begins_in_another_tile_for_the_last_row_than_for_the_first(launched: list[int]) -> None:
    """Keys 91 to 340 are those of the first row, 150 to 399 of the last."""
    spec = Spec(num_kv_heads=1, group_size=1, sliding_window=250)
    batch = BatchShape(query_lens=(60,), seq_lens=(400,))
    agree(spec, batch=batch, recipes=("census", "tagged", "normal"))
    assert len(launched) == 3


# head_size, head_size_v, block_size, group_size, num_kv_heads
SIZES = [
    (64, 64, 8, 1, 2),
    (128, 128, 16, 4, 1),
    (96, 80, 24, 5, 1),
    (192, 128, 544, 7, 1),
    (256, 40, 48, 2, 1),
    (40, 256, 256, 9, 1),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_heads_pages_and_groups(launched: list[int], sizes: tuple[int, ...], dtype: str) -> None:
    names = ("head_size", "head_size_v", "block_size", "group_size", "num_kv_heads")
    agree(Spec(dtype=dtype, **dict(zip(names, sizes, strict=True))))
    assert launched


@pytest.mark.parametrize("layout", ["HND", "interleaved", "head_major", "sliced", "slot_major"])
def test_layouts(launched: list[int], layout: str) -> None:
    agree(Spec(cache_layout=layout, odd_strides=layout == "interleaved"))
    assert launched


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("block_size", [8, 48, 128])
def test_what_lies_beyond_ends_of_pages_and_windows_is_cleared(
    launched: list[int], block_size: int, window: int | None
) -> None:
    lengths = tuple(range(120, 139, 3))
    batch = BatchShape(query_lens=(17,) * len(lengths), seq_lens=lengths)
    spec = Spec(num_kv_heads=1, group_size=1, block_size=block_size, sliding_window=window)
    agree(spec, batch=batch, recipes=("tagged",))
    assert len(launched) == 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [1, 3, 9])
def test_every_order_takes_all_rows_once(
    launched: list[int], group_size: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that nobody took would be unwritten. Each brings head_size_v elements, and one of lse."""
    choose = hopper_prefill.tile_of
    monkeypatch.setattr(hopper_prefill, "tile_of", lambda shape: replace(choose(shape), order=order))
    spec = Spec(group_size=group_size)
    agree(spec)
    rows = sum(n for n in BATCH.query_lens if n > plan_limits().decode_tokens) * spec.num_query_heads
    assert launched == [rows * (spec.head_size_v + 1)]


def test_a_step_without_prefill_takes_no_rows(launched: list[int]) -> None:
    """Programs look up their first work whether there is one or not."""
    agree(Spec(), batch=BatchShape(query_lens=(1,) * 20, seq_lens=tuple(range(1, 21))))
    assert launched == [0]


@pytest.mark.parametrize("rules", [{}, {"softcap": 3.0, "alibi": True}, {"sliding_window": 30}], ids=str)
def test_softmax_scales_of_any_sign(
    launched: list[int], rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale of 0 is that of queries of 0, a negative one, which is not taken, that of negated ones: bit for bit."""
    case = Case(spec=Spec(**rules), batch=BATCH, seed=4)

    def answer(scale: float, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = dict(build(case, "cpu").arguments)
        arguments["q"] = torch.where(arguments["q"].isfinite(), arguments["q"] * factor, arguments["q"])
        arguments["rules"] = replace(arguments["rules"], softmax_scale=scale)
        return optimized.attention(**arguments | {"out": None, "lse": None})

    def same(left: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]) -> bool:
        return all(map(torch.equal, left, right))

    assert same(answer(0.0, 1.0), answer(0.1, 0.0))
    assert not same(answer(0.0, 1.0), answer(0.1, 1.0))
    assert len(launched) == 4
    negative = answer(-0.1, 1.0)
    assert len(launched) == 4
    monkeypatch.setattr(hopper, "why_not_compiled", lambda _architecture: "the portable kernel is compared with")
    assert same(negative, answer(0.1, -1.0))
    assert not same(negative, answer(0.1, 1.0))
