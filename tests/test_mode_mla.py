"""MLA in a captured step: one absorbed path for requests with and without a prefix, equal to the decompressed one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof import optimized
from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.bound.evaluate import Expected, evaluate
from pageproof.oracle.building.problem import Problem
from pageproof.oracle.case import MODES
from pageproof.oracle.execution.modes import RUNNERS, Runner
from pageproof.oracle.execution.program import Program, run_layers
from pageproof.oracle.replays.buffers import Buffers, tensors_of
from pageproof.oracle.replays.machines import machine_of
from pageproof.oracle.replays.sequence import LARGE, OWN, Step, steps_of

from .graph_backends import DEVICES, is_capturing

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch 2.11 warns of its own modules
]

SPEC = Spec(operation="mla_attention", dtype="float16", num_kv_heads=1, group_size=2, head_size=16, rope_head_size=16)
# Prefill without a prefix and with a cached one, decode, speculation, and a padding request.
BATCH = BatchShape(query_lens=(6, 5, 1, 3, 0), seq_lens=(6, 37, 20, 18, 0), padding_tokens=1)
CASE = Case(spec=SPEC, batch=BATCH, replays=2, seed=4)
DECOMPRESSED = CASE.with_spec(operation="mla_attention_decompressed", nope_head_size=16, head_size_v=16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", [SPEC, DECOMPRESSED.spec], ids=["absorbed", "decompressed"])
def test_every_mode_serves_requests_with_and_without_a_prefix(spec: Spec, mode: str, device: str) -> None:
    case = replace(CASE, spec=spec, mode=mode)
    assert mode == MODES[0] or steps_of(case).replayed[1].profile == OWN
    judge(case, Ours(), device).require()


class PathByPrefix(Ours):
    """Whether there is a prefix is asked of the host when a step is captured, and not again."""

    name = "path by prefix"
    longest_context = 0

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "mla_attention":
            batch = arguments["batch"]
            new = batch.cu_seqlens_q.diff()
            if not is_capturing():
                self.longest_context = int((batch.seq_lens - new).max())
            if self.longest_context <= 0:  # a path for new keys alone: no length but the queries' own
                arguments["batch"] = replace(batch, seq_lens=torch.minimum(new, batch.seq_lens))
        return super().call(operation, arguments)


def captured_without_a_prefix() -> Case:
    cases = (replace(CASE, seed=seed) for seed in range(100))
    return next(case for case in cases if steps_of(case).captured[LARGE].profile in ("full", "empty"))


def test_a_path_chosen_at_the_capture_is_found(device: str) -> None:
    verdict = judge(replace(captured_without_a_prefix(), mode="full"), PathByPrefix(), device)
    assert verdict.outcome is Outcome.REPLAY_DIFFERS


@pytest.mark.parametrize("mode", ["piecewise", "breakable"])
def test_a_path_chosen_between_the_graphs_is_chosen_anew(mode: str, device: str) -> None:
    judge(replace(captured_without_a_prefix(), mode=mode), PathByPrefix(), device).require()


@dataclass
class Both:
    """Absorbed MLA after its cache update, and decompressed MLA over the same cache, as two layers of a step."""

    step: Step
    device: torch.device

    def __post_init__(self) -> None:
        memory = tensors_of(self.step, self.device, updates=True)
        self.buffers = Buffers(memory.problem, memory.writing)
        given = self.buffers.problem.arguments
        rows = (*given["q_nope"].shape[:2], SPEC.head_size)
        self.q_absorbed = given["q_nope"].new_empty(rows)
        self.outputs = {"out": self.q_absorbed.new_empty(rows), "lse": torch.empty_like(given["lse"])}
        self.refill(self.step)

    def refill(self, step: Step) -> None:
        self.step = step
        self.buffers.refill(tensors_of(step, self.device, updates=True))
        given = self.buffers.problem.arguments
        for name, largest, unit in (("q_nope", 3, 1.0), ("w_uk", 1, 0.25), ("w_uv", 1, 0.25)):
            given[name].copy_((given[name] / unit).round().clamp(-largest, largest) * unit)
        # W_UK^T q_nope without a rounding, multiples of 1/4 up to 16 * 3 / 4: both operations are asked the same.
        self.q_absorbed.copy_(torch.einsum("thn,hnc->thc", given["q_nope"].double(), given["w_uk"].double()))

    def layers(self) -> list[Program]:
        def call(operation: str, arguments: dict[str, Any]) -> Any:
            return getattr(optimized, operation)(**arguments)

        decompressed = self.buffers.program(call)
        updated = replace(decompressed, operation="mla_attention", arguments=self.absorbed(), outputs=self.outputs)
        return [updated, replace(decompressed, update="", update_arguments=None)]

    def absorbed(self) -> dict[str, Any]:
        given = dict(self.buffers.problem.arguments)
        del given["w_uk"], given["w_uv"]
        return {**given, "q_nope": self.q_absorbed, **self.outputs}

    def expected(self) -> tuple[Expected, Expected]:
        """Of the absorbed and the decompressed operation, each with the bounds of its own arithmetic."""
        case, guards = self.step.case, self.buffers.problem.guards
        plain = case.with_spec(operation="mla_attention", nope_head_size=0, head_size_v=64)
        absorbed = Problem(plain, self.absorbed(), self.outputs, guards)
        problems = absorbed, replace(self.buffers.problem, case=case)
        one, two = (evaluate(each, Ours().contract(each.case), with_statistics=False) for each in problems)
        return one, two


@contextmanager
def prepared(both: Both, mode: str) -> Iterator[Runner | None]:
    """The runner of a mode; None for eager."""
    machine = machine_of(both.device, splits_update=False)
    runner = None if mode == MODES[0] else RUNNERS[mode](both.layers(), machine)
    yield runner
    if runner is not None:
        runner.release()


def apart(found: Tensor, other: Tensor) -> Tensor:
    """|found - other|, 0 where both are the same infinity."""
    return torch.where(found == other, 0.0, (found.double() - other.double()).abs())


@pytest.mark.parametrize("mode", [MODES[0], *RUNNERS])
def test_absorbed_and_decompressed_agree_within_their_bounds(mode: str, device: str) -> None:
    """|a - b| <= |a - exact| + |b - exact|, each within its own bound; W_UV is applied in float64."""
    case = replace(DECOMPRESSED, mode="full", replays=4)
    steps, both = steps_of(case), Both(steps_of(case).captured[LARGE], torch.device(device))
    with prepared(both, mode) as runner:
        for step in [step for step in steps.replayed if step.bucket == LARGE and not step.rewrites]:
            both.refill(step)
            if runner is None:
                outputs, _ = run_layers(both.layers())
            else:
                runner.run()
                outputs = runner.outputs
            (one, two), w_uv = outputs, both.buffers.problem.arguments["w_uv"].double()
            absorbed, decompressed = both.expected()
            projected = torch.einsum("thc,hvc->thv", one["out"].double(), w_uv)
            bound = torch.einsum("thc,hvc->thv", absorbed.bounds["out"], w_uv.abs()) + decompressed.bounds["out"]
            assert (apart(projected, two["out"]) <= bound).all()
            assert (apart(one["lse"], two["lse"]) <= absorbed.bounds["lse"] + decompressed.bounds["lse"]).all()
            live = sum(step.case.batch.query_lens)
            assert not one["out"][live:].any()
