"""The small numbers of a case, made on the host: softmax scale, ALiBi slopes, sinks, float8 scales."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..case import FLOAT8, Case, Spec
from .hashing import host_hashes, host_normals

Floats = NDArray[np.float32]

_EXTREME_SINKS = (math.inf, -math.inf, 1e4, -1e4, 80.0, -80.0, 0.0, 1e-30)
_USUAL_NOPE_HEAD_SIZE = 128  # absorbed MLA does not show the size of the head it was folded from


def softmax_scale(spec: Spec) -> float:
    """One over the root of the head size; for MLA that of the decompressed head."""
    if not spec.is_mla:
        return 1.0 / math.sqrt(spec.head_size)
    return 1.0 / math.sqrt((spec.nope_head_size or _USUAL_NOPE_HEAD_SIZE) + spec.rope_head_size)


def alibi_slopes(case: Case) -> Floats:
    """[num_query_heads]: the usual powers of two; every fourth head, by hash, a slope that no model would have."""
    heads = case.spec.num_query_heads
    usual = np.array([2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)], dtype=np.float32)
    drawn = host_hashes(case.seed, "slopes", heads)
    odd = np.array([0.0, -0.01, 0.71, -0.23], dtype=np.float32)[drawn >> np.uint32(8) & np.uint32(3)]
    return np.where(drawn % np.uint32(4) == 0, odd, usual)


def sinks(case: Case) -> Floats:
    """[num_query_heads]: near the scores, now and then none (-inf); by turns infinite, huge and tiny if extreme."""
    heads = case.spec.num_query_heads
    drawn = host_hashes(case.seed, "sinks", heads)
    if case.recipe == "extreme":
        start = int(drawn[0])
        cycle = [_EXTREME_SINKS[(start + head) % len(_EXTREME_SINKS)] for head in range(heads)]
        return np.array(cycle, dtype=np.float32)
    spread = 8.0 if case.recipe == "needle" else 2.0
    values = host_normals(drawn) * np.float32(spread)
    if case.recipe == "census":
        values = -np.abs(values)  # never above the scores, which are 0: weights stay exact before they are normalised
    return np.where(drawn % np.uint32(16) == 0, np.float32(-np.inf), values)


def scales(case: Case) -> dict[str, Floats]:
    """The scale of every float8 tensor, [1] or [num_kv_heads]: odd numbers over 128 (over 2048 for out).

    Before that division none is a power of two or between 0.76 and 1.27, and any two are 1.5% apart or more: a
    scale that is dropped, swapped or squared shows.
    """
    spec = case.spec
    dtypes = {"q": spec.q_dtype, "k": spec.kv_dtype, "out": spec.out_dtype}
    names = [name for name, dtype in dtypes.items() if dtype == FLOAT8]
    if "k" in names and not spec.is_mla:
        names.append("v")  # an MLA row has one scale
    if spec.scales == "none" or not names:
        return {}
    count = spec.num_kv_heads if spec.scales == "head" else 1
    needed = len(names) * count
    numerators = np.concatenate((np.arange(37, 98, 6), np.arange(163, 163 + 6 * (needed + 7), 6)))
    order = np.argsort(host_hashes(case.seed, "scales", len(numerators)), kind="stable")
    values = numerators[order].astype(np.float32) / np.float32(128.0)
    parts = {name: values[i * count : (i + 1) * count] for i, name in enumerate(names)}
    if "out" in parts:
        parts["out"] = parts["out"] / np.float32(16.0)  # outputs are averages: smaller than what is averaged
    return parts
