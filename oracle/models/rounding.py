"""How far two right runs of a step may be apart where their sums are ordered differently: docs/step.md derives it."""

from __future__ import annotations

import torch

from .shapes import ModelShape

DEVIATIONS = 8  # as docs/bound.md takes for independent roundings
SILU, SILU_SLOPE = 0.356, 0.379  # mean squares of silu(g) and of its derivative for g of variance 1
U_SUM = 2.0**-24  # products are summed in float32


def tolerance(shape: ModelShape, dtype: torch.dtype) -> float:
    """The largest difference of an element of the last hidden states, whose rows have mean square 1.

    Two runs on the same inputs, each rounding independently: on buffers with other numbers of rows, for which a
    library sums its products in another order, or with two candidates.
    """
    return float(DEVIATIONS * (2 * error_variance(shape, dtype)) ** 0.5)


def error_variance(shape: ModelShape, dtype: torch.dtype) -> float:
    """Of the last hidden states' rounding error in one run, relative to their mean square of 1."""
    rounding = (torch.finfo(dtype).eps / 2) ** 2 / 3
    square, error = 1.0, 0.0  # of the residual stream: mean square, and its error's
    branches = ((_attention, 1.0), (_mlp, SILU))
    for _ in range(shape.num_layers):
        for branch, size in branches:
            error += size * branch(shape, error / square + rounding, rounding)
            square += size
            error += square * rounding
    return error / square + rounding


def _attention(shape: ModelShape, x: float, rounding: float) -> float:
    """Relative variance of the attention branch's error, from that of the normed input, `x`."""
    rows = x + _product(shape.hidden_size, rounding) + rounding  # rotary, in float32, is rounded once
    rows += rounding * shape.head_norms
    inputs = shape.num_query_heads * shape.head_size_v
    if shape.is_mla:
        rows += _product(shape.head_size, rounding)  # W_UK, or the latent's norm
    # Scores of variance 1 move with q and with k, and the output with each of them as with v; P and out are rounded.
    attended = 3 * rows + 2 * rounding
    if shape.is_mla:
        attended += _product(shape.kv_lora_rank, rounding)
    return attended + _product(inputs, rounding)


def _mlp(shape: ModelShape, x: float, rounding: float) -> float:
    pair = x + _product(shape.hidden_size, rounding)
    gated = (1 + SILU_SLOPE / SILU) * pair + 2 * rounding
    return gated + _product(shape.intermediate_size, rounding)


def _product(length: int, rounding: float) -> float:
    """A sum of `length` products: its float32 additions, its own rounding, and that of parts that were summed apart."""
    return length * U_SUM**2 / 6 + 2 * rounding
