"""Scores and values at the ends of what the arithmetic can take, one of several variants by the case's seed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...case import FLOAT8, Case
from ..hashing import host_choice
from ..pages import Pages
from ..poison import Slots
from .roles import Arrays, Values, by_kv_head, of_rows, roles, signs, silence_, strengths

VARIANTS = ("large", "floor", "saturated", "tiny", "heavy", "huge_values", "flat", "ladder", "offset")

_LOGITS = {
    "floor": -200.0,  # below every initial maximum that is not -inf, or at -softcap
    "saturated": 300.0,  # and -300
    "ladder": 60.0,
}


def variant(case: Case) -> str:
    """Which of `VARIANTS` an extreme case is."""
    return VARIANTS[host_choice(case.seed, "variant", len(VARIANTS))]


def plan(case: Case, pages: Pages, slots: Slots) -> Arrays:
    design = variant(case)
    if design not in _LOGITS:
        return {}
    direction = signs(case)
    arrays: Arrays = {"signs": direction, "pull": direction * strengths(case, _LOGITS[design])[:, None]}
    if design == "ladder":
        arrays["rungs"] = _rungs(case, pages, slots)
    return arrays


def shape_(case: Case, values: Values, small: Values) -> None:
    q, k, v = (values[name] for name in roles(case.spec))
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
        silence_(values)
    else:
        v.add_(v.sign() * 64.0)


def _rungs(case: Case, pages: Pages, slots: Slots) -> NDArray[np.float32]:
    """[num_written]: rising to 1 along each request's keys, a new maximum in every tile, or falling from 1."""
    index = pages.index_of_key[slots.key_of_written].astype(np.float32)
    length = np.array(case.batch.seq_lens, dtype=np.float32)[pages.request_of_key[slots.key_of_written]]
    rising = (index + np.float32(1.0)) / length
    return rising if host_choice(case.seed, "ladder", 2) else (np.float32(1.0) - rising).astype(np.float32)


def _lean(case: Case, design: str, q: Tensor, k: Tensor, small: Values) -> None:
    """Give every key a score that is set beforehand, by its direction; the noise around it is a tenth of it."""
    by_kv_head(case, q).mul_(0.25).add_(small["signs"][:, None])
    pull = of_rows(small["pull"], k)
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
