"""Splitting at registered operators: each alone, in the order in which they were traced."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from pageproof.oracle.execution.compiled import registered_operators, split_at_operators

_library = torch.library.Library("mode_compiled", "FRAGMENT")


def add_to(total: Tensor, part: Tensor) -> None:
    total.add_(part)


def take_from(total: Tensor, part: Tensor) -> None:
    total.sub_(part)


for body in (add_to, take_from):
    _library.define(f"{body.__name__}(Tensor(a!) total, Tensor part) -> ()")
    _library.impl(body.__name__, body, "CompositeExplicitAutograd")
ops = torch.ops.mode_compiled


class Step(torch.nn.Module):
    def forward(self, total: Tensor, part: Tensor) -> Tensor:
        doubled = part * 2.0
        ops.add_to(total, doubled)
        scaled = total * 10.0  # reads what was just written; nothing but the order says so
        ops.take_from(total, part)
        ops.add_to(total, scaled)
        return total + 1.0


def test_operators_stand_alone_and_in_order() -> None:
    split = split_at_operators(fx.symbolic_trace(Step()))
    assert registered_operators(split) == [f"mode_compiled::{name}" for name in ("add_to", "take_from", "add_to")]
    parts = [len(list(part.graph.nodes)) for _, part in split.named_children() if isinstance(part, fx.GraphModule)]
    assert len(parts) == 6  # the two that follow each other have nothing between them
    total, part = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert split(total.clone(), part).equal(Step()(total.clone(), part))
