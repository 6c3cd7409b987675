"""Random weights of a decoder, hashed: the same bits on every device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..building.hashing import hashed, index_terms, normals
from .shapes import ModelShape

Layer = dict[str, Tensor]

NORM_SPREAD = 1 / 8  # of the norms' weights around 1


@dataclass(frozen=True)
class Weights:
    """A matrix is [inputs, outputs], its elements of variance 1 / inputs: what goes in with variance 1 comes out so."""

    embedding: Tensor  # [vocabulary, hidden_size], variance 1
    layers: list[Layer]
    final_norm: Tensor  # [hidden_size]
    cosines: Tensor  # [max_positions, rotated_size / 2] float32
    sines: Tensor


def random_weights(
    shape: ModelShape, *, max_positions: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Weights:
    """Weights of all layers in `dtype`, for tokens at positions below `max_positions`."""

    def norm(name: str, size: int) -> Tensor:
        return (1 + NORM_SPREAD * normal_values(seed, name, (size,), device)).to(dtype)

    def matrix(name: str, size: tuple[int, ...], inputs: int) -> Tensor:
        return normal_values(seed, name, size, device).mul_(inputs**-0.5).to(dtype)

    def layer(index: int) -> Layer:
        # W_UK is met by queries, but what has variance 1 is the key W_UK c, a sum over the rank.
        matrices = {
            name: matrix(f"{index}/{name}", size, size[-1] if name == "absorb" else size[-2])
            for name, size in matrix_sizes(shape).items()
        }
        return matrices | {name: norm(f"{index}/{name}", size) for name, size in norm_sizes(shape).items()}

    # On the host, whose cosines are the same for every device.
    steps = torch.arange(0, shape.rotated_size, 2, dtype=torch.float64) / shape.rotated_size
    angles = torch.arange(max_positions, dtype=torch.float64)[:, None] * shape.rope_theta**-steps
    return Weights(
        embedding=normal_values(seed, "embedding", (shape.vocabulary, shape.hidden_size), device).to(dtype),
        layers=[layer(index) for index in range(shape.num_layers)],
        final_norm=norm("final", shape.hidden_size),
        cosines=angles.cos().float().to(device),
        sines=angles.sin().float().to(device),
    )


def normal_values(seed: int, name: str, size: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 of mean 0 and standard deviation 1.02, within +-2.5."""
    terms = index_terms(seed, f"model/{name}", np.arange(int(np.prod(size[:-1]))), size[-1])
    rows, columns = (torch.from_numpy(term).to(device) for term in terms)
    return normals(hashed([(rows, columns)])).view(size)


def matrix_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """One layer's matrices, [inputs, outputs] or one of these for each head."""
    hidden, heads = shape.hidden_size, shape.num_query_heads
    common: dict[str, tuple[int, ...]] = {
        "output": (heads * shape.head_size_v, hidden),
        "gate_up": (hidden, 2 * shape.intermediate_size),
        "down": (shape.intermediate_size, hidden),
    }
    if shape.is_mla:
        return common | {
            "queries": (hidden, heads * (shape.head_size + shape.rope_head_size)),
            "latent": (hidden, shape.kv_lora_rank + shape.rope_head_size),
            "absorb": (heads, shape.head_size, shape.kv_lora_rank),  # W_UK
            "expand": (heads, shape.kv_lora_rank, shape.head_size_v),  # W_UV
        }
    columns = (heads + shape.num_kv_heads) * shape.head_size + shape.num_kv_heads * shape.head_size_v
    return common | {"qkv": (hidden, columns)}


def norm_sizes(shape: ModelShape) -> dict[str, int]:
    """One layer's RMSNorms."""
    sizes = {"attention_norm": shape.hidden_size, "mlp_norm": shape.hidden_size}
    if shape.is_mla:
        sizes["latent_norm"] = shape.kv_lora_rank
    if shape.head_norms:
        sizes |= {"query_norm": shape.head_size, "key_norm": shape.head_size}
    return sizes
