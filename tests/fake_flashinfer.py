"""FlashInfer's wrappers by their documentation, computed by the reference: what an adapter must say to them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pageproof import reference
from pageproof.reference.problem import Batch, Rules, Scales


class _Paged:
    """What both paged wrappers do; `causal` is bottom-right, `window_left` counts the keys left of the token."""

    def __init__(self, workspace: Tensor, kv_layout: str = "NHD", **options: Any) -> None:
        assert workspace.dtype == torch.uint8
        assert kv_layout == "NHD"
        self.options = options

    def _plan(self, starts: Tensor, pages: tuple[Tensor, Tensor, Tensor], page_size: int, rules: Rules) -> None:
        indptr, indices, last = pages
        assert {tensor.dtype for tensor in (starts, *pages)} == {torch.int32}
        counts = (indptr[1:] - indptr[:-1]).tolist()
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for request, count in enumerate(counts):
            table[request, :count] = indices[indptr[request] : indptr[request] + count]
        lengths = (indptr[1:] - indptr[:-1] - 1) * page_size + last
        self.batch, self.rules = Batch(starts, lengths, table), rules

    def run(
        self, q: Tensor, caches: tuple[Tensor, Tensor], *, k_scale: float, v_scale: float | None, out: Tensor
    ) -> None:
        scales = Scales(k=torch.tensor([k_scale]), v=torch.tensor([1.0 if v_scale is None else v_scale]))
        is_float8 = caches[0].dtype == torch.float8_e4m3fn
        reference.attention(q, *caches, self.batch, self.rules, scales=scales if is_float8 else None, out=out)


def _rules(sm_scale: float, window_left: int, logits_soft_cap: float | None) -> Rules:
    window = None if window_left < 0 else window_left + 1
    return Rules(softmax_scale=sm_scale, sliding_window=window, softcap=logits_soft_cap)


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, *, window_left: int, logits_soft_cap: float | None, q_data_type: torch.dtype,
        kv_data_type: torch.dtype, sm_scale: float,
    ) -> None:  # fmt: skip
        starts = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        rules = _rules(sm_scale, window_left, logits_soft_cap)
        self._plan(starts, (indptr, indices, last_page_len), page_size, rules)


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    def plan(
        self, qo_indptr: Tensor, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim_qk: int, page_size: int, *, causal: bool, window_left: int,
        logits_soft_cap: float | None, sm_scale: float, q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert causal
        rules = _rules(sm_scale, window_left, logits_soft_cap)
        self._plan(qo_indptr, (indptr, indices, last_page_len), page_size, rules)


class BatchMLAPagedAttentionWrapper:
    def __init__(self, workspace: Tensor, *, backend: str) -> None:
        assert backend in ("fa2", "fa3")

    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor, num_heads: int,
        head_dim_ckv: int, head_dim_kpe: int, page_size: int, causal: bool, sm_scale: float,
        q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert causal
        counts = (kv_indptr[1:] - kv_indptr[:-1]).tolist()
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for request, count in enumerate(counts):
            table[request, :count] = kv_indices[kv_indptr[request] : kv_indptr[request] + count]
        self.batch, self.rules = Batch(qo_indptr, kv_len_arr, table), Rules(softmax_scale=sm_scale)

    def run(self, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor, *, out: Tensor) -> None:
        latent = torch.cat((ckv_cache, kpe_cache), dim=-1)
        reference.mla_attention(q_nope, q_pe, latent, self.batch, self.rules, out=out)


def append_paged_kv_cache(
    append_key: Tensor, append_value: Tensor, batch_indices: Tensor, positions: Tensor,
    paged_kv_cache: tuple[Tensor, Tensor], kv_indices: Tensor, kv_indptr: Tensor, kv_last_page_len: Tensor,
) -> None:  # fmt: skip
    """Row i belongs to request batch_indices[i] and stands at positions[i] of it; lengths count the new rows too."""
    size = paged_kv_cache[0].shape[1]
    for row, (request, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
        pages = kv_indices[int(kv_indptr[request]) : int(kv_indptr[request + 1])]
        assert position < (len(pages) - 1) * size + int(kv_last_page_len[request])
        for cache, rows in zip(paged_kv_cache, (append_key, append_value), strict=True):
            cache[int(pages[position // size]), position % size] = rows[row]


def modules() -> dict[str, ModuleType]:
    """What to put into sys.modules."""
    package, mla = ModuleType("flashinfer"), ModuleType("flashinfer.mla")
    for wrapper in (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper, append_paged_kv_cache):
        setattr(package, wrapper.__name__, wrapper)
    mla.BatchMLAPagedAttentionWrapper = BatchMLAPagedAttentionWrapper  # type: ignore[attr-defined]
    return {"flashinfer": package, "flashinfer.mla": mla}
