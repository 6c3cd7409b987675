"""Large parts that cancel: in a score between the halves of a row, in an output between keys. What is left is small.

A kernel that rounds an operand, a partial sum or a partial result more than it declares has lost what is left.
Values of both signs come in runs of equal length, an even number of them: in half of the requests two runs, which
cancel only at the very end, in the others by hash up to one run for each key. A key's large part has the sign of
its value's, so that a score's error moves all outputs of a row the same way instead of averaging out.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...case import FLOAT8, Case
from ..hashing import host_hashes
from ..pages import Pages
from ..poison import Slots
from .roles import Arrays, Values, roles

_KEYS = (12.0, 4.0)  # in the halves of a row, against a and -3 a: a second rounding moves the two differently
_FLOAT8_KEYS = (8.0, 8.0)  # beside float8 queries, which hold 3 a too coarsely
_VALUE = 100.0
_LATENT = 16.0  # a latent is half of a score as well
_WHISPER = 2.0**-6  # on q_nope, so that scores stay near 1 beside a latent that large


def plan(case: Case, pages: Pages, slots: Slots) -> Arrays:
    return {"signs": _signs_of_values(case, pages, slots)}


def shape_(case: Case, values: Values, small: Values) -> None:
    q, k, v = (values[name] for name in roles(case.spec))
    half = k.shape[-1] // 2
    sizes = torch.zeros(k.shape[-1], device=k.device)
    first, second = _FLOAT8_KEYS if case.spec.q_dtype == FLOAT8 else _KEYS
    sizes[:half], sizes[half : 2 * half] = first, second
    signs = small["signs"].view(-1, *[1] * (k.dim() - 1))
    k.mul_(0.25).add_(signs * sizes * (small["gains"][:, None] if k.dim() == 3 else small["gains"]))
    q.mul_(0.5)
    _oppose_halves_(q, first / second)
    if case.spec.operation == "mla_attention":
        _oppose_halves_(values["q_nope"].mul_(_WHISPER), 1.0)
    elif case.spec.is_mla:
        values["q_nope"].zero_()  # what W_UK makes of a large latent does not cancel
    v.add_(signs * (_LATENT if case.spec.is_mla else _VALUE))


def _oppose_halves_(q: Tensor, ratio: float) -> None:
    """Make the products with a row cancel whose first half is `ratio` times as large as its second one."""
    half = q.shape[-1] // 2
    q[..., half : 2 * half] = q[..., :half] * -ratio
    q[..., 2 * half :] = 0.0


def _signs_of_values(case: Case, pages: Pages, slots: Slots) -> NDArray[np.float32]:
    """[num_written]: +-1."""
    keys = slots.key_of_written
    seq_lens = np.array(case.batch.seq_lens, dtype=np.int64)
    drawn = host_hashes(case.seed, "runs", len(seq_lens)).astype(np.int64)
    doublings = np.frexp(np.maximum(seq_lens - 1, 1))[1]  # bit lengths
    runs = 2 << np.where(drawn & 1, (drawn >> 1) % doublings, 0)
    requests = pages.request_of_key[keys]
    run = pages.index_of_key[keys] * runs[requests] // seq_lens[requests]
    return (1.0 - 2.0 * (run & 1)).astype(np.float32)
