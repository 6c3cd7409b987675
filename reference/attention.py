"""What attention over a paged KV cache means.

One chunk of rows at a time, in float64:  row_groups -> logits -> softmax -> P @ V.  Each step's result is a
value that can be looked at, which is how the oracle's error bound is made from the same numbers.
Axes: G requests, T rows, L keys, Hkv kv heads, g query heads per kv head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .casting import narrow, per_query_head
from .problem import FLOAT8, Batch, Rules, Scales
from .rows import Rows, row_groups
from .validation import check_attention, check_batch_values

LARGEST = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class Scores:
    """Each step of a score, float64 [G, Hkv, g, T, L]. x, y and bias are finite where no row sees the key too."""

    x: Tensor  # softmax_scale * <q, k>
    y: Tensor  # after softcap; x itself where there is none
    bias: Tensor | None  # ALiBi + query bias
    s: Tensor  # y + bias where the key is visible, -inf elsewhere


@dataclass(frozen=True)
class Weights:
    """The softmax with the sink in its denominator, float64."""

    p: Tensor  # [G, Hkv, g, T, L]: exp(s - M) / L; 0 where not visible
    p_sink: Tensor  # [G, Hkv, g, T]: the sink's share; 0 without one
    sink: Tensor  # [Hkv, g], or [G, Hkv, g] where requests differ in it: the sink's logit; -inf without one
    maximum: Tensor  # M [G, Hkv, g, T]: over the visible scores and the sink; -inf in an empty row without one
    denominator: Tensor  # L [G, Hkv, g, T]: sum of exp(s - M), sink included; 0 in an empty row without one
    lse: Tensor  # [G, Hkv, g, T]: M + log(L); -inf in an empty row without a sink


@dataclass(frozen=True)
class Answer:
    """One chunk's rows, everything on the way, and its output before scales.out and the one cast."""

    rows: Rows
    scores: Scores
    weights: Weights
    out: Tensor  # [G, Hkv, g, T, Dv] float64


@torch.no_grad()
def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    rules: Rules,
    *,
    scales: Scales | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of every request's new tokens over its cached keys; docs/contract.md says what that means.

    q [num_tokens, num_query_heads, head_size], k_cache [num_blocks, block_size, num_kv_heads, head_size],
    v_cache the same with head_size_v: float64, float32, float16 or bfloat16, all alike, or float8_e4m3fn
    caches (and then perhaps a float8 q) with `scales`.

    Returns out [num_tokens, num_query_heads, head_size_v], `out` itself if given (of any float dtype; by
    default q's, bfloat16 for a float8 q), and lse [num_tokens, num_query_heads] float32 in natural-log
    units, or float64 where q or the given `lse` is. Everything is computed in float64 and cast once.
    Raises ValueError or TypeError on bad input; values on the device are looked at only with `validate`.
    """
    check_attention(q=q, k_cache=k_cache, v_cache=v_cache, batch=batch, rules=rules, scales=scales, out=out, lse=lse)
    if validate:
        num_blocks, block_size = k_cache.shape[:2]
        check_batch_values(
            batch, rules, num_tokens=q.shape[0], num_blocks=num_blocks, block_size=block_size, scales=scales
        )
    shape = (q.shape[0], q.shape[1], v_cache.shape[3])
    answers = attention_rows(q, k_cache, v_cache, batch, rules, scales)
    return collect(answers, shape, like=q, out=out, lse=lse, scales=scales)


def attention_rows(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, rules: Rules, scales: Scales | None = None
) -> Iterator[Answer]:
    """The same chunk by chunk, unrounded and with every intermediate; the arguments are already checked."""
    for rows in row_groups(q, k_cache, v_cache, batch, rules, scales):
        yield answer(rows, rules)


def answer(rows: Rows, rules: Rules) -> Answer:
    """One chunk's attention."""
    scores = logits(rows, rules)
    weights = softmax(scores, rows.sinks)
    return Answer(rows, scores, weights, weigh(weights.p, rows.v))


def logits(rows: Rows, rules: Rules) -> Scores:
    """Scores in the contract's order: scale, softcap, ALiBi, query bias, visibility."""
    x = rules.softmax_scale * dot(rows.q, rows.k)
    y = x if rows.softcap is None else rows.softcap * torch.tanh(x / rows.softcap)
    bias = None if rows.query_bias is None else rows.query_bias[:, None, None].expand_as(y)
    if rows.alibi_slopes is not None:
        slopes = rows.alibi_slopes.double().unflatten(-1, x.shape[1:3])
        alibi = slopes[..., None, None] * rows.distances[:, None, None]
        bias = alibi if bias is None else alibi + bias
    s = y if bias is None else y + bias
    return Scores(x, y, bias, torch.where(rows.visible[:, None, None], s, -torch.inf))


def softmax(scores: Scores, sinks: Tensor | None) -> Weights:
    """Weights of the visible keys and of the sink; nothing visible and no sink gives 0 and lse -inf.

    sinks: [num_query_heads], or [G, num_query_heads].
    """
    s = scores.s
    sink = s.new_full(s.shape[1:3], -torch.inf) if sinks is None else sinks.double().unflatten(-1, s.shape[1:3])
    sink_of_row = sink[..., None]
    maximum = torch.maximum(s.amax(dim=-1), sink_of_row)
    # An infinite maximum is an empty row (-inf) or a sink that takes all the weight (+inf). As the largest finite
    # number it can be subtracted: what is far below it weighs 0, and the infinite sink, cut to it as well, weighs 1.
    shift = maximum.clamp(-LARGEST, LARGEST)
    p = torch.exp(s - shift[..., None])
    p_sink = torch.exp(sink_of_row.clamp(max=LARGEST) - shift)
    denominator = p.sum(dim=-1) + p_sink
    lse = maximum + torch.log(denominator)
    divisor = denominator.clamp(min=1.0)  # at least 1 in every row but an empty one, where it is 0
    return Weights(p / divisor[..., None], p_sink / divisor, sink, maximum, denominator, lse)


def dot(q: Tensor, k: Tensor) -> Tensor:
    """<q, k_j>: [G, T, Hkv, g, D] and [G, L, Hkv, D] to [G, Hkv, g, T, L]."""
    groups, num_rows, num_kv_heads, group_size, _ = q.shape
    flat = q.permute(0, 2, 3, 1, 4).reshape(groups, num_kv_heads, group_size * num_rows, -1)
    return (flat @ k.permute(0, 2, 3, 1)).view(groups, num_kv_heads, group_size, num_rows, -1)


def weigh(p: Tensor, v: Tensor) -> Tensor:
    """sum_j p_j v_j: [G, Hkv, g, T, L] and [G, L, Hkv, Dv] to [G, Hkv, g, T, Dv]."""
    return (p.flatten(2, 3) @ v.permute(0, 2, 1, 3)).view(*p.shape[:4], -1)


def scatter(total: Tensor, rows: Rows, values: Tensor) -> None:
    """Put values [G, Hkv, g, T, ...] into total [num_tokens + 1, num_query_heads, ...], whose last row is waste."""
    total[rows.tokens] = values.movedim(3, 1).flatten(2, 3)


def collect(
    answers: Iterable[Answer],
    shape: tuple[int, int, int],
    *,
    like: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    scales: Scales | None,
) -> tuple[Tensor, Tensor]:
    """The chunks' answers as out and lse, rows of no request as (0, -inf), cast once."""
    num_tokens, num_query_heads, head_size_v = shape
    wide_out = torch.zeros(num_tokens + 1, num_query_heads, head_size_v, dtype=torch.float64, device=like.device)
    wide_lse = wide_out.new_full((num_tokens + 1, num_query_heads), -torch.inf)
    for part in answers:
        scatter(wide_out, part.rows, part.out)
        scatter(wide_lse, part.rows, part.weights.lse)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16 if like.dtype == FLOAT8 else like.dtype, device=like.device)
    if lse is None:
        lse_dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        lse = torch.empty(shape[:2], dtype=lse_dtype, device=like.device)
    out_scale = None if scales is None else per_query_head(scales.out, num_query_heads)
    out.copy_(narrow(wide_out[:num_tokens], out.dtype, out_scale))
    lse.copy_(wide_lse[:num_tokens])
    return out, lse
