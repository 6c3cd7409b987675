"""Batches of a given kind, with lengths where kernels have their edges.

Lengths lean to the neighbours of pages, windows, tiles and splits: drawn evenly, a length that ends exactly at a
window's edge comes once in ten thousand cases.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..case import ATTENTION_OPERATIONS, REPLAYS, BatchShape, Spec
from .traits import LONG, SPECULATIVE, TILES

Request = tuple[int, int]  # (new tokens, keys)

SPLITS = (64, 256)  # keys at whose multiples a decode kernel may hand over to another program
LIVE = ("decode", "prefill", "chunked", "speculative")
MANY = (63, 64, 65, 255, 256, 257, 300)  # requests, about where plans go through a batch in blocks
VERY_LONG = (32767, 32768, 32769, 40000, 131072)
CROWDS = (65535, 65536, 65537, 70000)  # requests, about where a grid's second dimension ends
PROJECTIONS_PER_SCORE = 100  # multiplications that cost what one score costs the reference
CROWD_POOL = 2**29  # elements of K and V, at most, in the pages of such a crowd
CROWD_ROW = 512  # elements of one token's queries, at most, in such a crowd


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large cases are, and how many come from one compile key."""

    heads: int  # query heads
    requests: int
    tokens: int  # new tokens of all requests together, roughly
    keys: int  # of one request
    work: tuple[int, ...]  # the most a case may cost, drawn for each case; see `work`
    mode_share: int  # by how much less each step of a case in a mode other than eager may cost, of which it has several
    pool: int  # elements of the caches
    interpreted: bool
    long_share: float  # of the cases with `LONG` keys or more in a request, if the kind of batch has any
    extreme: int  # keys of the long request beside those with none and with one
    many_share: float  # of the cases with many small requests
    crowd_share: float  # of the decode batches whose heads are few and small with more requests than 16 bits count
    very_long_share: float  # of the long ones
    cases_per_row: int  # of the covering array
    cases_per_key: int  # of the random phase
    far_share: float  # of the compile keys with pages past 2**31 elements
    served_share: float  # of the compile keys that are as models are served, which kernels of their own may take
    check_share: float  # of the cases that are asked one thing beyond the answer
    replays: int  # of a case in a mode other than eager
    groups_share: float  # of the random attention cases in a mode other than eager: two cache groups in a step
    together: bool  # whether the random cases of a compile key wait for one evaluation of many
    reads_share: float  # of the random cases that ask for nothing else: the read set, which only the interpreter shows


# One program and tile of 32 keys costs the interpreter 7 to 9 ms, whatever the head size; it compiles nothing.
INTERPRETED = Sizes(
    heads=72,
    requests=4,
    tokens=40,
    keys=150,
    work=(8, 16, 24),
    mode_share=1,
    pool=2**21,
    interpreted=True,
    long_share=0.0,
    extreme=2048,
    many_share=0.0,
    crowd_share=0.0,
    very_long_share=0.0,
    cases_per_row=1,
    cases_per_key=3,
    far_share=0.0,
    served_share=0.0,
    check_share=1 / 6,
    replays=3,
    groups_share=0.25,
    together=False,
    reads_share=0.1,
)
# A kernel costs a second or more to compile and nothing to run; what lasts is the reference in float64.
COMPILED = Sizes(
    heads=568,
    requests=16,
    tokens=2048,
    keys=8192,
    work=(2**20, 2**21, 2**22, 2**22, 2**23, 2**24, 2**26),
    mode_share=4,
    pool=2**25,
    interpreted=False,
    long_share=0.5,
    extreme=131072,
    many_share=0.02,
    crowd_share=0.005,
    very_long_share=0.02,
    cases_per_row=3,
    cases_per_key=400,
    far_share=0.03,
    served_share=0.35,
    check_share=1 / 6,
    replays=REPLAYS,
    groups_share=0.125,
    together=True,
    reads_share=0.0,
)


def sizes_for(device: str) -> Sizes:
    """Of cases on this device, "cuda:1" included: on a CPU the kernels are interpreted."""
    return COMPILED if device.startswith("cuda") else INTERPRETED


def work(spec: Spec, request: Request, sizes: Sizes) -> int:
    """What a request costs: tiles of the interpreter, or scores of the reference."""
    n, length = request
    if spec.operation not in ATTENTION_OPERATIONS:
        return 0
    if not sizes.interpreted:
        return spec.num_query_heads * (n * length + _projections(spec, n, length) // PROJECTIONS_PER_SCORE)
    keys = length if spec.sliding_window is None else min(length, spec.sliding_window + n)
    return spec.num_kv_heads * math.ceil(n * spec.group_size / 32) * math.ceil(keys / 32)


def _projections(spec: Spec, n: int, length: int) -> int:
    """Multiplications, of one head, of a kernel that projects every key anew for each of its tiles of rows."""
    if spec.operation != "mla_attention_decompressed":
        return 0
    return math.ceil(n / 64) * length * spec.head_size * (spec.nope_head_size + spec.head_size_v)


def total_work(spec: Spec, batch: BatchShape, sizes: Sizes) -> int:
    return sum(work(spec, request, sizes) for request in zip(batch.query_lens, batch.seq_lens, strict=True))


class Batches:
    """Draws requests for one case."""

    def __init__(
        self,
        spec: Spec,
        sizes: Sizes,
        rng: random.Random,
        *,
        long: bool = False,
        floor: int = 1,
        holders: int = 0,
        share: int = 1,
    ) -> None:
        """`long`: one request has `LONG` keys or more; `holders`, two at most, have at least `floor` keys.

        share: the part of what another case may cost that this one may.
        """
        self.spec, self.sizes, self.rng = spec, sizes, rng
        self.long, self.floor, self.holders = long, floor, holders
        self.keys = sizes.keys if long else min(sizes.keys, LONG)
        self.share = share
        self.limit = rng.choice(sizes.work) // share
        windows = [window for window in (spec.sliding_window, spec.right_window) if window and window < sizes.keys]
        self.anchors = (spec.block_size, spec.block_size, *TILES, *SPLITS, *windows, *windows)

    def draw(self, kind: str) -> list[Request]:
        """Requests whose batch is of this kind, in random order, within the case's share of work and memory."""
        if kind == "extremes":
            return self._extremes()
        if kind == "decode" and self._may_be_a_crowd() and self.rng.random() < self.sizes.crowd_share:
            return self._crowd()
        parts = self._parts(kind)
        holders = [index for index, part in enumerate(parts) if part != "overhang"][: self.holders]
        floors = [self.floor if index in holders else 1 for index in range(len(parts))]
        drawn = [self._request(part, floor) for part, floor in zip(parts, floors, strict=True)]
        requests = self._affordable(drawn, floors)
        self.rng.shuffle(requests)
        return requests

    def _extremes(self) -> list[Request]:
        """Requests with no keys, with one, and with as many as the case can afford, side by side."""
        rng, longest, self.limit = self.rng, self.sizes.extreme, max(self.sizes.work) // self.share
        n = rng.choice((1, 1, 2, 16))
        while longest > max(n, self.floor) and self._cost((n, longest)) > 1.5:
            longest //= 2
        requests = [(0, 0), (1, 1), (rng.choice((1, 2)), 0), (n, max(longest, n, self.floor))]
        requests += [(1, self.floor)] * (self.holders == 2)
        rng.shuffle(requests)
        return requests

    def _may_be_a_crowd(self) -> bool:
        spec = self.spec
        row = spec.num_query_heads * max(spec.head_size + spec.rope_head_size, spec.head_size_v)
        pool = (
            max(CROWDS)
            * spec.block_size
            * spec.num_kv_heads
            * (spec.head_size + max(spec.rope_head_size, spec.head_size_v))
        )
        return spec.operation != "mla_attention_decompressed" and row <= CROWD_ROW and pool <= CROWD_POOL

    def _crowd(self) -> list[Request]:
        """More requests than 16 bits count, of a few keys each."""
        rng = self.rng
        requests = [(1, rng.choice((1, 1, 2, 3))) for _ in range(rng.choice(CROWDS))]
        return [(1, max(length, self.floor)) for _, length in requests[: self.holders]] + requests[self.holders :]

    def _parts(self, kind: str) -> list[str]:
        rng = self.rng
        if kind == "nothing":
            return []
        if kind in LIVE and rng.random() < self.sizes.many_share and kind != "prefill":
            self.long = False
            return [kind] * rng.choice(MANY)
        count = min(self.sizes.requests, int(2 ** rng.uniform(0, math.log2(self.sizes.requests + 1))))
        if kind in LIVE:
            return [kind] * max(count, self.holders)
        others = [rng.choice(LIVE) for _ in range(max(0, count - 2))]
        busy = rng.choice(LIVE[1:])
        if kind == "mixed":
            return [busy, "decode", *others]
        return [busy, kind, "decode", *others] if self.holders == 2 else [busy, kind, *others]

    def _request(self, kind: str, floor: int) -> Request:
        if self.long and kind in LIVE:
            self.long, floor = False, max(LONG, floor)  # whoever comes first is the long one
        if kind == "decode":
            return 1, self._length(floor, max(floor, self._longest()))
        if kind == "idle":
            return 0, self._length(floor, max(floor, self.keys))
        if kind == "overhang":
            n = self._length(2, max(2, self.sizes.tokens // 4))
            return n, self.rng.choice((0, 1, n - 1, self.rng.randrange(n)))
        if kind == "prefill":
            n = self._length(max(2, floor), max(2, floor, self.sizes.tokens // 2))
            return n, n
        n = self.rng.randint(2, SPECULATIVE) if kind == "speculative" else self._length(2, self._chunk())
        smallest = max(n + 1, floor)
        if self.rng.random() < 0.5:
            return n, max(smallest, n + self._length(1, self.keys))
        return n, self._length(smallest, max(smallest, self._longest()))

    def _longest(self) -> int:
        if self.keys > LONG and self.rng.random() < self.sizes.very_long_share:
            return self.rng.choice(VERY_LONG)
        if self.sizes.interpreted and self.rng.random() < 0.1:
            return 2 * max(SPLITS) + 1
        return self.keys

    def _chunk(self) -> int:
        return max(2, self.rng.choice((self.sizes.tokens // 2, self.sizes.tokens // 8)))

    def _length(self, smallest: int, largest: int) -> int:
        rng = self.rng
        kind = rng.random()
        if largest in VERY_LONG:
            return largest
        if kind < 0.5:
            length = rng.choice(self.anchors) * rng.choice((1, 1, 1, 2, 3)) + rng.choice((-1, 0, 1))
        elif kind < 0.65:
            length = rng.randint(1, 9)
        elif kind < 0.75:
            length = largest - rng.randint(0, 1)
        else:
            length = 0
        if smallest <= length <= largest:
            return length
        return min(largest, max(smallest, round(2 ** rng.uniform(math.log2(smallest), math.log2(largest)))))

    def _cost(self, request: Request) -> float:
        """The part of the case's share of work and memory that a request takes."""
        spec, sizes = self.spec, self.sizes
        row = max(1, spec.num_kv_heads) * (spec.head_size + max(spec.head_size_v, spec.rope_head_size))
        return work(spec, request, sizes) / self.limit + row * request[1] / sizes.pool

    def _affordable(self, requests: list[Request], floors: list[int]) -> list[Request]:
        """The requests made smaller, the most costly first, until the case may cost that much."""
        shrinking = set(range(len(requests)))
        while shrinking:
            costs = [self._cost(request) for request in requests]
            too_costly, tokens = sum(costs) > 1, sum(n for n, _ in requests)
            if not too_costly and tokens <= self.sizes.tokens:
                break
            worst = max(sorted(shrinking), key=costs.__getitem__ if too_costly else lambda i: requests[i][0])
            smaller = _smaller(requests[worst], floors[worst])
            if smaller == requests[worst]:
                shrinking.remove(worst)
            requests[worst] = smaller
        return requests


def _smaller(request: Request, floor: int) -> Request:
    """About half of it and of the same kind; the request itself if it cannot be smaller."""
    n, length = request
    if 2 <= n == length:
        n = min(n, max(2, floor, n // 2))
        return n, n
    if n > 2:
        less = max(2, n // 2)
        if length < n:
            return less, min(length, less - 1)
        return less, max(less + 1, floor, length - n + less)
    return n, min(length, max(n + 1 if n > 1 and length > n else 1, floor, length // 2))


def spread(requests: Sequence[Request], extra: int, rng: random.Random) -> list[Request]:
    """The requests with `extra` padding requests: at the end, where engines have them, or anywhere."""
    spread_out = list(requests)
    at_end = rng.random() < 0.7
    for _ in range(extra):
        spread_out.insert(len(spread_out) if at_end else rng.randint(0, len(spread_out)), (0, 0))
    return spread_out
