"""The batches of a case in mode full_and_piecewise: some for either capture, and some that are nearly for the other."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..execution.dispatch import FULL, dispatch, uniform_query_len
from .profiles import MOST_DRAWN, Limits, Request, length_within, profile, within

QUERY_LENS = (1, 2, 4)  # of decode, and of verifying one and three drafted tokens
LONGEST_VERIFIED = 8  # a case whose requests all have so many tokens at most may be what is captured
UNIFORM, UNEVEN, TOO_LONG = "uniform", "uneven: as many tokens as a uniform batch", "uniform and too long"
_OTHERS = (UNEVEN, TOO_LONG, "mixed", "prefill", "speculative", "full", "empty")

Batch = tuple[str, tuple[Request, ...]]  # what it is, and its requests


def captured_query_len(query_lens: Sequence[int], limits: Limits, rng: random.Random) -> int:
    """Tokens of each request in the batches that the full graphs are captured on, in both buckets."""
    own = uniform_query_len(query_lens)
    lens: list[int] = [*QUERY_LENS, *((own, own) if 0 < own <= LONGEST_VERIFIED else ())]
    return min(rng.choice(lens), limits.halved().tokens)


def captured_batch(query_len: int, limits: Limits, rng: random.Random) -> Batch:
    """An extreme: as many requests as there are rows for with no key before them, or one with the most keys."""
    if rng.random() < 0.5:
        return UNIFORM, within([(query_len, max(query_len, limits.keys))], limits)
    count = min(limits.requests, limits.tokens // query_len)
    return UNIFORM, within([(query_len, query_len)] * count, limits)


def batch_for(kind: str, query_len: int, limits: Limits, rng: random.Random) -> Batch:
    """A batch that the capture of this kind takes, FULL or PIECEWISE."""
    if kind == FULL:
        return UNIFORM, _uniform(rng.randint(1, query_len), limits, rng)
    for name in rng.sample(_OTHERS, len(_OTHERS)):  # an empty one is always among them, and never uniform
        requests = _other(name, query_len, limits, rng)
        if dispatch([tokens for tokens, _ in requests], query_len) == kind:
            break
    return name, requests


def _other(name: str, query_len: int, limits: Limits, rng: random.Random) -> tuple[Request, ...]:
    if name == UNEVEN:
        return _uneven(query_len, limits, rng)
    if name == TOO_LONG:
        return _uniform(min(query_len + rng.randint(1, 3), limits.tokens), limits, rng)
    return profile(name, limits, rng)


def _uniform(query_len: int, limits: Limits, rng: random.Random) -> tuple[Request, ...]:
    """Requests with a context, and some whose very first tokens these are."""
    count = rng.randint(1, min(limits.requests, limits.tokens // query_len, MOST_DRAWN))
    lengths = (query_len if rng.random() < 0.2 else length_within(limits, rng) for _ in range(count))
    return within([(query_len, max(query_len, length)) for length in lengths], limits)


def _uneven(query_len: int, limits: Limits, rng: random.Random) -> tuple[Request, ...]:
    """A uniform batch in which one request has a token of the next one."""
    requests = [*_uniform(query_len, limits, rng)]
    if len(requests) > 1:
        first = rng.randrange(len(requests) - 1)
        (more, length), (fewer, other) = requests[first : first + 2]
        requests[first : first + 2] = [(more + 1, max(more + 1, length)), (fewer - 1, other)]
        rng.shuffle(requests)
    return within(requests, limits)
