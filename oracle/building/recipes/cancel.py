"""Large parts that cancel: in a score between the halves of a row, in an output between keys. What is left is small.

Whatever rounds a factor, a partial sum or a partial result more than the kernel declares it does has lost what is
left. Values of both signs come in runs of equal length, an even number of them, by hash two up to one for each
key: they cancel within tiles, across tiles, or across splits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...case import Case
from ..hashing import host_hashes
from ..pages import Pages
from ..poison import Slots
from .roles import Arrays, Values, roles, sign_of

_KEY = 8.0
_VALUE = 100.0
_LATENT = 16.0  # a latent is half of a score as well
_WHISPER = 2.0**-6  # on q_nope, so that scores stay near 1 beside a latent that large


def plan(case: Case, pages: Pages, slots: Slots) -> Arrays:
    return {"signs": _signs_of_values(case, pages, slots)}


def shape_(case: Case, values: Values, small: Values) -> None:
    q, k, v = (values[name] for name in roles(case.spec))
    gain = small["gains"].view(-1, 1) if k.dim() == 3 else small["gains"]
    k.add_(sign_of(k[..., :1]) * _KEY * gain)
    _oppose_halves_(q)
    if case.spec.operation == "mla_attention":
        _oppose_halves_(values["q_nope"].mul_(_WHISPER))
    elif case.spec.is_mla:
        values["q_nope"].zero_()  # what W_UK makes of a large latent does not cancel
    v.add_((small["signs"] * (_LATENT if case.spec.is_mla else _VALUE)).view(-1, *[1] * (v.dim() - 1)))


def _oppose_halves_(q: Tensor) -> None:
    """Make the products with a row of equal elements cancel exactly."""
    half = q.shape[-1] // 2
    q[..., half : 2 * half] = -q[..., :half]
    q[..., 2 * half :] = 0.0


def _signs_of_values(case: Case, pages: Pages, slots: Slots) -> NDArray[np.float32]:
    """[num_written]: +-1."""
    keys = slots.key_of_written
    seq_lens = np.array(case.batch.seq_lens, dtype=np.int64)
    doublings = np.frexp(np.maximum(seq_lens - 1, 1))[1]  # bit lengths
    runs = 2 << host_hashes(case.seed, "runs", len(seq_lens)).astype(np.int64) % doublings
    requests = pages.request_of_key[keys]
    run = pages.index_of_key[keys] * runs[requests] // seq_lens[requests]
    return (1.0 - 2.0 * (run & 1)).astype(np.float32)
