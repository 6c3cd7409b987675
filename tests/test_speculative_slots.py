"""Speculative decoding over one captured step: slots of rejected tokens are written again and leave no trace."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof import optimized
from pageproof.optimized import Batch, Rules
from pageproof.oracle.checks.memory import bits_of
from pageproof.oracle.execution.modes import RUNNERS
from pageproof.oracle.execution.program import Call, Program, run_layers
from pageproof.oracle.replays.machines import machine_of

from .graph_backends import DEVICES

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch 2.11 warns of its own modules
]

DRAFTED, BLOCK_SIZE, PROMPT = 4, 16, (13, 2)
ACCEPTED = ((1, 4), (2, 1), (4, 3), (1, 1))  # of each step's tokens, by request; the first one always is
TABLE = ((3, 1), (2, 4))


def ours(operation: str, arguments: dict[str, Any]) -> Any:
    return getattr(optimized, operation)(**arguments)


@dataclass
class Engine:
    """Two requests in persistent buffers, each with DRAFTED new tokens at every step."""

    device: str
    call: Call = ours
    lengths: list[int] = field(default_factory=lambda: list(PROMPT))  # accepted tokens

    def __post_init__(self) -> None:
        device, rows = self.device, 2 * DRAFTED

        def values(*size: int) -> Tensor:
            return torch.full(size, torch.nan, dtype=torch.float16, device=device)

        self.q, self.key = values(rows, 2, 16), values(rows, 1, 16)
        self.k_cache, self.v_cache = values(5, BLOCK_SIZE, 1, 16), values(5, BLOCK_SIZE, 1, 16)
        self.slots = torch.zeros(rows, dtype=torch.int64, device=device)
        starts = torch.tensor([0, DRAFTED, rows], dtype=torch.int32, device=device)
        table = torch.tensor(TABLE, dtype=torch.int32, device=device)
        batch = Batch(starts, torch.ones(2, dtype=torch.int32, device=device), table)
        outputs = {"out": values(rows, 2, 16), "lse": values(rows, 2).float()}
        caches = {"k_cache": self.k_cache, "v_cache": self.v_cache}
        self.batch = batch
        update = {"key": self.key, "value": self.key, **caches, "slot_mapping": self.slots}
        given = {"q": self.q, **caches, "batch": batch, "rules": Rules(0.25), **outputs}
        self.program = Program(self.call, "attention", given, outputs, "update_kv_cache", update)
        for request, length in enumerate(PROMPT):
            self.write(request, 0, tokens(f"prompt {request}", length, device))

    def write(self, request: int, position: int, rows: Tensor) -> None:
        """Rows into the caches, by the host."""
        for index, row in enumerate(rows):
            page, slot = divmod(position + index, BLOCK_SIZE)
            self.k_cache[TABLE[request][page], slot] = self.v_cache[TABLE[request][page], slot] = row

    def refill(self, step: int) -> None:
        for request, length in enumerate(self.lengths):
            mine = slice(request * DRAFTED, (request + 1) * DRAFTED)
            self.q[mine] = tokens(f"q {step} {request}", DRAFTED, self.device).expand(-1, 2, -1)
            self.key[mine] = tokens(f"key {step} {request}", DRAFTED, self.device)
            places = [divmod(position, BLOCK_SIZE) for position in range(length, length + DRAFTED)]
            slots = [TABLE[request][page] * BLOCK_SIZE + slot for page, slot in places]
            self.slots[mine] = torch.tensor(slots, device=self.device)
            self.batch.seq_lens[request] = length + DRAFTED

    def accept(self, step: int) -> None:
        self.lengths = [length + more for length, more in zip(self.lengths, ACCEPTED[step], strict=True)]


def tokens(name: str, count: int, device: str) -> Tensor:
    """Values of their own for every name, the same on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(count, 1, 16, generator=generator).half().to(device)


def without_rejected(step: int, device: str) -> Tensor:
    """The outputs of a step in a pool that never held a rejected token."""
    engine = Engine(device)
    for before in range(step):
        for request, (length, more) in enumerate(zip(engine.lengths, ACCEPTED[before], strict=True)):
            engine.write(request, length, tokens(f"key {before} {request}", DRAFTED, device)[:more])
        engine.accept(before)
    engine.refill(step)
    outputs, _ = run_layers([engine.program])
    return outputs[0]["out"]


def first_trace(mode: str, device: str, call: Call) -> int | None:
    """The first step whose outputs show that there were others before it; None: no step's do.

    The caches are never reset between the steps, each of which begins inside of what the one before it wrote.
    """
    engine, machine = Engine(device, call), machine_of(torch.device(device), splits_update=False)
    engine.refill(0)
    pools = [cache.clone() for cache in (engine.k_cache, engine.v_cache)]
    runner = RUNNERS[mode]([engine.program], machine)
    for cache, pool in zip((engine.k_cache, engine.v_cache), pools, strict=True):
        cache.copy_(pool)  # as it was before the warm-up
    try:
        for step in range(len(ACCEPTED)):
            engine.refill(step)
            runner.run()
            machine.backend.synchronize()
            if not bits_of(runner.outputs[0]["out"]).equal(bits_of(without_rejected(step, device))):
                return step
            engine.accept(step)
    finally:
        runner.release()
    return None


@pytest.mark.parametrize("mode", RUNNERS)
def test_rejected_tokens_leave_no_trace(mode: str, device: str) -> None:
    assert first_trace(mode, device, ours) is None


def test_a_slot_that_is_written_only_once_shows(device: str) -> None:
    def written_once(operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "update_kv_cache":
            slots, cache = arguments["slot_mapping"], arguments["k_cache"]
            held = cache[slots // BLOCK_SIZE, slots % BLOCK_SIZE].isfinite().flatten(1).all(1)
            arguments["slot_mapping"] = torch.where(held, -1, slots)
        return ours(operation, arguments)

    assert first_trace("full", device, written_once) == 1
