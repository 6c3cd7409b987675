"""The logic of the prefill for Hopper, run on a CPU by an emulation of Gluon: whatever a GPU is needed for is left out.

The kernels around it (plan, decode, merge) run in Triton's interpreter, and the oracle judges the whole.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pageproof.optimized import hopper, launch
from pageproof.optimized.shapes import Shape, attention_sizes
from pageproof.oracle import BatchShape, Case, Spec, judge
from pageproof.oracle.adapters import find
from pageproof.oracle.case import FLOAT8
from pageproof.oracle.case_rules import why_invalid

from . import gluon_emulation

PROGRAMS = 3
BATCH = BatchShape(query_lens=(17, 1, 0, 20, 60), seq_lens=(150, 9, 0, 7, 131), padding_tokens=3, table_slack=1)


@pytest.fixture
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Prefills for which sm_90 would take the kernel for Hopper run it in the emulation; their shapes."""
    kernels = gluon_emulation.load_kernels(tmp_path)
    shapes: list[Shape] = []
    choose = hopper.hopper_caches

    def chosen(cache: Any, shape: Shape, **options: Any) -> Any:
        return choose(cache, replace(shape, architecture="sm_90"), **options)

    def run(step: Any, numbers: Any, caches: Any, shape: Shape, causal: bool, programs: int) -> None:
        shapes.append(shape)
        sizes = attention_sizes(shape, causal)
        gluon_emulation.launch(kernels, step, numbers, sizes, hopper.hopper_tile(shape), PROGRAMS)

    monkeypatch.setattr(launch, "hopper_caches", chosen)
    monkeypatch.setattr(launch, "launch_hopper_prefill", run)
    return shapes


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
def test_rules(emulated: list[Shape], rules: dict[str, Any]) -> None:
    agree(Spec(**{"group_size": 3, "head_size": 64, "head_size_v": 64, "block_size": 8} | rules))
    assert emulated
