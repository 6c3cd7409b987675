"""Random small problems for the reference's tests, and the table of the contract once more as plain loops.

Every slot that no row may see holds NaN, every unused table entry a huge or negative index, padding rows of q
and of the query bias NaN: a reference that reads any of it as data fails every test.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pageproof.reference import Batch, Rules, Scales

NAN = float("nan")


@dataclass(frozen=True)
class Problem:
    """Arguments of `attention` and what the host knows of them."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: Batch
    rules: Rules
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    scales: Scales | None = None

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Batch, Rules]:
        return self.q, self.k_cache, self.v_cache, self.batch, self.rules

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.k_cache.shape[2]

    def with_rules(self, **changes: object) -> Problem:
        return replace(self, rules=replace(self.rules, **changes))

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """(request, token, position) of every row of every request."""
        token = 0
        for request, (query_len, seq_len) in enumerate(zip(self.query_lens, self.seq_lens, strict=True)):
            for t in range(query_len):
                yield request, token, seq_len - query_len + t
                token += 1

    def bias_entry(self, request: int, token: int, j: int) -> float:
        """What the query bias adds to the score of (token, key j)."""
        bias = self.rules.query_bias
        i = j - (self.seq_lens[request] - self.query_lens[request])
        return 0.0 if bias is None or not 0 <= i < bias.shape[1] else float(bias[token, i])

    def sees(self, request: int, token: int, position: int) -> list[int]:
        """The keys that a token may see, one at a time from the table of the contract."""
        rules = self.rules
        keys = []
        for j in range(self.seq_lens[request]):
            if rules.causal and not j <= position:
                continue
            if rules.sliding_window is not None and not position - j < rules.sliding_window:
                continue
            if rules.right_window is not None and not j - position <= rules.right_window:
                continue
            if self.bias_entry(request, token, j) == -math.inf:
                continue
            keys.append(j)
        return keys

    def slot(self, request: int, j: int) -> tuple[int, int]:
        block_size = self.k_cache.shape[1]
        return int(self.batch.block_table[request, j // block_size]), j % block_size

    def dense(self, request: int) -> tuple[Tensor, Tensor, Tensor]:
        """q [n, H, D], k [L, Hkv, D] and v [L, Hkv, Dv] of one request, 0 where nothing is visible to anyone."""
        start = sum(self.query_lens[:request])
        seq_len = self.seq_lens[request]
        k = torch.zeros(seq_len, *self.k_cache.shape[2:], dtype=self.k_cache.dtype)
        v = torch.zeros(seq_len, *self.v_cache.shape[2:], dtype=self.v_cache.dtype)
        q = torch.zeros(self.query_lens[request], *self.q.shape[1:], dtype=self.q.dtype)
        for r, token, position in self.rows():
            keys = self.sees(r, token, position) if r == request else []
            if keys:
                q[token - start] = self.q[token]
            for j in keys:
                block, offset = self.slot(request, j)
                k[j], v[j] = self.k_cache[block, offset], self.v_cache[block, offset]
        return q, k, v


def draw(seed: int, dtype: torch.dtype = torch.float64, **features: object) -> Problem:
    """A problem with a coin for each feature; `features` fixes fields of its Rules."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    query_lens, seq_lens = _lens(rng)
    num_tokens = sum(query_lens) + rng.choice((0, 0, 1, 3))
    num_kv_heads, group_size = rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 5))
    head_size, head_size_v, block_size = rng.choice((1, 8, 13)), rng.choice((1, 5, 16)), rng.choice((1, 3, 4, 16))
    shape = (num_kv_heads, group_size, num_tokens)
    rules = replace(_rules(rng, generator, shape, max(query_lens, default=0)), **features)
    table, num_blocks = _table(rng, seq_lens, block_size)
    k_cache, v_cache = _caches(rng, (num_blocks, block_size, num_kv_heads), head_size, head_size_v, dtype)
    q = torch.randn(num_tokens, num_kv_heads * group_size, head_size, generator=generator, dtype=torch.float64)
    batch = Batch(_starts(query_lens), torch.tensor(seq_lens, dtype=torch.int32), table)
    problem = Problem(q.to(dtype), k_cache, v_cache, batch, rules, query_lens, seq_lens)
    return _poisoned(problem, rng, generator)


def empty_rows(problem: Problem) -> list[int]:
    return [token for request, token, position in problem.rows() if not problem.sees(request, token, position)]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Within `tolerance` of the largest finite value; infinities in the same places; never NaN."""
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    assert not expected.isnan().any()
    infinite = expected.isinf()
    assert torch.equal(torch.where(actual.isinf(), actual, 0.0), torch.where(infinite, expected, 0.0))
    difference = torch.where(infinite, 0.0, (actual - expected).abs())
    largest = torch.where(infinite, 0.0, expected.abs())
    if difference.numel():
        assert difference.max() <= tolerance * max(1.0, float(largest.max())), float(difference.max())


def _lens(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pairs = []
    for _ in range(rng.choice((0, 1, 2, 3, 5))):
        query_len = rng.choice((0, 1, 1, 1, 2, 5, 9))
        context = rng.choice((0, 0, 1, 3, 15, 16, 17, 40))
        seq_len = query_len + context
        if rng.random() < 0.25:
            seq_len = rng.randrange(max(1, query_len))  # rows before the request's first key
        pairs.append((query_len, seq_len))
    return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def _starts(query_lens: tuple[int, ...]) -> Tensor:
    return torch.tensor([sum(query_lens[:index]) for index in range(len(query_lens) + 1)], dtype=torch.int32)


def _rules(rng: random.Random, generator: torch.Generator, shape: tuple[int, int, int], longest: int) -> Rules:
    num_kv_heads, group_size, num_tokens = shape
    heads = num_kv_heads * group_size
    causal = rng.random() < 0.6
    sinks = query_bias = None
    if rng.random() < 0.5:
        sinks = torch.randn(heads, generator=generator)
        sinks[rng.randrange(heads)] = rng.choice((0.0, 5.0, -math.inf, math.inf))
    if rng.random() < 0.5:
        query_bias = torch.randn(num_tokens, rng.choice((0, 1, longest, longest + 2)), generator=generator)
        query_bias[torch.rand(query_bias.shape, generator=generator) < 0.4] = -math.inf
        query_bias[torch.rand(num_tokens, generator=generator) < 0.2] = -math.inf
    return Rules(
        softmax_scale=rng.choice((0.25, 1.0, 3.0)),
        causal=causal,
        sliding_window=rng.choice((None, 1, 2, 7, 16, 33)),
        right_window=None if causal else rng.choice((None, 0, 1, 5)),
        softcap=rng.choice((None, None, 1.5, 30.0)),
        alibi_slopes=torch.rand(heads, generator=generator) if rng.random() < 0.5 else None,
        sinks=sinks,
        query_bias=query_bias,
    )


def _table(rng: random.Random, seq_lens: tuple[int, ...], block_size: int) -> tuple[Tensor, int]:
    """Shuffled pages, the first one of every request perhaps shared, -1 for entries that are not used yet."""
    columns = [-(-seq_len // block_size) for seq_len in seq_lens]
    pages = list(range(sum(columns) + 3))
    rng.shuffle(pages)
    num_blocks = len(pages)
    shared = pages.pop() if rng.random() < 0.4 else None
    table = torch.full((len(seq_lens), max(columns, default=0) + rng.choice((0, 2))), -1, dtype=torch.int32)
    for request, count in enumerate(columns):
        for column in range(count):
            table[request, column] = shared if shared is not None and column == 0 else pages.pop()
    return table, num_blocks


def _caches(
    rng: random.Random, shape: tuple[int, int, int], head_size: int, head_size_v: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """All NaN, in one of the layouts that engines use."""
    num_blocks, block_size, heads = shape
    layout = rng.choice(("NHD", "HND", "interleaved", "odd"))
    if layout == "HND":
        return tuple(
            torch.full((num_blocks, heads, block_size, size), NAN, dtype=dtype).permute(0, 2, 1, 3)
            for size in (head_size, head_size_v)
        )
    if layout == "interleaved":
        pool = torch.full((num_blocks, block_size, heads, head_size + head_size_v), NAN, dtype=dtype)
        return pool[..., :head_size], pool[..., head_size:]
    slack = 3 if layout == "odd" else 0
    return tuple(
        torch.full((num_blocks, block_size + slack, heads, 1 + slack, size), NAN, dtype=dtype)[:, :block_size, :, slack]
        for size in (head_size, head_size_v)
    )


def _poisoned(problem: Problem, rng: random.Random, generator: torch.Generator) -> Problem:
    """Values into the slots that some row may see, and nonsense into everything else."""
    block_size = problem.k_cache.shape[1]
    used = torch.zeros(problem.batch.block_table.shape, dtype=torch.bool)
    for request, token, position in problem.rows():
        for j in problem.sees(request, token, position):
            used[request, j // block_size] = True
            block, offset = problem.slot(request, j)
            if problem.k_cache[block, offset].isnan().any():
                for cache in (problem.k_cache, problem.v_cache):
                    cache[block, offset] = torch.randn(cache.shape[2:], generator=generator, dtype=torch.float64)
    problem.batch.block_table[~used] = rng.choice((2**31 - 1, -7, 2147480000))
    problem.q[sum(problem.query_lens) :] = NAN
    problem.q[empty_rows(problem)] = NAN
    bias = problem.rules.query_bias
    if bias is not None:
        bias[sum(problem.query_lens) :] = NAN
        for request, token, _ in problem.rows():
            bias[token, problem.query_lens[request] :] = NAN
    return problem
