"""Update and attention as one operator: bit for bit what the two operators do, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof import optimized
from pageproof.oracle import BatchShape, Case, Spec
from pageproof.oracle.case import FLOAT8, MODES
from pageproof.oracle.checks.memory import bits_of
from pageproof.oracle.execution.compiled import Operators
from pageproof.oracle.execution.modes import RUNNERS
from pageproof.oracle.execution.program import Program, run_layers
from pageproof.oracle.replays.buffers import Buffers, InMemory, tensors_of
from pageproof.oracle.replays.machines import machine_of
from pageproof.oracle.replays.sequence import LARGE, steps_of

from .graph_backends import DEVICES

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch 2.11 warns of its own modules
]

SPEC = Spec(dtype="float16", num_kv_heads=1, head_size=16, head_size_v=16, sliding_window=9)
SPECS = {"float16": SPEC, "float8": replace(SPEC, kv_dtype=FLOAT8, scales="head", num_kv_heads=2)}
BATCH = BatchShape(query_lens=(1, 5, 0), seq_lens=(20, 5, 0), padding_tokens=1)


def split(memory: InMemory) -> Program:
    def call(operation: str, arguments: dict[str, Any]) -> Any:
        return getattr(optimized, operation)(**arguments)

    return memory.program(call)


def fused(memory: InMemory) -> Program:
    writing = memory.writing
    assert writing is not None

    def call(operation: str, arguments: dict[str, Any]) -> Any:
        return optimized.attention_with_kv_update(**arguments)

    given = {**memory.problem.arguments, **writing.rows, "slot_mapping": writing.slot_mapping}
    return Program(call, "attention", given, memory.problem.outputs)


def replayed(case: Case, make: Callable[[InMemory], Program], device: str) -> list[Tensor]:
    """The bits of outputs and caches after every step of the case's larger bucket, in the case's mode."""
    steps, machine = steps_of(case), machine_of(torch.device(device), splits_update=bool(case.seed & 1))
    memory = tensors_of(steps.captured[LARGE], torch.device(device), updates=True)
    buffers = Buffers(memory.problem, memory.writing)
    buffers.unwrite()
    layers = [make(buffers)]
    runner = None if case.mode == MODES[0] else RUNNERS[case.mode](layers, machine)
    found = []
    for step in [step for step in steps.replayed if step.bucket == LARGE]:
        buffers.refill(tensors_of(step, torch.device(device), updates=True))
        if runner is None:
            outputs, _ = run_layers(layers)
        else:
            runner.run()
            outputs = runner.outputs
        machine.backend.synchronize()
        found += [bits_of(tensor).clone() for tensor in (*outputs[0].values(), *buffers.caches.values())]
    if runner is not None:
        runner.release()
    return found


@pytest.mark.parametrize("mode", [MODES[0], *RUNNERS])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_one_operator_does_what_two_do(spec: Spec, mode: str, device: str) -> None:
    case = Case(spec=spec, batch=BATCH, mode=mode, replays=4, seed=4)
    one, two = (replayed(case, make, device) for make in (fused, split))
    assert len(one) == 3 * 4  # steps of the larger bucket; out, lse and both caches
    assert all(map(torch.equal, one, two))


def test_it_is_one_operator_that_names_what_it_writes(device: str) -> None:
    step = steps_of(Case(spec=SPEC, batch=BATCH, mode="full", seed=4)).replayed[1]
    with Operators() as ran:
        fused(tensors_of(step, torch.device(device), updates=True))()
    plan, name = ran.names
    assert (plan.partition("::")[2], name.partition("::")[2]) == ("make_plan", "attention_with_kv_update")
    schema = getattr(torch.ops, name.partition("::")[0]).attention_with_kv_update.default._schema
    written = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
    assert written == {"k_cache", "v_cache", "out", "lse"}


@pytest.mark.parametrize("wrong", ["slot_mapping", "q"])
def test_nothing_is_written_where_something_is_wrong(wrong: str, device: str) -> None:
    memory = tensors_of(
        steps_of(Case(spec=SPEC, batch=BATCH, mode="full", seed=4)).replayed[1], torch.device(device), updates=True
    )
    memory.unwrite()
    before = [bits_of(cache).clone() for cache in memory.caches.values()]
    program = fused(memory)
    arguments = {**program.arguments, wrong: program.arguments[wrong].double()}
    with pytest.raises((TypeError, ValueError), match=f"^{wrong}: found "):
        optimized.attention_with_kv_update(**arguments)
    assert all(bits_of(cache).equal(bits) for cache, bits in zip(memory.caches.values(), before, strict=True))
