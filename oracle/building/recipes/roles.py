"""What every recipe is made of: which tensors make scores and values, and how strong a key has to be."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...case import FLOAT8, Case, Spec
from ..hashing import host_hashes
from ..pages import Ints
from ..rule_values import scales, softmax_scale

Values = dict[str, Tensor]
Arrays = dict[str, NDArray[np.generic]]

TILES = (32, 64, 128, 256)  # keys that kernels take in one step, or in one split


def roles(spec: Spec) -> tuple[str, str, str]:
    """The names of what scores are made of (queries, keys) and of the values."""
    return ("q_pe", "k_pe", "latent") if spec.is_mla else ("q", "k", "v")


def silence_(values: Values) -> None:
    """Make every score 0, biases aside."""
    for name in values.keys() & {"q", "q_pe", "q_nope"}:
        values[name].zero_()


def hashed_keys(case: Case, name: str, seq_lens: Ints) -> Ints:
    """[num_requests]: one key of each request."""
    return host_hashes(case.seed, name, len(seq_lens)).astype(np.int64) % np.maximum(seq_lens, 1)


def score_size(spec: Spec) -> int:
    """The length of the rows of `roles`' queries and keys."""
    return spec.rope_head_size if spec.is_mla else spec.head_size


def value_size(spec: Spec) -> int:
    """The length of the rows of `roles`' values."""
    return spec.head_size if spec.is_mla else spec.head_size_v


def signs(case: Case) -> NDArray[np.float32]:
    """[num_kv_heads, dim]: for each kv head a direction of +-1 in which scores are made."""
    dim = score_size(case.spec)
    drawn = host_hashes(case.seed, "signs", case.spec.num_kv_heads * dim)
    return (1.0 - 2.0 * (drawn & np.uint32(1))).astype(np.float32).reshape(-1, dim)


def strengths(case: Case, logit: float) -> NDArray[np.float32]:
    """[num_kv_heads]: the factor on a key's direction at which a query of the same direction scores `logit`.

    A multiple of 1/8, so that float32 holds it and a product with +-1 exactly.
    """
    dim = score_size(case.spec)
    wanted = np.round(8.0 * logit / (softmax_scale(case.spec) * dim * _score_scales(case))) / 8.0
    largest = 384.0 if case.spec.kv_dtype == FLOAT8 else 2.0**15
    return np.clip(wanted, -largest, largest).astype(np.float32)


def gains(case: Case) -> NDArray[np.float32]:
    """[num_kv_heads]: the power of two that undoes the scales' effect on a score, to within a factor of 1.42."""
    mantissas, exponents = np.frexp(_score_scales(case))
    powers: NDArray[np.float64] = np.ldexp(1.0, (mantissas < 0.7072) - exponents)
    return powers.astype(np.float32)


def of_rows(by_head: Tensor, k: Tensor) -> Tensor:
    """[num_kv_heads, dim] as rows of k have it: MLA's rows have no heads."""
    return by_head if k.dim() == 3 else by_head[0]


def by_kv_head(case: Case, q: Tensor) -> Tensor:
    """A view [num_tokens, num_kv_heads, group_size, dim]."""
    return q.view(q.shape[0], case.spec.num_kv_heads, case.spec.group_size, q.shape[2])


def sign_of(values: Tensor) -> Tensor:
    """+-1, also of 0."""
    return torch.where(values < 0, -1.0, 1.0)


def _score_scales(case: Case) -> NDArray[np.float64]:
    """[num_kv_heads]: q's scale times k's."""
    factors = scales(case)
    product = np.ones(case.spec.num_kv_heads)
    for name in factors.keys() & {"q", "k"}:
        product = product * factors[name].astype(np.float64)
    return product
