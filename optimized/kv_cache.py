"""Writing new keys and values into the paged cache; the meaning is reference/kv_cache.py's."""

from __future__ import annotations

import functools

import triton
from torch import Tensor

from ..reference.problem import Scales
from ..reference.validation import KERNEL_DTYPES, check_slots, check_update_kv_cache, check_update_mla_cache
from . import operators
from .kernels.arguments import DeviceScales, paged_kv, queries, scale
from .kernels.kv_update import kv_update
from .kernels.sizes import UpdateSizes
from .launch import device_guard, require_device
from .launching import Constants, launch
from .shapes import padded
from .tuning import update_elements, update_heads, update_programs


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
    """Write row i of key and value to slot_mapping[i] = block * block_size + offset; a negative slot is skipped.

    key [num_rows, num_kv_heads, head_size], value the same with head_size_v, num_rows >= num_tokens; k_cache and
    v_cache as in `attention`; slot_mapping [num_tokens] int64. float8_e4m3fn caches store x / scale (IEEE
    division), clamped to +-448, rounded to nearest even. No other byte of the pool changes.
    Raises ValueError or TypeError on bad input; out-of-range and duplicate slots only under `validate`.
    """
    check_update_kv_cache(
        key=key, value=value, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping, scales=scales,
        dtypes=KERNEL_DTYPES,
    )  # fmt: skip
    require_device("key", key)
    if validate:
        check_slots(slot_mapping, num_blocks=k_cache.shape[0], block_size=k_cache.shape[1])
    scales = scales or Scales()
    operators.call("update_kv_cache", key, value, k_cache, v_cache, slot_mapping, scales.k, scales.v)


def update_mla_cache(
    latent: Tensor,
    k_pe: Tensor,
    latent_cache: Tensor,
    slot_mapping: Tensor,
    *,
    scales: Scales | None = None,
    validate: bool = False,
) -> None:
    """Write [latent | k_pe] of row i to slot_mapping[i] of a latent cache, in one row with one scale.

    latent [num_rows, kv_lora_rank], k_pe [num_rows, qk_rope_head_dim], latent_cache [num_blocks, block_size,
    kv_lora_rank + qk_rope_head_dim]; the rest as in `update_kv_cache`.
    """
    check_update_mla_cache(
        latent=latent, k_pe=k_pe, latent_cache=latent_cache, slot_mapping=slot_mapping, scales=scales,
        dtypes=KERNEL_DTYPES,
    )  # fmt: skip
    require_device("latent", latent)
    if validate:
        check_slots(slot_mapping, num_blocks=latent_cache.shape[0], block_size=latent_cache.shape[1])
    scales = scales or Scales()
    operators.call("update_mla_cache", latent, k_pe, latent_cache, slot_mapping, scales.k)


def update_rows(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, scales: DeviceScales
) -> None:
    """The launch of one update; of the scales only those of the caches may be there."""
    num_tokens = slot_mapping.shape[0]
    if num_tokens == 0:
        return
    constants = _constants(key.shape[1], key.shape[2], value.shape[2], k_cache.shape[1])
    with device_guard(key):
        launch(
            kv_update,
            min(triton.cdiv(num_tokens, constants["SIZES"].tokens_step), update_programs(key.device)),
            (queries(key), queries(value), paged_kv(k_cache, v_cache), scales, slot_mapping),
            (num_tokens,),
            constants,
        )


@functools.lru_cache(maxsize=1024)
def _constants(num_heads: int, head_size: int, head_size_v: int, block_size: int) -> Constants:
    padded_head, padded_value = padded(head_size), padded(head_size_v)
    heads_step = min(triton.next_power_of_2(num_heads), update_heads())
    sizes = UpdateSizes(
        num_kv_heads=num_heads,
        head_size=head_size,
        head_size_v=head_size_v,
        block_size=block_size,
        padded_head=padded_head,
        padded_value=padded_value,
        tokens_step=max(1, update_elements() // (heads_step * max(padded_head, padded_value))),
        heads_step=heads_step,
    )
    return {"SIZES": sizes}


def _run_update(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    scales = DeviceScales(k=scale(k_scale), v=scale(v_scale))
    update_rows(key, value, k_cache, v_cache, slot_mapping, scales)


def _run_mla_update(
    latent: Tensor, k_pe: Tensor, latent_cache: Tensor, slot_mapping: Tensor, k_scale: Tensor | None
) -> None:
    """A latent row is a key head and a value head side by side."""
    rank = latent.shape[1]
    k_cache, v_cache = latent_cache[..., :rank].unsqueeze(2), latent_cache[..., rank:].unsqueeze(2)
    scales = DeviceScales(k=scale(k_scale), v=scale(k_scale))
    update_rows(latent.unsqueeze(1), k_pe.unsqueeze(1), k_cache, v_cache, slot_mapping, scales)


operators.define(
    "update_kv_cache",
    "Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
    "Tensor? k_scale, Tensor? v_scale",
    _run_update,
)
operators.define(
    "update_mla_cache",
    "Tensor latent, Tensor k_pe, Tensor(a!) latent_cache, Tensor slot_mapping, Tensor? k_scale",
    _run_mla_update,
)
