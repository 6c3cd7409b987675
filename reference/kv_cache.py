"""What writing new keys and values into a paged cache means."""

from __future__ import annotations

import torch
from torch import Tensor

from .casting import narrow
from .problem import FLOAT8, Scales
from .validation import check_slots, check_update_kv_cache, check_update_mla_cache


@torch.no_grad()
def update_kv_cache(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    scales: Scales | None = None,
    validate: bool = False,
) -> None:
    """Row i of key and value goes to slot_mapping[i] = block * block_size + offset; negative slots are skipped.

    key [N, num_kv_heads, head_size] and value [N, num_kv_heads, head_size_v], N >= num_tokens (rows past
    slot_mapping's are padding), slot_mapping [num_tokens] int64; caches as in `attention`, written in place
    whatever their strides, every other byte untouched. A cache has key's dtype, or is float8_e4m3fn and gets
    x / scale: IEEE division in float32, clamped to +-448, rounded to nearest even, NaN kept. Only scales.k and
    scales.v play a part.

    A slot that occurs twice is the caller's error: either row may win. Raises ValueError or TypeError on bad
    input; slots are looked at only with `validate`.
    """
    check_update_kv_cache(
        key=key, value=value, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping, scales=scales
    )
    if validate:
        check_slots(slot_mapping, num_blocks=k_cache.shape[0], block_size=k_cache.shape[1])
    scales = scales or Scales()
    _store(key, k_cache, slot_mapping, scales.k)
    _store(value, v_cache, slot_mapping, scales.v)


@torch.no_grad()
def update_mla_cache(
    latent: Tensor,
    k_pe: Tensor,
    latent_cache: Tensor,
    slot_mapping: Tensor,
    *,
    scales: Scales | None = None,
    validate: bool = False,
) -> None:
    """The same for MLA: one row [latent | k_pe] per token, one scale (scales.k) for the whole row.

    latent [N, kv_lora_rank], k_pe [N, qk_rope_head_dim], latent_cache [num_blocks, block_size, kv_lora_rank +
    qk_rope_head_dim].
    """
    check_update_mla_cache(
        latent=latent, k_pe=k_pe, latent_cache=latent_cache, slot_mapping=slot_mapping, scales=scales
    )
    if validate:
        check_slots(slot_mapping, num_blocks=latent_cache.shape[0], block_size=latent_cache.shape[1])
    row = torch.cat((latent, k_pe), dim=1)[:, None, :]
    _store(row, latent_cache[:, :, None, :], slot_mapping, None if scales is None else scales.k)


def _store(values: Tensor, cache: Tensor, slot_mapping: Tensor, scale: Tensor | None) -> None:
    """values [N, heads, D] into cache [num_blocks, block_size, heads, D], bytes moved as integers."""
    rows = torch.nonzero(slot_mapping >= 0).squeeze(1)
    slots = slot_mapping[rows]
    values = values[rows]
    if cache.dtype == FLOAT8:
        wide = values if values.dtype == torch.float64 else values.float()
        values = narrow(wide, FLOAT8, None if scale is None else scale.reshape(-1, 1))
    block_size = cache.shape[1]
    integers = _INTEGERS[cache.element_size()]
    cache.view(integers)[slots // block_size, slots % block_size] = values.view(integers)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
