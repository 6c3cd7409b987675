"""Which row of an attention batch sees which slot, worked out from the tensors that the call was given.

docs/contract.md in numpy, apart from the reference and from what builds the cases: three readings that disagree show
up as a finding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...reference.problem import Batch, Rules
from ..building.problem import Problem
from ..execution.tracing import Bools, Ints


@dataclass(frozen=True)
class Sight:
    """Which row of an attention batch sees what."""

    request_of_token: Ints  # [num_tokens]; -1 in padding rows
    sees: Bools  # [num_tokens, num_blocks * block_size]: the row sees a key that lies in this slot
    entries: Bools  # [num_requests, max_blocks]: table entries through which some row sees a key
    bias: Bools  # [num_tokens, bias_width]: entries of tokens and keys that exist
    bias_used: Bools  # [num_tokens, bias_width]: of these, the ones whose key no other rule hides
    decided: Bools  # [num_query_heads]: a sink of +inf takes all the weight, so no key matters


def sight_of(problem: Problem) -> Sight:
    """The visibility rules of an attention case, from its tensors."""
    batch, rules = problem.arguments["batch"], problem.arguments["rules"]
    cache = problem.arguments["latent_cache" if problem.case.spec.is_mla else "k_cache"]
    num_tokens = problem.case.batch.num_tokens
    bias_shape = (num_tokens, 0) if rules.query_bias is None else tuple(rules.query_bias.shape)
    sight = Sight(
        request_of_token=np.full(num_tokens, -1, dtype=np.int64),
        sees=np.zeros((num_tokens, cache.shape[0] * cache.shape[1]), dtype=bool),
        entries=np.zeros(tuple(batch.block_table.shape), dtype=bool),
        bias=np.zeros(bias_shape, dtype=bool),
        bias_used=np.zeros(bias_shape, dtype=bool),
        decided=_decided(rules, problem.case.spec.num_query_heads),
    )
    for request in range(batch.num_requests):
        _add_request(sight, request, batch, rules, cache.shape[1])
    return sight


def _add_request(sight: Sight, request: int, batch: Batch, rules: Rules, block_size: int) -> None:
    first, end = as_numpy(batch.cu_seqlens_q)[request : request + 2].tolist()
    length = int(batch.seq_lens[request])
    sight.request_of_token[first:end] = request
    seen = _ruled(end - first, length, rules)
    if rules.query_bias is not None:
        # Its columns are the last keys; where there are more tokens than keys, the first of them have no key.
        context = length - (end - first)
        columns = np.arange(max(0, -context), min(rules.query_bias.shape[1], end - first))
        sight.bias[first:end, columns] = True
        sight.bias_used[first:end, columns] = seen[:, columns + context]
        seen[:, columns + context] &= as_numpy(rules.query_bias)[first:end, columns] > -np.inf
    tokens, keys = np.nonzero(seen)
    pages = as_numpy(batch.block_table)[request, keys // block_size]
    sight.entries[request, keys // block_size] = True
    sight.sees[first + tokens, pages * block_size + keys % block_size] = True


def _ruled(query_len: int, length: int, rules: Rules) -> Bools:
    """[query_len, length]: who sees which key, before any query bias."""
    position = length - query_len + np.arange(query_len)[:, None]
    key = np.arange(length)[None, :]
    seen = np.ones((query_len, length), dtype=bool)
    if rules.causal:
        seen &= key <= position
    if rules.sliding_window is not None:
        seen &= position - key < rules.sliding_window
    if rules.right_window is not None:
        seen &= key - position <= rules.right_window
    return seen


def _decided(rules: Rules, num_query_heads: int) -> Bools:
    if rules.sinks is None:
        return np.zeros(num_query_heads, dtype=bool)
    return np.isposinf(as_numpy(rules.sinks))


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """The same memory; of a tensor on the CPU, in a format that numpy has."""
    values: NDArray[Any] = tensor.detach().numpy()
    return values
