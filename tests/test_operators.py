"""The operators are what a compiler and a graph splitter need: flat, mutating, alive after every pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof import optimized
from pageproof.optimized import Batch, Capacity, Rules, operators

NAMES = (
    "attention",
    "attention_with_kv_update",
    "make_plan",
    "merge_states",
    "mla_attention",
    "mla_attention_decompressed",
    "update_kv_cache",
    "update_mla_cache",
)


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_is_registered(name: str) -> None:
    schema = getattr(getattr(torch.ops, operators.NAMESPACE), name).default._schema
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert written
    assert not schema.returns


def small_step(device: torch.device) -> dict[str, Any]:
    def values(*size: int) -> Tensor:
        return torch.linspace(-1.0, 1.0, torch.Size(size).numel(), device=device).view(size)

    def integers(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    batch = Batch(integers(0, 1, 3), integers(18, 5), integers(1, 2, 3, 0).view(2, 2))
    return {
        "q": values(4, 4, 16),
        "key": values(4, 2, 16),
        "k_cache": values(4, 16, 2, 16).contiguous(),
        "v_cache": values(4, 16, 2, 16).flip(0).contiguous(),
        "batch": batch,
        "slot_mapping": torch.tensor([33, 50, 52, -1], device=device),
    }


def test_opcheck_accepts_the_operators(pageproof_device: torch.device) -> None:
    step = small_step(pageproof_device)
    ops = getattr(torch.ops, operators.NAMESPACE)
    update = (step["key"], step["key"], step["k_cache"], step["v_cache"], step["slot_mapping"], None, None)
    torch.library.opcheck(ops.update_kv_cache.default, update)
    out, lse = torch.zeros(4, 4, 16, device=pageproof_device), torch.zeros(4, 4, device=pageproof_device)
    torch.library.opcheck(ops.merge_states.default, (step["q"], lse + 1, step["q"] * 2, lse + 2, out, lse))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11 warns of its own modules
def test_a_compiled_step_keeps_update_before_attention(pageproof_device: torch.device) -> None:
    """fullgraph, functionalised and cleaned of dead code, the step still writes the cache and then reads it."""

    def step(q: Tensor, key: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
        batch = arguments["batch"]
        plan = optimized.make_plan(batch, Capacity(4, 2, 32))
        optimized.update_kv_cache(key * 2.0, key + 1.0, k_cache, v_cache, slot_mapping)
        out, lse = optimized.attention(q + 0.5, k_cache, v_cache, batch, Rules(0.25), plan=plan)
        return out * 3.0, lse

    torch._dynamo.reset()
    names = ("q", "key", "k_cache", "v_cache", "slot_mapping")
    arguments = small_step(pageproof_device)
    wanted = step(*(arguments[name] for name in names))
    caches = (arguments["k_cache"].clone(), arguments["v_cache"].clone())
    arguments = small_step(pageproof_device)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*(arguments[name] for name in names))
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(arguments["k_cache"], caches[0])
    assert torch.equal(arguments["v_cache"], caches[1])
