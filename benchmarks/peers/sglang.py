"""SGLang's Triton kernels, as of 0.5.23: decode in splits (grouped heads and latent rows), and extend."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from pageproof.oracle import NumericContract
from pageproof.oracle.building.problem import Problem

from . import Prepared, Unsupported
from .live import Live, live, require, require_one_token

DECODE = "sglang.kernels.ops.attention.decode_attention"
EXTEND = "sglang.kernels.ops.attention.extend_attention"
TILE_KEYS = 8  # the smallest tile of either kernel on any hardware is no smaller


def in_8_splits(problem: Problem) -> Prepared:
    """The server's usual number."""
    return _decode(problem, 8)


def in_32_splits(problem: Problem) -> Prepared:
    return _decode(problem, 32)


def in_128_splits(problem: Problem) -> Prepared:
    return _decode(problem, 128)


def _decode(problem: Problem, splits: int) -> Prepared:
    module = importlib.import_module(DECODE)
    require(problem, rules=("softcap", "sliding_window", "sinks"), float8=not problem.case.spec.is_mla)
    found = live(problem)
    require_one_token(found)
    spec, device = found.spec, found.batch.device
    queries, keys, values = _operands(found)
    window = found.rules.sliding_window
    seen = [length if window is None else min(length, window) for length in found.seq_lens]
    slots = found.slots(
        [length - count for length, count in zip(found.seq_lens, seen, strict=True)], list(found.seq_lens)
    )
    indptr, indices = found.indptr(seen), slots.int()
    width = values.shape[-1]
    logits = torch.empty(found.rows, spec.num_query_heads, splits, width, device=device)
    lse = torch.empty(found.rows, spec.num_query_heads, splits, device=device)
    counts = torch.full((found.rows,), splits, dtype=torch.int32, device=device)
    key_scale, value_scale = found.scale("k"), found.scale("v")
    out, outputs = found.new_out()

    def work() -> None:
        module.decode_attention_fwd(
            queries,
            keys,
            values,
            out,
            indptr,
            indices,
            logits,
            lse,
            counts,
            splits,
            found.rules.softmax_scale,
            key_scale,
            value_scale,
            logit_cap=found.rules.softcap or 0.0,
            sinks=found.rules.sinks,
            has_mla=spec.is_mla,
        )

    split_keys = max(32, min(seen) // splits)
    return Prepared(work=work, outputs=outputs, contract=_contract(spec.kv_dtype or spec.dtype, split_keys))


def _operands(found: Live) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and the pools as rows of slots; values of latent rows are their first columns."""
    arguments = found.problem.arguments
    if found.spec.is_mla:
        queries = torch.cat((found.argument("q_nope"), found.argument("q_pe")), dim=-1)
        keys = arguments["latent_cache"].flatten(0, 1).unsqueeze(1)
        return queries, keys, keys[..., : found.spec.head_size]
    return found.argument("q"), arguments["k_cache"].flatten(0, 1), arguments["v_cache"].flatten(0, 1)


def _contract(p_dtype: str, split_keys: int | None) -> NumericContract:
    """P is cast to the values' format, float8 ones included; tanh is a scaled sigmoid; the sink joins last."""
    return NumericContract(
        p_dtype=p_dtype, tanh="exp", exponent_roundings=3, tile_keys=TILE_KEYS, split_keys=split_keys
    )


def extend(problem: Problem) -> Prepared:
    """New tokens over their own keys, contiguous as a layer has them, and over the cached ones before them."""
    module = importlib.import_module(EXTEND)
    require(problem, rules=("softcap", "sliding_window", "sinks"))
    found = live(problem)
    if found.rules.sliding_window == 1:
        raise Unsupported("a window of the token alone means none to it")
    device, window = found.batch.device, found.window_left
    starts = [keys - new for new, keys in zip(found.query_lens, found.seq_lens, strict=True)]
    prefixes = [start if window < 0 else min(start, window) for start in starts]
    firsts = [start - prefix for start, prefix in zip(starts, prefixes, strict=True)]
    queries, keys, values = _operands(found)
    new = found.slots(starts, list(found.seq_lens))
    new_keys, new_values = keys[new], values[new]
    indptr, indices = found.indptr(prefixes), found.slots(firsts, starts)
    if not indices.numel():
        indices = torch.zeros(1, dtype=torch.int64, device=device)  # of which nothing is read
    out, outputs = found.new_out()

    def work() -> None:
        module.extend_attention_fwd(
            queries,
            new_keys,
            new_values,
            out,
            keys,
            values,
            found.batch.cu_seqlens_q,
            indptr,
            indices,
            None,
            True,
            None,
            max(found.query_lens),
            1.0,
            1.0,
            sm_scale=found.rules.softmax_scale,
            logit_cap=found.rules.softcap or 0.0,
            sliding_window_size=window,
            sinks=found.rules.sinks,
        )

    return Prepared(work=work, outputs=outputs, contract=_contract(found.spec.dtype, None))
