"""Prefill on Hopper agrees with the reference over rules, sizes, pages, layouts and lengths around the edges of tiles.

On other GPUs the same cases run through the portable kernel. `taken` says which it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from pageproof import optimized
from pageproof.optimized import hopper, hopper_prefill
from pageproof.optimized.tuning import architecture
from pageproof.oracle import BatchShape, Case, Spec, judge
from pageproof.oracle.adapters import find
from pageproof.oracle.building.tensors import build
from pageproof.oracle.case import FLOAT8, MODES
from pageproof.oracle.case_rules import why_invalid

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
# A tile has 128 rows and 64 or 128 keys. The last request but one has more new tokens than keys.
EDGES = BatchShape(
    query_lens=(17, 32, 33, 64, 65, 130, 1, 0, 20, 257),
    seq_lens=(17, 128, 129, 255, 256, 700, 90, 0, 7, 257),
    padding_tokens=3,
    table_slack=2,
)
ONE = BatchShape(query_lens=(40,), seq_lens=(77,), spare_blocks=False)
LONG = BatchShape(query_lens=(1000, 18, 2048, 300), seq_lens=(3001, 4096, 2048, 300))
BOTH = ("normal", "needle")
HEADS_OF_128: dict[str, Any] = {"group_size": 4, "head_size": 128, "head_size_v": 128}


@contextmanager
def taken(expected: bool = True) -> Iterator[None]:
    """The prefills that are launched within take the kernel for Hopper, where there is one; or none does."""
    launches = 0
    original = hopper_prefill.run

    def counted(*arguments: Any) -> None:
        nonlocal launches
        launches += 1
        original(*arguments)

    hopper_prefill.run = counted
    try:
        yield
    finally:
        hopper_prefill.run = original
    assert (launches > 0) is (expected and architecture(CUDA) == "sm_90")


def agree(
    spec: Spec, batch: BatchShape = EDGES, *, recipes: tuple[str, ...] = ("normal", "needle"), **rest: Any
) -> None:
    for seed, recipe in enumerate(recipes):
        case = Case(spec=spec, batch=batch, recipe=recipe, seed=seed, **rest)
        assert why_invalid(case) is None
        judge(case, find("ours"), CUDA).require()


# head_size, head_size_v, block_size, group_size, num_kv_heads
SIZES = [
    (64, 64, 8, 1, 2),
    (128, 128, 16, 4, 2),
    (128, 128, 128, 2, 8),
    (96, 96, 24, 3, 1),
    (112, 112, 48, 5, 2),
    (80, 96, 32, 2, 3),
    (192, 128, 64, 7, 1),
    (256, 256, 16, 8, 1),
    (64, 128, 128, 1, 1),
    (128, 64, 256, 16, 1),
    (40, 48, 544, 6, 2),
    (256, 64, 8, 1, 4),
    (64, 256, 16, 71, 1),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_heads_pages_and_groups(sizes: tuple[int, ...], dtype: str) -> None:
    names = ("head_size", "head_size_v", "block_size", "group_size", "num_kv_heads")
    with taken():
        agree(Spec(dtype=dtype, **dict(zip(names, sizes, strict=True))), recipes=("normal", "needle", "tagged"))


RULES: list[dict[str, Any]] = [
    {"causal": False},
    *({"sliding_window": window} for window in (1, 2, 15, 16, 17, 127, 128, 129, 300)),
    *({"causal": False, "right_window": window} for window in (0, 5, 128, 500)),
    {"causal": False, "sliding_window": 9, "right_window": 3},
    {"causal": False, "sliding_window": 140},
    {"softcap": 30.0},
    {"softcap": 0.5, "causal": False},
    {"alibi": True},
    {"alibi": True, "sinks": True, "sliding_window": 33},
    {"sinks": True},
    {"softcap": 20.0, "alibi": True, "sinks": True, "sliding_window": 100},
    {"out_dtype": FLOAT8},
    {"out_dtype": FLOAT8, "scales": "tensor", "sinks": True},
    {"out_dtype": FLOAT8, "scales": "head", "softcap": 5.0},
]


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_rules(rules: dict[str, Any], head_size: int) -> None:
    spec = Spec(group_size=4, head_size=head_size, head_size_v=head_size, **rules)
    with taken():
        agree(spec, recipes=("normal", "needle", "tagged", "extreme"))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("block_size", [8, 16, 48, 64, 128, 256])
def test_ends_of_pages_and_windows_hide_what_lies_beyond(block_size: int, window: int | None) -> None:
    """Every length of a last page, and every place where a window may begin within one."""
    lengths = tuple(range(100, 100 + 130, 3))
    batch = BatchShape(query_lens=(17,) * len(lengths), seq_lens=lengths)
    with taken():
        agree(Spec(block_size=block_size, sliding_window=window, **HEADS_OF_128), batch, recipes=("tagged", "normal"))


@pytest.mark.parametrize("odd_strides", [False, True])
@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved", "head_major", "sliced", "slot_major", "transposed"])
def test_layouts(layout: str, odd_strides: bool) -> None:
    spec = Spec(cache_layout=layout, odd_strides=odd_strides, **HEADS_OF_128)
    expected = layout == "interleaved" if odd_strides else layout != "transposed"
    for batch in (EDGES, ONE):
        with taken(expected):
            agree(spec, batch)


def test_what_is_left_to_the_portable_kernel() -> None:
    for spec in (
        Spec(dtype="float32", **HEADS_OF_128),
        Spec(kv_dtype=FLOAT8, **HEADS_OF_128),
        Spec(block_size=4, **HEADS_OF_128),
        Spec(query_bias="dense", bias_width=40, **HEADS_OF_128),
    ):
        with taken(False):
            agree(spec)


@pytest.mark.parametrize("rules", [{}, {"sliding_window": 700, "sinks": True}, {"causal": False}], ids=str)
def test_long_requests(rules: dict[str, Any]) -> None:
    with taken():
        agree(Spec(**HEADS_OF_128, **rules), LONG)


@pytest.mark.parametrize("check", ["repeat", "interference", "page_order", "request_order"])
@pytest.mark.parametrize("rules", [{}, {"sliding_window": 200}], ids=str)
def test_bits_do_not_depend_on_when_or_where(rules: dict[str, Any], check: str) -> None:
    with taken():
        agree(Spec(**HEADS_OF_128, **rules), LONG, check=check)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11 warns of its own modules
@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("rules", [{}, {"sliding_window": 50, "sinks": True}], ids=str)
def test_captured_and_compiled_steps(rules: dict[str, Any], mode: str) -> None:
    batch = BatchShape(query_lens=(1, 40, 0, 90), seq_lens=(900, 300, 0, 131), padding_tokens=5)
    with taken():
        agree(Spec(**HEADS_OF_128, **rules), batch, mode=mode)


@pytest.mark.parametrize("rules", [{}, {"softcap": 3.0, "alibi": True}, {"sliding_window": 30}], ids=str)
def test_softmax_scales_of_any_sign(rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of 0 is that of queries of 0, a negative one, which is not taken, that of negated ones: bit for bit."""
    case = Case(spec=Spec(**HEADS_OF_128, **rules), batch=EDGES, seed=4)

    def answer(scale: float, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = dict(build(case, CUDA).arguments)
        arguments["q"] = torch.where(arguments["q"].isfinite(), arguments["q"] * factor, arguments["q"])
        arguments["rules"] = replace(arguments["rules"], softmax_scale=scale)
        return optimized.attention(**arguments | {"out": None, "lse": None})

    def same(left: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]) -> bool:
        return all(map(torch.equal, left, right))

    with taken():
        assert same(answer(0.0, 1.0), answer(0.1, 0.0))
        assert not same(answer(0.0, 1.0), answer(0.1, 1.0))
    with taken(False):
        negative = answer(-0.1, 1.0)
    monkeypatch.setattr(hopper, "why_not_compiled", lambda _architecture: "the portable kernel is compared with")
    assert same(negative, answer(0.1, -1.0))
    assert not same(negative, answer(0.1, 1.0))
