"""Digests of a few cases' tensors, which no change and no device may move: replays depend on it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...reference.problem import Batch, Rules, Scales
from ..case import FLOAT8, BatchShape, Case, Spec
from .hashing import digest
from .problem import Problem
from .tensors import build

_BATCH = BatchShape(query_lens=(1, 7, 0, 3), seq_lens=(40, 23, 0, 3), padding_tokens=2, table_slack=1, shared_blocks=1)
_MLA: dict[str, Any] = {"num_kv_heads": 1, "group_size": 3, "head_size": 32, "rope_head_size": 8, "block_size": 8}
_FLOAT8: dict[str, Any] = {"q_dtype": FLOAT8, "kv_dtype": FLOAT8, "out_dtype": FLOAT8, "scales": "head"}


def _case(recipe: str, seed: int, **spec: Any) -> Case:
    return Case(spec=Spec(**spec), batch=_BATCH, recipe=recipe, seed=seed)


CASES: dict[str, Case] = {
    "plain": _case("normal", 1, head_size=32, head_size_v=24, sliding_window=9, sinks=True, alibi=True),
    "needle": _case("needle", 2, dtype="float16", odd_strides=True, cache_layout="HND", sliding_window=9),
    "one hot": _case("one_hot", 3, dtype="float32", query_bias="tree", bias_width=5, cache_layout="interleaved"),
    "extreme": _case("extreme", 4, dtype="float32", causal=False, right_window=2, sinks=True),
    "float8": _case("normal", 5, query_bias="dense", bias_width=4, **_FLOAT8),
    "float8 needle": _case("needle", 6, dtype="float16", **_FLOAT8),
    "float8 extreme": _case("extreme", 13, odd_strides=True, **_FLOAT8),
    "mla": _case("needle", 7, operation="mla_attention", **_MLA),
    "decompressed": _case("normal", 8, operation="mla_attention_decompressed", nope_head_size=16, **_MLA),
    "update": _case("needle", 9, operation="update_kv_cache", kv_dtype=FLOAT8, scales="tensor", block_size=8),
    "mla update": _case("extreme", 10, operation="update_mla_cache", **_MLA),
    **{f"extreme {seed}": _case("extreme", seed, dtype="float16", head_size=16) for seed in (100, 101, 102, 103, 104)},
    **{f"extreme {seed}": _case("extreme", seed, head_size=16) for seed in (105, 107, 109, 116)},
    "merge": _case("extreme", 11, operation="merge_states", dtype="float16", head_size=16),
    "one hot update": _case("one_hot", 14, operation="update_kv_cache", dtype="float16", odd_strides=True),
    "one hot merge": _case("one_hot", 15, operation="merge_states", head_size=16),
    "one hot full": _case("one_hot_full", 16, head_size_v=16, sliding_window=9),
    "mla one hot full": _case("one_hot_full", 17, operation="mla_attention", **_MLA),
    "census": _case("census", 18, dtype="float16", sinks=True, query_bias="tree", bias_width=5),
    "tagged": _case("tagged", 19, head_size_v=24, sliding_window=9, query_bias="dense", bias_width=4),
    "float8 tagged": _case("tagged", 20, causal=False, right_window=2, **_FLOAT8),
    "mla tagged": _case("tagged", 21, operation="mla_attention_decompressed", nope_head_size=16, **_MLA),
    "cancel": _case("cancel", 22, dtype="float16", head_size=33),
    "float8 cancel": _case("cancel", 23, **_FLOAT8),
    "mla cancel": _case("cancel", 24, operation="mla_attention", **_MLA),
    "census merge": _case("census", 25, operation="merge_states", head_size=16),
    "cancel merge": _case("cancel", 26, operation="merge_states", dtype="float16", head_size=16),
}

DIGESTS: dict[str, str] = {
    "plain": "939706ea265be4ce",
    "needle": "787e4232a39924fd",
    "one hot": "ee5322a3e39e8e53",
    "extreme": "e02d181849fc816d",
    "float8": "ba21d188cc71911c",
    "float8 needle": "faefc7dd869547c6",
    "float8 extreme": "0b47a89626dd7271",
    "mla": "f1c691c1cba7f266",
    "decompressed": "c32504afd0d3a09a",
    "update": "994c9f7f076de30f",
    "mla update": "7713ead9fae82f9b",
    "extreme 100": "853a18788b13a2e3",
    "extreme 101": "317f9980a3e295ef",
    "extreme 102": "2d32ee0f96e901ae",
    "extreme 103": "a814cb12f0868386",
    "extreme 104": "965eeb2e83cccaa1",
    "extreme 105": "855d83e16536971d",
    "extreme 107": "fdedb74fc07699f5",
    "extreme 109": "b4b2c5fa2b3a52ad",
    "extreme 116": "77a6d402142afa18",
    "merge": "4a864b08dcad35ce",
    "one hot update": "f7507a3471e551a4",
    "one hot merge": "4feb8c605016cf50",
    "one hot full": "c126897ffe9ce604",
    "mla one hot full": "4c82173c6da7fa1d",
    "census": "dec63c376f8ee8ac",
    "tagged": "d17fda98d7da15da",
    "float8 tagged": "d440156f718d4684",
    "mla tagged": "bdecf284789f6887",
    "cancel": "30be1b196b652916",
    "float8 cancel": "f572ccdfa11e3d16",
    "mla cancel": "d79247f23985cf96",
    "census merge": "6663a9756a82e84f",
    "cancel merge": "951085d5ac2c9942",
}


def digests(problem: Problem) -> dict[str, str]:
    """A digest of every tensor that a call is given, by its name."""
    return {name: digest(tensor) for name, tensor in _tensors(problem.arguments)}


def combined(found: dict[str, str]) -> str:
    """One digest of them all."""
    return hashlib.blake2b(repr(sorted(found.items())).encode(), digest_size=8).hexdigest()


def drift(device: torch.device | str = "cpu") -> str | None:
    """Which pinned case has other bits on this device than it was pinned with, in one sentence; None if none has."""
    for name, case in CASES.items():
        found = digests(build(case, device))
        if combined(found) != DIGESTS[name]:
            usual = digests(build(case, "cpu"))
            moved = [tensor for tensor in usual if usual[tensor] != found[tensor]]
            return f"case {name!r}: the bits of {', '.join(moved) or 'its tensors'} on {device} are not those pinned"
    return None


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (Batch, Rules, Scales)):
            parts = vars(value).items()
            yield from ((f"{name}.{part}", inner) for part, inner in parts if isinstance(inner, Tensor))
