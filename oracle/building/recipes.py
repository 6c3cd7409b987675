"""What the numbers in q, K and V are, so that a wrong kernel shows: each recipe makes a class of bugs visible.

| recipe | data | shows |
|---|---|---|
| normal | independent values | gross faults, in every lse a dropped key |
| needle | a few keys at edges get nearly all of the weight, with values four times as large | masks off by one |
| one_hot | V rows are hashed basis vectors: out[d] is the weight of the keys with hash d | dropped, doubled keys |
| extreme | one of `VARIANTS` | maxima, overflow, saturation, order of operations |

A recipe works on float32 values of the rows that are written, before the cast and without the poison. For MLA
it works on the parts that scores and values have in plain sight: q_pe and k_pe, and the latent.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..case import FLOAT8, Case, Spec
from .hashing import host_choice, host_hashes, index_terms
from .pages import Ints, Pages
from .poison import Slots
from .rule_values import scales, softmax_scale

Values = dict[str, Tensor]
Arrays = dict[str, NDArray[np.generic]]

VARIANTS = ("large", "floor", "saturated", "tiny", "heavy", "huge_values", "flat", "ladder", "offset")

_LOGITS = {
    "needle": 14.0,  # exp(14) outweighs a million ordinary keys
    "floor": -200.0,  # below every initial maximum that is not -inf, or at -softcap
    "saturated": 300.0,  # and -300
    "ladder": 60.0,
}
_TILES = (32, 64, 128, 256)


def variant(case: Case) -> str:
    """Which of `VARIANTS` an extreme case is."""
    return VARIANTS[host_choice(case.seed, "variant", len(VARIANTS))]


def plan(case: Case, pages: Pages, slots: Slots) -> Arrays:
    """The small arrays that `shape_` needs on the device."""
    design = variant(case) if case.recipe == "extreme" else case.recipe
    arrays: Arrays = {"gains": _gains(case)}
    if design in _LOGITS:
        arrays["signs"] = _signs(case)
        arrays["pull"] = _signs(case) * _strengths(case, _LOGITS[design])[:, None]
    if design == "needle":
        arrays["needles"] = needles(case, pages, slots)
    if design == "one_hot":
        arrays["columns"] = _columns(case, slots)
    if design == "ladder":
        arrays["rungs"] = _rungs(case, pages, slots)
    return arrays


def shape_(case: Case, values: Values, small: Values) -> None:
    """Turn independent values of q, k and v (MLA: q_pe, k_pe and latent) into the case's recipe, in place."""
    q, k, v = (values[name] for name in _roles(case.spec))
    if case.spec.scales != "none":
        k.mul_(small["gains"][:, None] if k.dim() == 3 else small["gains"])  # scores stay near 1, whatever the scales
    if case.recipe == "needle":
        _align(case, q, k, small)
        v.index_copy_(0, small["needles"], v[small["needles"]] * 4.0)
    elif case.recipe == "one_hot":
        v.copy_(torch.arange(v.shape[-1], device=v.device) == small["columns"][..., None])
    elif case.recipe == "extreme":
        _shape_extreme(case, values, small)


def needles(case: Case, pages: Pages, slots: Slots) -> Ints:
    """Places among the written rows: keys at the window's edges, both ends, page, tile and split boundaries.

    The window's edges are those of a request's first, middle and last row. Of the keys that are nobody's to
    read none is here: they are poisoned.
    """
    query_lens = np.array(case.batch.query_lens, dtype=np.int64)
    seq_lens = np.array(case.batch.seq_lens, dtype=np.int64)
    last, context = seq_lens - 1, seq_lens - query_lens
    chosen = [np.zeros_like(last), last, _hashed_keys(case, "needle", seq_lens)]
    for position in (context, (context + last) // 2, last):
        chosen.append(position)
        if case.spec.sliding_window is not None:
            chosen += [position - case.spec.sliding_window + 1, position - case.spec.sliding_window]
        if case.spec.right_window is not None:
            chosen += [position + case.spec.right_window, position + case.spec.right_window + 1]
    boundary = _hashed_keys(case, "boundary", seq_lens)
    for size in (case.spec.block_size, *_TILES):
        for key in (boundary, last):
            chosen += [key // size * size, key // size * size - 1]
    keys = np.stack(chosen)
    real = (keys >= 0) & (keys < seq_lens) & (query_lens > 0)
    logical = np.unique((keys + pages.key_starts[:-1])[real])
    written = slots.written_of_key[logical]
    return np.unique(written[written >= 0])


def _roles(spec: Spec) -> tuple[str, str, str]:
    return ("q_pe", "k_pe", "latent") if spec.is_mla else ("q", "k", "v")


def _hashed_keys(case: Case, name: str, seq_lens: Ints) -> Ints:
    return host_hashes(case.seed, name, len(seq_lens)).astype(np.int64) % np.maximum(seq_lens, 1)


def _signs(case: Case) -> NDArray[np.float32]:
    """[num_kv_heads, dim]: for each kv head a direction of +-1 in which scores are made."""
    dim = case.spec.rope_head_size if case.spec.is_mla else case.spec.head_size
    drawn = host_hashes(case.seed, "signs", case.spec.num_kv_heads * dim)
    return (1.0 - 2.0 * (drawn & np.uint32(1))).astype(np.float32).reshape(-1, dim)


def _columns(case: Case, slots: Slots) -> NDArray[np.int32]:
    """[num_written, num_kv_heads] or [num_written]: which element of the value row is one."""
    spec = case.spec
    rows, heads = index_terms(case.seed, "columns", slots.key_of_written, spec.num_kv_heads)
    x = (rows[:, None] + heads).view(np.uint32) * np.uint32(0x9E3779B1)
    columns = (x >> np.uint32(16)) % np.uint32(spec.head_size if spec.is_mla else spec.head_size_v)
    return columns.astype(np.int32)[:, 0] if spec.is_mla else columns.astype(np.int32)


def _rungs(case: Case, pages: Pages, slots: Slots) -> NDArray[np.float32]:
    """[num_written]: rising to 1 along each request's keys, a new maximum in every tile, or falling from 1."""
    index = pages.index_of_key[slots.key_of_written].astype(np.float32)
    length = np.array(case.batch.seq_lens, dtype=np.float32)[pages.request_of_key[slots.key_of_written]]
    rising = (index + np.float32(1.0)) / length
    return rising if host_choice(case.seed, "ladder", 2) else (np.float32(1.0) - rising).astype(np.float32)


def _strengths(case: Case, logit: float) -> NDArray[np.float32]:
    """[num_kv_heads]: the factor on a key's direction at which a query of the same direction scores `logit`.

    A multiple of 1/8, so that float32 holds it and a product with +-1 exactly.
    """
    dim = case.spec.rope_head_size if case.spec.is_mla else case.spec.head_size
    strengths = np.round(8.0 * logit / (softmax_scale(case.spec) * dim * _score_scales(case))) / 8.0
    largest = 384.0 if case.spec.kv_dtype == FLOAT8 else 2.0**15
    return np.clip(strengths, -largest, largest).astype(np.float32)


def _score_scales(case: Case) -> NDArray[np.float64]:
    """[num_kv_heads]: q's scale times k's."""
    factors = scales(case)
    product = np.ones(case.spec.num_kv_heads)
    for name in factors.keys() & {"q", "k"}:
        product = product * factors[name].astype(np.float64)
    return product


def _gains(case: Case) -> NDArray[np.float32]:
    """[num_kv_heads]: the power of two that undoes the scales' effect on a score, to within a factor of 1.42."""
    mantissas, exponents = np.frexp(_score_scales(case))
    gains: NDArray[np.float64] = np.ldexp(1.0, (mantissas < 0.7072) - exponents)
    return gains.astype(np.float32)


def _align(case: Case, q: Tensor, k: Tensor, small: Values) -> None:
    """Turn all queries into their head's direction, and the needles among the keys, strongly enough to win."""
    _by_kv_head(case, q).add_(small["signs"][:, None])
    rows = small["needles"]
    k.index_copy_(0, rows, k[rows] * 0.25 + _of_rows(small["pull"], k))


def _of_rows(by_head: Tensor, k: Tensor) -> Tensor:
    """[num_kv_heads, dim] as rows of k have it: MLA's rows have no heads."""
    return by_head if k.dim() == 3 else by_head[0]


def _by_kv_head(case: Case, q: Tensor) -> Tensor:
    """A view [num_tokens, num_kv_heads, group_size, dim]."""
    return q.view(q.shape[0], case.spec.num_kv_heads, case.spec.group_size, q.shape[2])


def _shape_extreme(case: Case, values: Values, small: Values) -> None:
    q, k, v = (values[name] for name in _roles(case.spec))
    design = variant(case)
    if design == "large":
        for tensor in (q, k):
            tensor.mul_(8.0)
        if "q_nope" in values:
            values["q_nope"].mul_(16.0)  # the latent stays as it is: it is the value too
    elif design in _LOGITS:
        _lean(case, design, q, k, small)
    elif design == "tiny":
        for tensor in (q, k, v):
            tensor.mul_(2.0**-7 if case.spec.kv_dtype == FLOAT8 else 2.0**-12)
    elif design == "heavy":
        for tensor in (q, k, v):
            tensor.mul_(torch.where(tensor.abs() > 2.25, 128.0, 1.0))  # one value in a hundred
    elif design == "huge_values":
        v.mul_(_huge(case))
    elif design == "flat":
        for name in values.keys() & {"q", "q_pe", "q_nope"}:
            values[name].zero_()
    else:
        v.add_(v.sign() * 64.0)


def _lean(case: Case, design: str, q: Tensor, k: Tensor, small: Values) -> None:
    """Give every key a score that is set beforehand, by its direction; the noise around it is a tenth of it."""
    _by_kv_head(case, q).mul_(0.25).add_(small["signs"][:, None])
    pull = _of_rows(small["pull"], k)
    if design == "ladder":
        pull = pull * small["rungs"].view(-1, *[1] * (k.dim() - 1))
    elif design == "saturated":
        pull = pull * torch.where(k[..., :1] < 0, -1.0, 1.0)
    k.mul_(0.25).add_(pull)


def _huge(case: Case) -> float:
    """As large as values may be with their sums still finite; a latent is half of a score as well."""
    if case.spec.is_mla:
        return 16.0
    if case.spec.kv_dtype == FLOAT8:
        return 128.0
    return 2.0**12 if case.spec.dtype == "float16" else 2.0**40
