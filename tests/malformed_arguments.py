"""Good arguments of every operation, to be made bad one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof import optimized, reference
from pageproof.optimized.interpreter import INTERPRETED
from pageproof.reference import Batch, Rules

TOKENS, HEADS, KV_HEADS, SIZE, BLOCKS, BLOCK_SIZE = 5, 4, 2, 8, 6, 4
RANK, ROPE, NOPE, SIZE_V = 6, 2, 3, 7
FLOAT8 = torch.float8_e4m3fn
Changes = dict[str, Any]
# Which operation, what to change in its good arguments, and the error with its whole message.
# The kernels take tensors on a CPU only where they are interpreted.
PACKAGES = (reference, optimized) if INTERPRETED else (reference,)
Row = tuple[Callable[[], Changes], Changes, type[Exception], str]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on another device than the rest."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def groups() -> Changes:
    """Two requests: 3 of 9 tokens new, 2 of 2 new."""
    batch = Batch(int32(0, 3, 5), int32(9, 2), torch.tensor([[0, 1, 2], [3, -1, -1]], dtype=torch.int32))
    return {"batch": batch, "rules": Rules(softmax_scale=0.5), "scales": None}


def attention() -> Changes:
    cache = ones(BLOCKS, BLOCK_SIZE, KV_HEADS, SIZE)
    return {"q": ones(TOKENS, HEADS, SIZE), "k_cache": cache, "v_cache": cache.clone(), **groups()}


def mla_attention() -> Changes:
    cache = ones(BLOCKS, BLOCK_SIZE, RANK + ROPE)
    return {"q_nope": ones(TOKENS, HEADS, RANK), "q_pe": ones(TOKENS, HEADS, ROPE), "latent_cache": cache, **groups()}


def mla_attention_decompressed() -> Changes:
    weights = {"w_uk": ones(HEADS, NOPE, RANK), "w_uv": ones(HEADS, SIZE_V, RANK)}
    return mla_attention() | {"q_nope": ones(TOKENS, HEADS, NOPE)} | weights


def update_kv_cache() -> Changes:
    arguments = {name: attention()[name] for name in ("k_cache", "v_cache")}
    rows = ones(TOKENS, KV_HEADS, SIZE)
    return arguments | {"key": rows, "value": rows, "slot_mapping": torch.arange(TOKENS), "scales": None}


def update_mla_cache() -> Changes:
    return {
        "latent": ones(TOKENS, RANK),
        "k_pe": ones(TOKENS, ROPE),
        "latent_cache": ones(BLOCKS, BLOCK_SIZE, RANK + ROPE),
        "slot_mapping": torch.arange(TOKENS),
        "scales": None,
    }


def merge_states() -> Changes:
    out, lse = ones(TOKENS, HEADS, SIZE), ones(TOKENS, HEADS)
    return {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse}


def check(row: Row, *, validate: bool) -> None:
    """The row's change raises the row's error, word for word; the kernels differ only in taking no float64."""
    make, changes, kind, message = row
    for package in PACKAGES:
        with pytest.raises(kind) as error:
            call(make, changes, validate=validate, package=package)
        found, separator, expected = message.partition(", expected ")
        wanted = expected if package is reference else expected.replace(" or float64", "")
        assert str(error.value) == found + separator + wanted


def call(make: Callable[[], Changes], changes: Changes, *, validate: bool, package: ModuleType = reference) -> None:
    """The operation of make's name; a change to one of the groups' fields changes the group that has it."""
    arguments, changes = make(), dict(changes)
    for group, kind in (("batch", Batch), ("rules", Rules)):
        inner = {item.name: changes.pop(item.name) for item in fields(kind) if item.name in changes}
        if inner:
            arguments[group] = replace(arguments[group], **inner)
    getattr(package, make.__name__)(**arguments | changes, validate=validate)
