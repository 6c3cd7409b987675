"""Under torch.compile every KV update stays between the reads before it and the reads after it.

Operators hand nothing from one to the next: that an update comes before the attention that reads its cache, and after
the one that must not see it, is said by their schemas alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from pageproof import optimized
from pageproof.optimized import Batch, Rules, operators
from pageproof.oracle.execution.compiled import split_at_operators

from .graph_backends import DEVICES

ignores_torch = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11 warns of its own modules
on_devices = pytest.mark.parametrize("device", DEVICES)

WRITTEN = {
    "update_kv_cache": {"k_cache", "v_cache"},
    "update_mla_cache": {"latent_cache"},
    "attention": {"out", "lse"},
    "attention_with_kv_update": {"k_cache", "v_cache", "out", "lse"},
    "mla_attention": {"out", "lse"},
    "mla_attention_decompressed": {"out", "lse"},
}
_library = torch.library.Library("update_order", "FRAGMENT")
_library.define("undeclared(Tensor key, Tensor k_cache, Tensor v_cache, Tensor slot_mapping) -> ()")


@torch.library.register_fake("update_order::undeclared", lib=_library)
def _nothing(*_: Any) -> None:
    pass


@torch.library.impl(_library, "undeclared", "CompositeExplicitAutograd")
def _undeclared(key: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    optimized.update_kv_cache(key, key, k_cache, v_cache, slot_mapping)


def undeclared_update(key: Tensor, _value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """An update whose schema does not say that it writes."""
    torch.ops.update_order.undeclared(key, k_cache, v_cache, slot_mapping)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_schema_names_what_is_written(name: str) -> None:
    schema = getattr(getattr(torch.ops, operators.NAMESPACE), name).default._schema
    written = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
    assert written == WRITTEN[name]


class Layers(torch.nn.Module):
    """Two layers that share a cache and write the same slots, and each attends twice: before and after its update."""

    def __init__(self, device: str, update: Callable[..., None] = optimized.update_kv_cache) -> None:
        super().__init__()
        self.update = update
        generator = torch.Generator().manual_seed(5)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).half().to(device)

        self.q, self.key = normal(3, 2, 16), normal(3, 1, 16)
        self.k_cache, self.v_cache = normal(2, 3, 16, 1, 16)
        self.slot_mapping = torch.tensor([20, 33, -1], device=device)
        lengths = [torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in ((0, 1, 2), (5, 2))]
        table = torch.tensor([[1], [2]], dtype=torch.int32, device=device)
        self.batch = Batch(*lengths, table)

    def forward(self) -> list[Tensor]:
        hidden, results = self.q, []
        for _ in range(2):
            for updates in (False, True):
                if updates:
                    key = self.key * 0.5 + hidden[:, :1]
                    self.update(key, key, self.k_cache, self.v_cache, self.slot_mapping)
                hidden, lse = optimized.attention(hidden, self.k_cache, self.v_cache, self.batch, Rules(0.25))
                results += [hidden, lse]
        return [*results, self.k_cache.clone(), self.v_cache.clone()]


def compiled(layers: Layers, backend: Any) -> list[Tensor]:
    torch._dynamo.reset()
    results: list[Tensor] = torch.compile(layers.forward, fullgraph=True, backend=backend)()
    return results


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(map(torch.equal, found, wanted))


@on_devices
@ignores_torch
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "split"])
def test_two_layers_that_share_a_cache_stay_in_order(backend: str, device: str) -> None:
    """As traced; functionalised and cleaned of dead code; split at the operators."""
    wanted = Layers(device)()
    chosen = (lambda module, _: split_at_operators(module)) if backend == "split" else backend
    assert same(compiled(Layers(device), chosen), wanted)


@on_devices
@ignores_torch
def test_every_update_is_seen_to_matter(device: str) -> None:
    """An update that is left out or moved shows: what is compared above cannot agree by chance."""
    for wrong in (without_update, moved_down):
        assert not same(compiled(Layers(device), wrong), Layers(device)()), wrong.__name__


@on_devices
@ignores_torch
def test_an_update_that_does_not_say_what_it_writes_is_lost(device: str) -> None:
    wanted = Layers(device)()
    assert same(Layers(device, undeclared_update)(), wanted)
    assert not same(compiled(Layers(device, undeclared_update), "aot_eager"), wanted)


def updates_of(module: GraphModule) -> list[Any]:
    return [node for node in module.graph.nodes if "update_kv_cache" in str(node.target)]


def without_update(module: GraphModule, _inputs: Any) -> GraphModule:
    module.graph.erase_node(updates_of(module)[1])
    module.recompile()
    return module


def moved_down(module: GraphModule, _inputs: Any) -> GraphModule:
    """The second update after the attention that has to see it."""
    attention = [node for node in module.graph.nodes if "attention" in str(node.target)][-1]
    attention.append(updates_of(module)[1])
    module.recompile()
    return module
