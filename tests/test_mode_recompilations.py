"""Recompilations that really happened, by torch's own count, are what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pageproof.oracle import BatchShape, Case, Outcome, Spec, judge
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.execution.compilations import Compilations
from pageproof.oracle.replays.sequence import steps_of

from .graph_backends import DEVICES

SPEC = Spec(dtype="float16", num_kv_heads=1, head_size=16, head_size_v=16)
CASE = Case(spec=SPEC, batch=BatchShape(query_lens=(1, 5, 0), seq_lens=(20, 5, 0)), seed=4)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def doubled(rows: torch.Tensor) -> torch.Tensor:
    return rows * 2.0


class NumberOnTheHost(Ours):
    """A number that changes from call to call is a constant of what was compiled."""

    calls = 0

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        self.calls += operation == "attention"
        if self.calls > 10**6:
            return None
        return super().call(operation, arguments)


class CompiledBetween(Ours):
    """Compiles something for each number of tokens that it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.doubled = torch.compile(doubled, dynamic=False, backend="eager")

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "attention":
            self.doubled(arguments["q"][: int(arguments["batch"].cu_seqlens_q[-1])])
        return super().call(operation, arguments)


def test_what_torch_compiles_is_counted_once() -> None:
    count, compiled = Compilations(), torch.compile(doubled, dynamic=False, backend="eager")
    made = []
    for rows in (2, 3, 3, 2, 4):
        with count:
            compiled(torch.ones(rows))
        made.append(count.made)
    assert made == [1, 2, 2, 2, 3]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_is_compiled_again_is_counted(device: str) -> None:
    """Its guard on the number fails at every replay."""
    case = Case(spec=CASE.spec, batch=CASE.batch, mode="compiled", replays=3, seed=4)
    verdict = judge(case, NumberOnTheHost(), device)
    assert dict(verdict.counts)["recompilations"] == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["piecewise", "breakable"])
def test_what_a_candidate_compiles_between_two_graphs_is_counted(mode: str, device: str) -> None:
    case = Case(spec=CASE.spec, batch=CASE.batch, mode=mode, replays=2, seed=4)
    verdict = judge(case, CompiledBetween(), device)
    assert verdict.outcome is Outcome.AGREES
    steps = steps_of(case)
    seen, again = ({sum(step.case.batch.query_lens) for step in part} for part in (steps.captured, steps.replayed))
    assert dict(verdict.counts)["recompilations"] == len(again - seen) > 0
