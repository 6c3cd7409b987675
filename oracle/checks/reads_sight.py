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

from ...reference.problem import Rules
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
    starts, seq_lens, table = (as_numpy(t) for t in (batch.cu_seqlens_q, batch.seq_lens, batch.block_table))
    cache = problem.arguments["latent_cache" if problem.case.spec.is_mla else "k_cache"]
    num_blocks, block_size = cache.shape[:2]
    num_tokens = problem.case.batch.num_tokens
    bias = None if rules.query_bias is None else as_numpy(rules.query_bias)
    width = 0 if bias is None else bias.shape[1]
    sight = Sight(
        request_of_token=np.full(num_tokens, -1, dtype=np.int64),
        sees=np.zeros((num_tokens, num_blocks * block_size), dtype=bool),
        entries=np.zeros(table.shape, dtype=bool),
        bias=np.zeros((num_tokens, width), dtype=bool),
        bias_used=np.zeros((num_tokens, width), dtype=bool),
        decided=_decided(rules, problem.case.spec.num_query_heads),
    )
    for request in range(batch.num_requests):
        first, query_len = int(starts[request]), int(starts[request + 1] - starts[request])
        length = int(seq_lens[request])
        rows = slice(first, first + query_len)
        sight.request_of_token[rows] = request
        seen = _ruled(query_len, length, rules)
        # The columns of the bias are the request's last keys; where it has more tokens than keys, some have none.
        context = length - query_len
        columns = np.arange(max(0, -context), min(width, query_len))
        if bias is not None:
            sight.bias[rows, columns] = True
            sight.bias_used[rows, columns] = seen[:, columns + context]
            seen[:, columns + context] &= bias[rows, columns] > -np.inf
        tokens, keys = np.nonzero(seen)
        pages = table[request, keys // block_size]
        sight.entries[request, keys // block_size] = True
        sight.sees[first + tokens, pages * block_size + keys % block_size] = True
    return sight


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
