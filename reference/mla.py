"""What multi-head latent attention means, absorbed and decompressed: two references that agree.

A cache row holds [c | k_pe]: the latent of kv_lora_rank elements and the rotated key part that all heads share.
Decompressed, head h has k = [W_UK c ; k_pe] and v = W_UV c, and attention is the ordinary one. Absorbed, W_UK
has moved to the query: one kv head whose key is the whole row and whose value is the row's latent part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .attention import Answer, answer, collect
from .chunks import Request
from .problem import Batch, Rules, Scales
from .rows import Rows, as_bytes, row_groups
from .validation import check_batch_values, check_mla_attention, check_mla_attention_decompressed


@torch.no_grad()
def mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    batch: Batch,
    rules: Rules,
    *,
    scales: Scales | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA: q_nope is already W_UK^T q, and out_latent still has to go through W_UV.

    q_nope [num_tokens, num_query_heads, kv_lora_rank], q_pe [num_tokens, num_query_heads, qk_rope_head_dim],
    latent_cache [num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]. scales.k is worth one unit of the
    whole row, values included. Returns out_latent [num_tokens, num_query_heads, kv_lora_rank] and lse; dtypes,
    errors and everything else as in `attention` with one kv head.
    """
    check_mla_attention(
        q_nope=q_nope, q_pe=q_pe, latent_cache=latent_cache, batch=batch, rules=rules, scales=scales, out=out, lse=lse
    )
    if validate:
        _check_values(q_nope, latent_cache, batch, rules, scales)
    answers = mla_attention_rows(q_nope, q_pe, latent_cache, batch, rules, scales)
    shape = (q_nope.shape[0], q_nope.shape[1], q_nope.shape[2])
    return collect(answers, shape, like=q_nope, out=out, lse=lse, scales=scales)


@torch.no_grad()
def mla_attention_decompressed(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    batch: Batch,
    rules: Rules,
    *,
    scales: Scales | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """MLA before absorption: every head's keys and values are made from the latent rows.

    q_nope [num_tokens, num_query_heads, qk_nope_head_dim], w_uk [num_query_heads, qk_nope_head_dim,
    kv_lora_rank], w_uv [num_query_heads, v_head_dim, kv_lora_rank] of q's dtype (any plain one beside a float8
    q); the rest as in `mla_attention`. Returns out [num_tokens, num_query_heads, v_head_dim] and lse.
    """
    check_mla_attention_decompressed(
        q_nope=q_nope,
        q_pe=q_pe,
        latent_cache=latent_cache,
        w_uk=w_uk,
        w_uv=w_uv,
        batch=batch,
        rules=rules,
        scales=scales,
        out=out,
        lse=lse,
    )
    if validate:
        _check_values(q_nope, latent_cache, batch, rules, scales)
    answers = mla_attention_decompressed_rows(q_nope, q_pe, latent_cache, w_uk, w_uv, batch, rules, scales)
    shape = (q_nope.shape[0], q_nope.shape[1], w_uv.shape[1])
    return collect(answers, shape, like=q_nope, out=out, lse=lse, scales=scales)


def mla_attention_rows(
    q_nope: Tensor, q_pe: Tensor, latent_cache: Tensor, batch: Batch, rules: Rules, scales: Scales | None = None
) -> Iterator[Answer]:
    """`mla_attention` chunk by chunk, unrounded and with every intermediate."""
    rank = latent_cache.shape[2] - q_pe.shape[2]
    for rows in latent_rows(q_nope, q_pe, latent_cache, rank, batch, rules, scales):
        yield answer(rows, rules)


def mla_attention_decompressed_rows(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    batch: Batch,
    rules: Rules,
    scales: Scales | None = None,
) -> Iterator[Answer]:
    """`mla_attention_decompressed` chunk by chunk, unrounded and with every intermediate."""
    head_width = q_nope.shape[2] + q_pe.shape[2] + w_uv.shape[1]
    key_width = latent_cache.shape[2] + w_uk.shape[0] * head_width
    for rows in latent_rows(q_nope, q_pe, latent_cache, w_uk.shape[2], batch, rules, scales, key_width):
        yield answer(decompress(rows, w_uk, w_uv), rules)


def latent_rows(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    kv_lora_rank: int,
    batch: Batch,
    rules: Rules,
    scales: Scales | None,
    key_width: int | None = None,
    requests: Sequence[Request] | None = None,
) -> Iterator[Rows]:
    """Rows with one kv head: q = [q_nope | q_pe], k the cache's whole row, v its first kv_lora_rank elements.

    Before absorption q is not comparable with that k; `decompress` makes it so. key_width and
    requests as in `row_groups`.
    """
    q = torch.cat((as_bytes(q_nope), as_bytes(q_pe)), dim=2).view(q_nope.dtype)
    cache = latent_cache[:, :, None, :]
    row_scales = None if scales is None else Scales(q=scales.q, k=scales.k, v=scales.k)
    values = cache[..., :kv_lora_rank]
    return row_groups(q, cache, values, batch, rules, row_scales, key_width=key_width, requests=requests)


def decompress(rows: Rows, w_uk: Tensor, w_uv: Tensor) -> Rows:
    """Latent rows as ordinary ones with num_kv_heads = num_query_heads: k = [W_UK c ; k_pe], v = W_UV c.

    w_uk [H, nope, kv_lora_rank], w_uv [H, v_head_dim, kv_lora_rank]; k becomes [G, L, H, nope + rope] and v
    [G, L, H, v_head_dim].
    """
    latent, k_pe = rows.v[:, :, 0], rows.k[:, :, 0, w_uk.shape[2] :]
    k_nope = torch.einsum("glc,hnc->ghln", latent, w_uk.double())
    k_pe = k_pe[:, None].expand(-1, w_uk.shape[0], -1, -1)
    v = torch.einsum("glc,hvc->ghlv", latent, w_uv.double())
    k = torch.cat((k_nope, k_pe), dim=3)
    return replace(rows, q=rows.q.transpose(2, 3), k=k.transpose(1, 2), v=v.transpose(1, 2))


def _check_values(q_nope: Tensor, latent_cache: Tensor, batch: Batch, rules: Rules, scales: Scales | None) -> None:
    num_blocks, block_size = latent_cache.shape[:2]
    check_batch_values(
        batch, rules, num_tokens=q_nope.shape[0], num_blocks=num_blocks, block_size=block_size, scales=scales
    )
