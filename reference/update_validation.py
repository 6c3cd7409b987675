"""What the cache updates and merge_states ask of their arguments; validation.py lists these beside the others."""

from __future__ import annotations

import torch
from torch import Tensor

from .argument_checks import (
    REFERENCE_DTYPES,
    Dtypes,
    cache_dtypes,
    check_cache,
    check_cache_pair,
    check_rows,
    check_scale,
    check_scales_type,
    check_writable,
)
from .errors import bad_value, check_tensor
from .problem import Scales


def check_update_kv_cache(
    *,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    scales: Scales | None = None,
    dtypes: Dtypes = REFERENCE_DTYPES,
) -> None:
    """Raise ValueError or TypeError unless these are arguments of `update_kv_cache`; scales.q and .out play no part."""
    check_scales_type(scales)
    device = _check_slot_mapping(slot_mapping)
    check_rows("key", key, 3, dtypes, device)
    check_rows("value", value, 3, (key.dtype,), device)
    check_cache("k_cache", k_cache, 4, cache_dtypes(key), device)
    check_cache("v_cache", v_cache, 4, cache_dtypes(key), device)
    check_cache_pair(k_cache, v_cache)
    _check_row_counts("key", key, "value", value, slot_mapping)
    for name, rows, cache_name, cache in (("key", key, "k_cache", k_cache), ("value", value, "v_cache", v_cache)):
        if rows.shape[1:] != cache.shape[2:]:
            raise bad_value(name, f"heads {tuple(rows.shape[1:])}", f"{cache_name}'s {tuple(cache.shape[2:])}")
        check_writable(cache_name, cache)
    if scales is not None:
        check_scale("k", scales.k, k_cache.dtype, k_cache.shape[2], device)
        check_scale("v", scales.v, v_cache.dtype, v_cache.shape[2], device)


def check_update_mla_cache(
    *,
    latent: Tensor,
    k_pe: Tensor,
    latent_cache: Tensor,
    slot_mapping: Tensor,
    scales: Scales | None = None,
    dtypes: Dtypes = REFERENCE_DTYPES,
) -> None:
    """Raise ValueError or TypeError unless these are arguments of `update_mla_cache`."""
    check_scales_type(scales)
    device = _check_slot_mapping(slot_mapping)
    check_rows("latent", latent, 2, dtypes, device)
    check_rows("k_pe", k_pe, 2, (latent.dtype,), device)
    check_cache("latent_cache", latent_cache, 3, cache_dtypes(latent), device)
    _check_row_counts("latent", latent, "k_pe", k_pe, slot_mapping)
    if latent_cache.shape[2] != latent.shape[1] + k_pe.shape[1]:
        raise bad_value(
            "latent_cache",
            f"rows of {latent_cache.shape[2]}",
            f"{latent.shape[1]} (latent) + {k_pe.shape[1]} (k_pe)",
        )
    check_writable("latent_cache", latent_cache)
    if scales is not None:
        check_scale("k", scales.k, latent_cache.dtype, 1, device)
        check_scale("v", scales.v, None, 1, device)


def check_merge_states(
    *, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, dtypes: Dtypes = REFERENCE_DTYPES
) -> None:
    """Raise ValueError or TypeError unless these are arguments of `merge_states`."""
    check_tensor("out_a", out_a)
    check_rows("out_a", out_a, 3, dtypes, out_a.device)
    lse_dtypes = tuple(dtype for dtype in dtypes if dtype in (torch.float32, torch.float64))
    check_rows("out_b", out_b, 3, (out_a.dtype,), out_a.device)
    if out_b.shape != out_a.shape:
        raise bad_value("out_b", f"shape {tuple(out_b.shape)}", f"out_a's {tuple(out_a.shape)}")
    check_rows("lse_a", lse_a, 2, lse_dtypes, out_a.device)
    check_rows("lse_b", lse_b, 2, (lse_a.dtype,), out_a.device)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != out_a.shape[:2]:
            raise bad_value(name, f"shape {tuple(lse.shape)}", f"{tuple(out_a.shape[:2])} as out_a has it")


def _check_slot_mapping(slot_mapping: Tensor) -> torch.device:
    check_tensor("slot_mapping", slot_mapping, dims=1, dtypes=(torch.int64,))
    if slot_mapping.shape[0] > 1 and slot_mapping.stride(0) != 1:
        raise bad_value("slot_mapping", f"stride {slot_mapping.stride(0)}", "a contiguous tensor")
    return slot_mapping.device


def _check_row_counts(name: str, rows: Tensor, other_name: str, other: Tensor, slot_mapping: Tensor) -> None:
    if rows.shape[0] < slot_mapping.shape[0]:
        raise bad_value(name, f"{rows.shape[0]} rows", f"at least slot_mapping's {slot_mapping.shape[0]}")
    if other.shape[0] != rows.shape[0]:
        raise bad_value(other_name, f"{other.shape[0]} rows", f"{name}'s {rows.shape[0]}")
