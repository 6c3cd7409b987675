"""What a bucket's buffers hold after a step was put into them, and the shapes and weights of models."""

from __future__ import annotations

import math

import pytest
import torch

from pageproof.oracle.building.hashing import digest
from pageproof.oracle.models import SHAPES, Bucket, Buffers, ModelShape, Request, random_weights, shape_of
from pageproof.oracle.models.buffers import GARBAGE
from pageproof.oracle.models.weights import matrix_sizes, norm_sizes

CPU = torch.device("cpu")


def loaded(requests: list[Request], *, seed: int = 1) -> Buffers:
    buffers = Buffers(Bucket(num_tokens=8, num_requests=3, seq_len=50), 16, CPU)
    buffers.load(requests, num_blocks=9, vocabulary=100, seed=seed)
    return buffers


def test_a_step_fills_the_buffers_and_padding_the_rest() -> None:
    buffers = loaded([(1, 40), (3, 3)])
    assert buffers.batch.cu_seqlens_q.tolist() == [0, 1, 4, 4]
    assert buffers.batch.seq_lens.tolist() == [40, 3, 0]
    assert buffers.positions.tolist() == [39, 0, 1, 2, 0, 0, 0, 0]
    table = buffers.batch.block_table
    assert (table == GARBAGE).tolist() == [[False] * 3 + [True], [False] + [True] * 3, [True] * 4]
    pages = [*table[0, :3].tolist(), int(table[1, 0])]
    assert len(set(pages)) == 4
    assert set(pages) <= set(range(9))
    slots = [pages[2] * 16 + 7, *(pages[3] * 16 + offset for offset in range(3))]
    assert buffers.slot_mapping.tolist() == [*slots, -1, -1, -1, -1]


def test_loading_keeps_the_memory_and_forgets_the_step_before() -> None:
    buffers = loaded([(8, 50)])
    addresses = [tensor.data_ptr() for tensor in (buffers.tokens, buffers.slot_mapping, buffers.batch.block_table)]
    buffers.load([], num_blocks=9, vocabulary=100, seed=2)
    assert buffers.slot_mapping.tolist() == [-1] * 8
    assert buffers.batch.cu_seqlens_q.tolist() == [0] * 4
    assert [t.data_ptr() for t in (buffers.tokens, buffers.slot_mapping, buffers.batch.block_table)] == addresses


def test_a_seed_is_a_step() -> None:
    one, same, other = loaded([(4, 50)]), loaded([(4, 50)]), loaded([(4, 50)], seed=2)
    assert one.tokens.equal(same.tokens)
    assert one.batch.block_table.equal(same.batch.block_table)
    assert not one.tokens.equal(other.tokens)
    assert not one.batch.block_table.equal(other.batch.block_table)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([(9, 9)], "found 9 tokens, expected at most 8"),
        ([(1, 1)] * 4, "found 4 requests, expected at most 3"),
        ([(1, 51)], "found 51 keys of one request, expected at most 50"),
        ([(1, 50)] * 3, "found 12 pages, expected at most 9"),
        ([(2, 1)], "more new tokens than keys"),
    ],
)
def test_what_does_not_fit_is_refused(requests: list[Request], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(requests)


def test_an_unknown_model_is_refused_by_the_names_that_are_known() -> None:
    with pytest.raises(ValueError, match="found 'gpt', expected one of llama-3-8b"):
        shape_of("gpt")
    with pytest.raises(ValueError, match="num_layers: found 0"):
        shape_of("llama-3-8b").with_layers(0)


# Parameters of one layer as the models' own files have them, but for what shapes.py says of the experts.
PARAMETERS = {"llama-3-8b": 218_112_000, "qwen3-30b-a3b": 56_627_456, "deepseek-v2-lite": 82_973_184}


@pytest.mark.parametrize("model", sorted(SHAPES))
def test_layers_have_the_models_sizes(model: str) -> None:
    shape = shape_of(model)
    layer = random_weights(shape.tiny(), max_positions=4, dtype=torch.float16, device=CPU).layers[0]
    assert {name: tuple(tensor.shape) for name, tensor in layer.items()} == _sizes(shape.tiny())
    assert sum(math.prod(size) for size in _sizes(shape).values()) == PARAMETERS[model]


def _sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {**matrix_sizes(shape), **{name: (size,) for name, size in norm_sizes(shape).items()}}


def test_weights_have_the_same_bits_everywhere() -> None:
    weights = random_weights(SHAPES["llama-3-8b"].tiny(), max_positions=4, dtype=torch.float32, device=CPU)
    assert digest(weights.layers[1]["qkv"]) == "c7c1b2fdf4329130"
