"""The masks of speculative decoding: a chain sees everything before it, deep trees are deeper than broad ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pageproof.oracle.building.tensors import build
from pageproof.oracle.case import BatchShape, Case, Spec

LENGTHS = range(1, 17)  # of what is verified at a time


def blocks(kind: str, width: int, seed: int = 0) -> list[Tensor]:
    """Which new key each new token sees, [n, min(n, width)] bool for every length n."""
    spec = Spec(head_size=16, head_size_v=16, query_bias=kind, bias_width=width)
    batch = BatchShape(query_lens=tuple(LENGTHS), seq_lens=tuple(n + 5 for n in LENGTHS))
    bias = build(replace(Case(spec=spec, batch=batch), seed=seed)).arguments["rules"].query_bias
    parts = torch.split(bias, list(LENGTHS))
    found = [part[:, : min(n, width)] for n, part in zip(LENGTHS, parts, strict=True)]
    assert all(((part == 0) | (part == -torch.inf)).all() for part in found)
    return [part == 0 for part in found]


@pytest.mark.parametrize("width", [16, 5])
def test_a_token_of_a_chain_sees_itself_and_all_before_it(width: int) -> None:
    """Of the tokens past the matrix, all follow the last one in it; their own keys are not in it."""
    for sees in blocks("chain", width):
        assert torch.equal(sees, torch.ones_like(sees).tril())


@pytest.mark.parametrize("kind", ["tree", "deep"])
def test_what_a_token_sees_its_descendants_see(kind: str) -> None:
    for seed in range(8):
        for sees in blocks(kind, 16, seed):
            assert not sees.triu(1).any()
            for token in range(len(sees)):
                for ancestor in sees[token].nonzero().flatten().tolist():
                    assert not sees[ancestor].any() or (sees[ancestor] <= sees[token]).all()


def test_a_deep_tree_is_deep_and_no_chain() -> None:
    def depth(kind: str) -> float:
        return sum(float(blocks(kind, 16, seed)[-1].sum(-1).max()) for seed in range(16)) / 16

    assert 3 < depth("tree") < 8
    assert 8 < depth("deep") < 16
