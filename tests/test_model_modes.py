"""A decoder's step has the same bits in every mode: operators' outputs, caches and last hidden states."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pageproof.optimized import interpreter
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.execution.compilations import Compilations
from pageproof.oracle.execution.graphs.interface import Backend
from pageproof.oracle.execution.modes import Machine, WrongMode
from pageproof.oracle.models import RUNNERS, SHAPES, ModelStep, Request
from pageproof.oracle.models.runners import Runner

from .graph_backends import KERNEL_BACKENDS
from .model_steps import BUCKET, differences, load, put_caches, step_of, weights_of

MODELS = sorted(SHAPES)
MODES = [mode for mode in RUNNERS if mode != "eager"]
CAPTURED = [(1, 4)]  # short, and one request of three
STEPS: list[list[Request]] = [[(1, 96), (1, 1), (1, 40)], [(9, 20), (7, 90)], [], [(1, 70), (5, 20), (2, 2)]]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11 warns of its own modules


def captured(model: str, mode: str, backend: Backend, candidate: Any = None) -> tuple[ModelStep, Runner]:
    shape = SHAPES[model].tiny()
    step = step_of(shape, weights_of(shape, torch.float16, backend.device), candidate=candidate)
    load(step, CAPTURED, seed=0)
    return step, RUNNERS[mode](step, Machine(backend, backend.new_pool()))


def wrong_after_replays(step: ModelStep, runner: Runner, backend: Backend) -> list[str]:
    """Replays step after step, each on the caches that the one before has left; what has other bits than eagerly."""
    eager = step_of(step.shape, step.weights)
    put_caches(eager, step)
    for seed, requests in enumerate(STEPS):
        for one in (step, eager):
            load(one, requests, seed=seed + 1)
        runner.run()
        backend.synchronize()
        _, wanted = eager()
        if wrong := differences(step, runner.results, eager, wanted):
            return wrong
    return []


@pytest.mark.parametrize("make_backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_replays_have_the_bits_of_the_eager_step(model: str, mode: str, make_backend: Callable[[], Backend]) -> None:
    backend = make_backend()
    step, runner = captured(model, mode, backend)
    compilations = Compilations()
    with compilations:
        assert wrong_after_replays(step, runner, backend) == []
    counts = runner.counts()
    assert compilations.made == 0
    if mode != "compiled":
        graphs = 1 if mode == "full" else step.shape.num_layers + 1
        assert (counts["graphs"], counts["replays"]) == (graphs, graphs * len(STEPS))
    runner.release()


@pytest.mark.parametrize("make_backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", ["full", "piecewise", "breakable"])
@pytest.mark.parametrize("model", ["llama-3-8b", "deepseek-v2-lite"])
@torch.no_grad()
def test_buckets_of_one_pool_leave_each_other_alone(model: str, mode: str, make_backend: Callable[[], Backend]) -> None:
    """A smaller bucket captured later takes the memory that nobody holds of the larger one's."""
    backend, shape = make_backend(), SHAPES[model].tiny()
    weights, pool = weights_of(shape, torch.float16, backend.device), backend.new_pool()
    steps = [step_of(shape, weights, bucket) for bucket in (BUCKET, replace(BUCKET, num_tokens=4))]
    steps[1].caches = steps[0].caches
    runners = []
    for step in steps:
        load(step, CAPTURED, seed=0)
        runners.append(RUNNERS[mode](step, Machine(backend, pool)))
    for seed, index in enumerate((0, 1, 0, 1)):
        eager = step_of(shape, weights, steps[index].buffers.bucket)
        put_caches(eager, steps[index])
        for one in (steps[index], eager):
            load(one, [(1, 70), (2, 20 + seed)], seed=seed + 1)
        runners[index].run()
        backend.synchronize()
        _, wanted = eager()
        assert differences(steps[index], runners[index].results, eager, wanted) == []


class KeptPlan(Ours):
    """Our kernels with the plan of the first step: that of the warm-up, which no replay makes anew."""

    plan: Any = None

    def make_plan(self, batch: Any, capacity: tuple[int, int, int]) -> Any:
        if self.plan is None:
            self.plan = super().make_plan(batch, capacity)
        return self.plan


@pytest.mark.parametrize("make_backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", ["full", "piecewise", "breakable"])
@torch.no_grad()
def test_a_plan_of_the_warm_up_is_seen(mode: str, make_backend: Callable[[], Backend]) -> None:
    backend = make_backend()
    step, runner = captured("llama-3-8b", mode, backend, KeptPlan())
    assert any(name.startswith("out") for name in wrong_after_replays(step, runner, backend))


@pytest.mark.parametrize("make_backend", KERNEL_BACKENDS)
@torch.no_grad()
def test_pieces_and_segments_do_the_same_work(make_backend: Callable[[], Backend]) -> None:
    """The same operations are captured, in the same memory; the whole step in one graph has attention as well."""
    backend, found = make_backend(), {}
    for mode in ("full", "piecewise", "breakable"):
        shape = SHAPES["llama-3-8b"].tiny()
        step = step_of(shape, weights_of(shape, torch.float16, backend.device))
        load(step, CAPTURED, seed=0)
        pool = backend.new_pool()
        runner = RUNNERS[mode](step, Machine(backend, pool))
        found[mode] = runner.counts()["nodes"], backend.pool_bytes(pool)
    assert found["breakable"][0] == found["piecewise"][0] < found["full"][0]
    assert 0 < found["breakable"][1] <= 1.05 * found["piecewise"][1]


@pytest.mark.parametrize("make_backend", KERNEL_BACKENDS)
@torch.no_grad()
def test_captured_memory_is_counted(make_backend: Callable[[], Backend]) -> None:
    backend, found = make_backend(), {}
    for width in (96, 1 << 15):
        shape = replace(SHAPES["llama-3-8b"].tiny(), intermediate_size=width)
        step = step_of(shape, weights_of(shape, torch.float16, backend.device))
        load(step, CAPTURED, seed=0)
        pool = backend.new_pool()
        assert backend.pool_bytes(pool) == 0
        runner = RUNNERS["piecewise"](step, Machine(backend, pool))
        found[width] = backend.pool_bytes(pool)
        runner.release()
    gates = BUCKET.num_tokens * 2 * (1 << 15) * 2  # bytes of one product of the wide MLP
    assert 0 < found[96] < found[1 << 15] - gates // 2


@pytest.mark.parametrize("mode", ["piecewise", "breakable"])
@pytest.mark.parametrize("make_backend", KERNEL_BACKENDS)
@torch.no_grad()
def test_a_call_that_is_missing_at_a_replay_is_an_error(mode: str, make_backend: Callable[[], Backend]) -> None:
    step, runner = captured("llama-3-8b", mode, make_backend())
    step.call = Ours().call  # behind the counter's back
    with pytest.raises(WrongMode, match="found 0 calls between the graphs, expected 2"):
        runner.run()


@pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels are compiled here, not interpreted")
def test_the_example_of_the_documentation_runs() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "step.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {"__name__": "step"}
    exec(block, found)
    assert found["runner"].counts()["graphs"] == 4
    assert bool(found["runner"].results["hidden"].isfinite().all())
