"""Batches of a step by what is in it: decode, prefill and so on, within the sizes of a bucket."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

Request = tuple[int, int]  # (new tokens, keys)

PROFILES = ("decode", "prefill", "speculative", "mixed", "empty", "full", "one token", "longest")
MOST_DRAWN = 64  # requests of a batch that is drawn one by one


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a batch may have; `work` bounds the sum of tokens x keys, `all_keys` that of keys."""

    tokens: int
    requests: int
    keys: int
    work: int
    all_keys: int

    def halved(self) -> Limits:
        """Those of a bucket half as large."""
        return replace(self, tokens=max(1, self.tokens // 2), requests=max(1, self.requests // 2))


def profile(kind: str, limits: Limits, rng: random.Random) -> tuple[Request, ...]:
    """The requests of a batch of this kind, one of PROFILES."""
    if kind == "empty":
        return ()
    if kind == "one token":
        return ((1, rng.choice((1, 1, 2))),)
    if kind == "longest":
        return ((1, limits.keys),)
    if kind == "full":
        return _full(limits)
    return within(_drawn(kind, limits, rng), limits)


def _full(limits: Limits) -> tuple[Request, ...]:
    """Every row and every request of the bucket is in use."""
    each, more = divmod(limits.tokens, limits.requests)
    tokens = [each + (index < more) for index in range(limits.requests)]
    longest = max(1, min(limits.keys, limits.work // limits.tokens, limits.all_keys // limits.requests))
    return tuple((n, min(n, longest)) for n in tokens)


def _drawn(kind: str, limits: Limits, rng: random.Random) -> list[Request]:
    count = rng.randint(1, min(limits.requests, MOST_DRAWN))
    kinds = [kind] * count
    if kind == "mixed":
        kinds = ["decode", "prefill", *(rng.choice(("decode", "prefill", "speculative", "idle")) for _ in kinds[2:])]
    return [_request(part, limits, rng) for part in kinds[: limits.requests]]


def _request(kind: str, limits: Limits, rng: random.Random) -> Request:
    length = length_within(limits, rng)
    if kind == "decode":
        return 1, length
    if kind == "idle":
        return 0, length
    if kind == "speculative":
        n = min(rng.randint(2, 5), limits.tokens)
        return n, max(n, length)
    n = rng.randint(1, max(1, min(limits.tokens, limits.keys)))
    return n, n


def length_within(limits: Limits, rng: random.Random) -> int:
    """Keys of one request, all orders of magnitude alike."""
    return max(1, min(round(2 ** rng.uniform(0, limits.keys.bit_length())), limits.keys))


def within(requests: list[Request], limits: Limits) -> tuple[Request, ...]:
    """As many of the requests as there are tokens for, the costly ones cut."""
    kept: list[Request] = []
    tokens, work, keys = limits.tokens, limits.work, limits.all_keys
    for n, length in requests:
        n = min(n, tokens)
        length = max(1, min(length, work // max(1, n), keys))
        kept.append((n, length))
        tokens, work, keys = tokens - n, max(0, work - n * length), max(0, keys - length)
    return tuple(kept)
