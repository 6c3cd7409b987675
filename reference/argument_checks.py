"""The single checks that validation.py puts together: one argument or one relation each, host-visible only."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import bad_type, bad_value, check_tensor
from .problem import FLOAT8, Batch, Rules, Scales

Dtypes = tuple[torch.dtype, ...]
KERNEL_DTYPES: Dtypes = (torch.float32, torch.float16, torch.bfloat16)
REFERENCE_DTYPES: Dtypes = (*KERNEL_DTYPES, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_groups(batch: Batch, rules: Rules, scales: Scales | None) -> None:
    """The three groups of arguments are what they say."""
    if not isinstance(batch, Batch):
        raise TypeError(f"batch: found {type(batch).__name__}, expected a Batch")
    if not isinstance(rules, Rules):
        raise TypeError(f"rules: found {type(rules).__name__}, expected Rules")
    check_scales_type(scales)


def check_scales_type(scales: Scales | None) -> None:
    if scales is not None and not isinstance(scales, Scales):
        raise TypeError(f"scales: found {type(scales).__name__}, expected Scales or None")


def check_rows(name: str, rows: Tensor, dims: int, dtypes: Dtypes, device: torch.device) -> None:
    """A buffer with a row per token: any strides, the last dimension contiguous, no dimension but tokens empty."""
    check_tensor(name, rows, dims=dims, dtypes=dtypes, device=device)
    if 0 in rows.shape[1:]:
        raise bad_value(name, f"shape {tuple(rows.shape)}", "no empty dimension but the first")
    if rows.shape[-1] > 1 and rows.stride(-1) != 1:
        raise bad_value(name, f"strides {rows.stride()}", "a last dimension with stride 1")


def check_cache(name: str, cache: Tensor, dims: int, dtypes: Dtypes, device: torch.device) -> None:
    """Paged storage, of any strides: an empty pool is fine, an empty slot is not."""
    check_tensor(name, cache, dims=dims, dtypes=dtypes, device=device)
    if 0 in cache.shape[1:]:
        raise bad_value(name, f"shape {tuple(cache.shape)}", "no empty dimension but the first")


def check_writable(name: str, tensor: Tensor) -> None:
    """No dimension is expanded: two elements in one place cannot both be written."""
    if 0 in tensor.stride() and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise bad_value(name, f"strides {tensor.stride()}", "no expanded dimension in a tensor that is written")


def check_cache_pair(k_cache: Tensor, v_cache: Tensor) -> None:
    """Both caches are one pool: the same format and the same pages, slots and heads."""
    if v_cache.dtype != k_cache.dtype:
        raise bad_type("v_cache", v_cache.dtype, f"k_cache's {name_of(k_cache.dtype)}")
    if v_cache.shape[:3] == k_cache.shape[:3]:
        return
    for dim, size in enumerate(("num_blocks", "block_size", "num_kv_heads")):
        if v_cache.shape[dim] != k_cache.shape[dim]:
            raise bad_value("v_cache", f"{size} {v_cache.shape[dim]}", f"k_cache's {size} {k_cache.shape[dim]}")


def cache_dtypes(rows: Tensor) -> Dtypes:
    """The formats a cache may have beside q, or beside the key it is written from."""
    return (FLOAT8,) if rows.dtype == FLOAT8 else (rows.dtype, FLOAT8)


def check_output(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: Dtypes, device: torch.device) -> None:
    """out or lse as the caller gave it."""
    check_tensor(name, tensor, dims=len(shape), dtypes=dtypes, device=device)
    if tuple(tensor.shape) != shape:
        raise bad_value(name, f"shape {tuple(tensor.shape)}", str(shape))
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise bad_value(name, f"strides {tensor.stride()}", "a last dimension with stride 1")
    check_writable(name, tensor)


def check_rules(rules: Rules, num_tokens: int, num_query_heads: int, device: torch.device) -> None:
    """The rules' tensors fit q and lie beside it."""
    for name, tensor in (("alibi_slopes", rules.alibi_slopes), ("sinks", rules.sinks)):
        if tensor is None:
            continue
        check_tensor(name, tensor, device=device)
        if tensor.shape[0] != num_query_heads:
            raise bad_value(name, f"{tensor.shape[0]} entries", f"one for each of {num_query_heads} query heads")
    if rules.query_bias is not None:
        check_tensor("query_bias", rules.query_bias, device=device)
        if rules.query_bias.shape[0] != num_tokens:
            raise bad_value("query_bias", f"{rules.query_bias.shape[0]} rows", f"one for each of {num_tokens} tokens")


def check_scale(
    name: str, scale: Tensor | None, dtype: torch.dtype | None, num_kv_heads: int, device: torch.device
) -> None:
    """One entry of `scales`, beside the tensor of this dtype that it scales (None: there is no such tensor)."""
    if scale is None:
        return
    label = f"scales.{name}"
    if dtype != FLOAT8:
        beside = "with no such tensor" if dtype is None else f"beside a {name_of(dtype)} tensor"
        raise bad_value(label, f"a scale {beside}", "None: only float8_e4m3fn is scaled")
    check_tensor(label, scale, device=device)
    if scale.numel() not in (1, num_kv_heads):
        raise bad_value(label, f"{scale.numel()} entries", f"one, or one for each of {num_kv_heads} kv heads")
