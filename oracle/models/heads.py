"""What comes before and after attention in a layer: projections and rotary embedding; grouped heads, and MLA.

What attention reads and writes lies in memory of its own that all layers share, and not in a capture's: between two
captured segments nothing but persistent memory is passed on to an eager call.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import ModelShape
from .weights import Layer


class Rotation:
    """The angles of a step's tokens: cosines and sines [num_tokens, rotated_size / 2] float32."""

    def __init__(self, cosines: Tensor, sines: Tensor) -> None:
        self.cosines, self.sines = cosines, sines

    def turn(self, heads: Tensor) -> None:
        """Rotary embedding in place: heads [num_tokens, num_heads, rotated_size], the halves as real and imaginary."""
        real, imaginary = heads.chunk(2, dim=-1)
        cosines, sines = self.cosines[:, None], self.sines[:, None]
        turned = torch.addcmul(real * cosines, imaginary, sines, value=-1)
        imaginary.copy_(torch.addcmul(imaginary * cosines, real, sines))
        real.copy_(turned)


class Heads(Protocol):
    """One kind of attention. Tensors are [num_tokens, heads, size] of the bucket's tokens."""

    operation: str  # of the contract
    update: str
    queries: dict[str, Tensor]  # attention's arguments by name, in persistent memory

    def project(self, x: Tensor, layer: Layer, rotation: Rotation) -> dict[str, Any]:
        """Queries of `x` [num_tokens, hidden_size] into `queries`; the rows of the KV update, by argument name."""

    def gather(self, attended: Tensor, layer: Layer) -> Tensor:
        """Attention's output as the input [num_tokens, inputs] of the output projection."""


class GroupedHeads:
    """Query heads that share key and value heads."""

    operation, update = "attention", "update_kv_cache"

    def __init__(self, shape: ModelShape, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = shape
        self._rotated = (shape.num_query_heads + shape.num_kv_heads) * shape.head_size
        columns = self._rotated + shape.num_kv_heads * shape.head_size_v
        self._rows = torch.zeros(num_tokens, columns, dtype=dtype, device=device)
        self._heads = self._rows[:, : self._rotated].unflatten(1, (-1, shape.head_size))
        self.queries = {"q": self._heads[:, : shape.num_query_heads]}

    def project(self, x: Tensor, layer: Layer, rotation: Rotation) -> dict[str, Any]:
        torch.mm(x, layer["qkv"], out=self._rows)
        shape = self._shape
        queries, keys = self._heads.split([shape.num_query_heads, shape.num_kv_heads], dim=1)
        if shape.head_norms:
            for heads, name in ((queries, "query_norm"), (keys, "key_norm")):
                heads.copy_(F.rms_norm(heads, (shape.head_size,), layer[name], shape.rms_norm_eps))
        rotation.turn(self._heads)
        values = self._rows[:, self._rotated :].unflatten(1, (-1, shape.head_size_v))
        return {"key": keys, "value": values}

    def gather(self, attended: Tensor, layer: Layer) -> Tensor:
        return attended.flatten(1)


class LatentHeads:
    """MLA, absorbed: W_UK moves to the query, W_UV behind attention. One path with and without a cached prefix."""

    operation, update = "mla_attention", "update_mla_cache"

    def __init__(self, shape: ModelShape, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = shape
        heads, size = shape.num_query_heads, shape.head_size + shape.rope_head_size
        self._rows = torch.zeros(num_tokens, heads * size, dtype=dtype, device=device)
        # By heads, as the batched product writes it; attention takes rows with any strides.
        self._absorbed = torch.zeros(heads, num_tokens, shape.kv_lora_rank, dtype=dtype, device=device)
        self._plain, turned = self._rows.unflatten(1, (heads, size)).split([shape.head_size, shape.rope_head_size], -1)
        self.queries = {"q_nope": self._absorbed.transpose(0, 1), "q_pe": turned}

    def project(self, x: Tensor, layer: Layer, rotation: Rotation) -> dict[str, Any]:
        shape = self._shape
        torch.mm(x, layer["queries"], out=self._rows)
        rotation.turn(self.queries["q_pe"])
        torch.bmm(self._plain.transpose(0, 1), layer["absorb"], out=self._absorbed)
        latent, k_pe = (x @ layer["latent"]).split([shape.kv_lora_rank, shape.rope_head_size], dim=1)
        rotation.turn(k_pe[:, None])
        latent = F.rms_norm(latent, (shape.kv_lora_rank,), layer["latent_norm"], shape.rms_norm_eps)
        return {"latent": latent, "k_pe": k_pe}

    def gather(self, attended: Tensor, layer: Layer) -> Tensor:
        return torch.bmm(attended.transpose(0, 1), layer["expand"]).transpose(0, 1).flatten(1)


def heads_of(shape: ModelShape, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Heads:
    kind = LatentHeads if shape.is_mla else GroupedHeads
    return kind(shape, num_tokens, dtype, device)
