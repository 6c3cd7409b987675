"""The steps that a case in a mode other than eager goes through: cases of the same spec, made from the case alone.

As in an engine one bucket's buffers hold every step: tokens and requests are padded up to powers of two, the block
table is as wide and the pool as large as the largest step needs. A second, smaller bucket is captured into the same
memory after it, and the two take turns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..building.pages import pool_size
from ..case import ATTENTION_OPERATIONS, MODES, REPLAYS, BatchShape, Case
from ..case_layers import layers_of
from ..execution.dispatch import FULL, PIECEWISE, dispatch
from .dispatched import batch_for, captured_batch, captured_query_len
from .profiles import PROFILES, Limits, Request, profile

OWN, REWRITTEN = "the case's own batch", "the same batch, rejected: other values in its slots"
CAPTURED = ("longest", "one token", "full", "empty")  # far off from most others in whatever a capture freezes
LARGE, SMALL = 0, 1
DISPATCHED = "full_and_piecewise"
FEWEST_KEYS, LEAST_WORK = 16, 64  # for the steps of cases that have next to nothing


@dataclass(frozen=True, kw_only=True)
class Step:
    """One filling of a bucket's buffers."""

    profile: str
    case: Case  # an eager one, padded to the bucket
    bucket: int  # LARGE or SMALL
    rewrites: bool = False  # the case's new tokens come again: their slots hold other values than they bring
    other_group: Step | None = None  # the layer after it, whose cache is of another group

    @property
    def layers(self) -> tuple[Step, ...]:
        return (self,) if self.other_group is None else (self, self.other_group)


@dataclass(frozen=True, kw_only=True)
class Steps:
    captured: tuple[Step, Step]  # what the buffers hold while they are captured: the large bucket's, the small one's
    replayed: tuple[Step, ...]
    uniform: tuple[Step, ...] = ()  # where steps are dispatched: of the full graphs, captured after those two
    query_len: int = 0  # tokens of each request in those

    def captures(self, mode: str) -> tuple[tuple[str, Step], ...]:
        """What is captured, or compiled, in which way, in order: of each way the large bucket first."""
        first = PIECEWISE if mode == DISPATCHED else mode
        return *((first, step) for step in self.captured), *((FULL, step) for step in self.uniform)


@dataclass(frozen=True)
class _Drawn:
    profile: str
    requests: tuple[Request, ...]
    bucket: int


Other = Callable[[int, int], _Drawn]  # what is not the case's own, by its place among the replays and its bucket


def steps_of(case: Case) -> Steps:
    """What is captured and what is replayed; fewer `case.replays` are the first ones of as many as usual."""
    rng = random.Random(f"{case.seed}:replays")
    limits = _limits(case)
    capturing = rng.sample(CAPTURED, 2)
    drawn = [_draw(kind, limits, bucket, rng) for bucket, kind in enumerate(capturing)]
    query_len = captured_query_len(case.batch.query_lens, limits, rng) if case.mode == DISPATCHED else 0
    if query_len:
        drawn += _replayed(case, _dispatched(case, limits, query_len, rng))
        drawn += [_Drawn(*captured_batch(query_len, _of(bucket, limits), rng), bucket) for bucket in (LARGE, SMALL)]
    else:
        drawn += _replayed(case, _by_turns([kind for kind in PROFILES if kind != capturing[LARGE]], limits, rng))
    steps, *others = (_layer(layer, drawn, limits) for layer in layers_of(case))
    for other in others:
        steps = [replace(step, other_group=layer) for step, layer in zip(steps, other, strict=True)]
    replayed, uniform = tuple(steps[2 : 2 + case.replays]), tuple(steps[-2:]) if query_len else ()
    return Steps(captured=(steps[0], steps[1]), replayed=replayed, uniform=uniform, query_len=query_len)


def _layer(case: Case, drawn: Sequence[_Drawn], limits: Limits) -> list[Step]:
    """The steps of one layer, over one pool and one width of block table."""
    shapes = [_shape(case, step, limits) for step in drawn]
    width = max(_pages(case, shape) + shape.table_slack for shape in shapes)
    pool = max(pool_size(replace(case, batch=shape)) for shape in shapes)
    return [
        _step(case, step, _widened(case, shape, width, pool), number)
        for number, (step, shape) in enumerate(zip(drawn, shapes, strict=True))
    ]


def _limits(case: Case) -> Limits:
    batch = case.batch
    work = sum(n * length for n, length in zip(batch.query_lens, batch.seq_lens, strict=True))
    return Limits(
        tokens=_power_of_two(batch.num_tokens),
        requests=_power_of_two(batch.num_requests),
        keys=max(FEWEST_KEYS, *batch.seq_lens, 0),
        work=max(LEAST_WORK, work // 2),
        all_keys=max(LEAST_WORK, sum(batch.seq_lens)),
    )


def _power_of_two(number: int) -> int:
    """The next one, at least 2, so that there is a smaller bucket."""
    return max(2, 1 << (number - 1).bit_length())


def _replayed(case: Case, other: Other) -> Iterator[_Drawn]:
    """Other steps, the case's own among them: early, rewritten after the small bucket had its turn, and at the end."""
    requests = tuple(zip(case.batch.query_lens, case.batch.seq_lens, strict=True))
    own = _Drawn(OWN, requests, LARGE)
    attends = case.spec.operation in ATTENTION_OPERATIONS
    for position in range(max(case.replays, REPLAYS)):
        if position % 4 == 1:
            yield own
        elif position == 3 and attends:
            yield replace(own, profile=REWRITTEN)
        else:
            yield other(position, SMALL if position % 4 == 2 else LARGE)


def _by_turns(kinds: Sequence[str], limits: Limits, rng: random.Random) -> Other:
    """Batches of these kinds."""
    order = rng.sample(kinds, len(kinds))
    return lambda position, bucket: _draw(order[position % len(order)], limits, bucket, rng)


def _dispatched(case: Case, limits: Limits, query_len: int, rng: random.Random) -> Other:
    """Batches for either capture: around the case's own first those for the one that does not take it."""
    kinds = (FULL, PIECEWISE)
    missing = PIECEWISE if dispatch(case.batch.query_lens, query_len) == FULL else FULL

    def other(position: int, bucket: int) -> _Drawn:
        kind = missing if position in (0, 2) else rng.choice(kinds)
        return _Drawn(*batch_for(kind, query_len, _of(bucket, limits), rng), bucket)

    return other


def _draw(kind: str, limits: Limits, bucket: int, rng: random.Random) -> _Drawn:
    return _Drawn(kind, profile(kind, _of(bucket, limits), rng), bucket)


def _of(bucket: int, limits: Limits) -> Limits:
    """Those of a bucket, by those of the large one."""
    return limits.halved() if bucket == SMALL else limits


def _shape(case: Case, step: _Drawn, limits: Limits) -> BatchShape:
    """The step's requests, padded to its bucket's tokens and requests."""
    fitting = _of(step.bucket, limits)
    requests = (*step.requests, *((0, 0),) * (fitting.requests - len(step.requests)))
    own = step.profile in (OWN, REWRITTEN)
    return replace(
        case.batch,
        query_lens=tuple(n for n, _ in requests),
        seq_lens=tuple(length for _, length in requests),
        padding_tokens=fitting.tokens - sum(n for n, _ in requests),
        table_slack=case.batch.table_slack if own else 0,
    )


def _pages(case: Case, shape: BatchShape) -> int:
    """Of its longest request."""
    return -(-max(shape.seq_lens, default=0) // case.spec.block_size)


def _widened(case: Case, shape: BatchShape, width: int, pool: int) -> BatchShape:
    return replace(shape, table_slack=width - _pages(case, shape), pool_blocks=pool)


def _step(case: Case, drawn: _Drawn, shape: BatchShape, number: int) -> Step:
    """Values, pages and slots of its own, but for the case's own batch, which keeps the case's seed."""
    rewrites = drawn.profile == REWRITTEN
    own = drawn.profile == OWN or rewrites
    seed = case.seed if own else random.Random(f"{case.seed}:replays:{number}").getrandbits(32)
    plain = replace(case, batch=shape, mode=MODES[0], replays=REPLAYS, seed=seed)
    return Step(profile=drawn.profile, case=plain, bucket=drawn.bucket, rewrites=rewrites)
