"""Random rows by swarm, and groups of cases that share a compile key.

Everything is a function of (seed, kind, index): the same seed gives the same groups, on any number of workers.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..case import ATTENTION_OPERATIONS, CACHE_LAYOUTS, FLOAT8, MODES, Case
from ..case_checks import applicable
from ..case_layers import layers_of
from .lengths import Sizes, total_work
from .pairs import Model, Trait, Values
from .parameters import BY_NAME, NONE, NOT_APPLICABLE, SAME, Row, Value
from .realise import realise

WIDE_WINDOWS = ("longest-1", "longest", "longest+1", "large", "inside")
REDRAWS = 20
GROUPS_OF_KEY = 0.5  # of the cases of a compile key that has steps with two cache groups at all

# How often random rows have a value, where not all are alike. An off value not named here comes as often as not.
_WEIGHTS: dict[str, dict[Value, float]] = {
    "operation": {
        "attention": 10,
        "mla_attention": 3,
        "mla_attention_decompressed": 3,
        "update_kv_cache": 2,
        "update_mla_cache": 1,
        "merge_states": 1,
    },
    "q_dtype": {SAME: 0.8},
    "out_dtype": {SAME: 0.8},
    "group_size": {71: 0.3, 128: 0.3},
    "block_size": {544: 0.3},
    "batch": {"mixed": 2, "decode": 2, "overhang": 0.5, "nothing": 0.15, "extremes": 0.15},
    "padding": {"both": 0.5},
    "repeated_blocks": {False: 0.7},
    "mode": {MODES[0]: 0.6},
}

# What rows have that are as models are served: 16-bit caches in whole pages, and heads of more than a few columns.
# Kernels for one architecture take little else, and of rows without this hardly any.
_SERVED: dict[str, tuple[Value, ...]] = {
    "dtype": ("float16", "bfloat16"),
    "kv_dtype": (SAME,),
    "head_size": (64, 80, 96, 112, 128, 192, 256),
    "kv_lora_rank": (512,),
    "rope_head_size": (64,),
    "block_size": (8, 16, 24, 32, 48, 64, 128, 256, 544),
    "cache_layout": tuple(layout for layout in CACHE_LAYOUTS if layout != "transposed"),
    "odd_strides": (False,),
    "query_bias": (NONE,),
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cases that are drawn one after the other, and judged in one process."""

    seed: int
    index: int
    row: tuple[tuple[str, Value], ...] | None = None  # of the covering array; None: a random row of its own
    count: int = 1
    given: tuple[Case, ...] = ()  # instead of drawing any

    def cases(self, model: Model, sizes: Sizes) -> Iterator[Case]:
        """Its cases, always the same ones; `model` has the extra values and leaves out what the target declines."""
        if self.given:
            yield from self.given[: self.count]
            return
        # Checks are drawn apart, so that a case has the same numbers with one and without.
        stream = f"{self.seed}:{'random' if self.row is None else 'row'}:{self.index}"
        checks = random.Random(f"{stream}:checks")
        groups = groups_share(random.Random(f"{stream}:cache groups"), sizes)
        for case in self._drawn(model, sizes, random.Random(stream)):
            if self.row is None:  # a relation may need kernels of its own, for which rows do not wait
                case = with_groups(with_reads(with_check(case, checks, sizes), checks, sizes), groups, sizes)
            yield case

    def _drawn(self, model: Model, sizes: Sizes, rng: random.Random) -> Iterator[Case]:
        if self.row is not None:
            yield from (realise(dict(self.row), rng, sizes) for _ in range(self.count))
            return
        base = _random_base(model, rng, sizes)
        far = rng.random() < sizes.far_share and _may_be_far(base) and ("mode", MODES[0]) not in model.banned
        for _ in range(self.count):
            case = _affordable_case(model, base, rng, sizes)
            yield replace(case, mode=MODES[0]).with_spec(far_pages=True) if far else case


def with_check(case: Case, rng: random.Random, sizes: Sizes) -> Case:
    """The case, or a share of the time the same case asked one of the relations that say something of it.

    Only of plain calls: a case in another mode is asked about its replays.
    """
    asked, drawn = rng.random() < sizes.check_share and case.mode == MODES[0], rng.random()
    offered = applicable(case) if asked else ()
    return replace(case, check=offered[int(drawn * len(offered))]) if offered else case


def with_reads(case: Case, rng: random.Random, sizes: Sizes) -> Case:
    """The case, or a share of the time, if it asks for nothing else, the same case asked for its read set."""
    asked = rng.random() < sizes.reads_share
    return replace(case, check="reads") if asked and case.check == "answer" and case.mode == MODES[0] else case


def groups_share(rng: random.Random, sizes: Sizes) -> float:
    """Of a compile key's cases, those with a second cache group: of most keys none, as it takes kernels of its own."""
    return GROUPS_OF_KEY if rng.random() < sizes.groups_share / GROUPS_OF_KEY else 0.0


def with_groups(case: Case, share: float, sizes: Sizes) -> Case:
    """The case, or a share of the time, if it attends and is replayed, the same case with a second cache group."""
    if case.mode == MODES[0] or case.spec.operation not in ATTENTION_OPERATIONS:
        return case
    grouped = replace(case, cache_groups=2)
    drawn = random.Random(f"{case.seed}:cache groups").random() < share
    affordable = all(total_work(layer.spec, layer.batch, sizes) <= 2 * max(sizes.work) for layer in layers_of(grouped))
    return grouped if drawn and affordable else case


def _may_be_far(row: Row) -> bool:
    """Pages past 2**31 elements: not of four bytes, which would be 26 GB for K and V."""
    return row["operation"] != "merge_states" and (row["kv_dtype"] == FLOAT8 or row["dtype"] != "float32")


def row_group(seed: int, index: int, row: Row, sizes: Sizes) -> Group:
    return Group(seed=seed, index=index, row=tuple(row.items()), count=sizes.cases_per_row)


def made_up_group(seed: int, index: int, pair: Values, banned: frozenset[Trait], sizes: Sizes) -> Group | None:
    """A random row with these values, if what is banned leaves one; `index` is that of no other row."""
    row = _swarm(Model(banned=banned), random.Random(f"{seed}:{index}"), dict(pair))
    return None if row is None else row_group(seed, index, row, sizes)


def random_group(seed: int, index: int, sizes: Sizes) -> Group:
    return Group(seed=seed, index=index, count=sizes.cases_per_key)


def random_row(model: Model, rng: random.Random, *, served: bool = False) -> Row:
    """A valid row by swarm: every feature on or off by a coin, then one of its values.

    served: as models are served, as far as the target offers that.
    """
    row = _swarm(model, rng, {}, served=served)
    if row is None:
        raise ValueError("row: found no valid row, expected one; what the target declines leaves none")
    return row


def _swarm(model: Model, rng: random.Random, fixed: Row, *, served: bool = False) -> Row | None:
    def order(name: str, values: tuple[Value, ...], row: Row) -> list[Value]:
        ordered = _by_weight(rng, name, values)
        if served:
            ordered.sort(key=lambda value: value not in _SERVED.get(name, ()))
        return ordered

    return model.complete(fixed, order)


def _random_base(model: Model, rng: random.Random, sizes: Sizes) -> Row:
    """A random row without more query heads than cases of this size may have."""
    served = sizes.served_share > 0 and rng.random() < sizes.served_share
    for _ in range(REDRAWS):
        row = random_row(model, rng, served=served)
        kv_heads, group = (
            1 if row[name] == NOT_APPLICABLE else int(row[name]) for name in ("num_kv_heads", "group_size")
        )
        if kv_heads * group <= sizes.heads:
            break
    return row


def _by_weight(rng: random.Random, name: str, values: Iterable[Value]) -> list[Value]:
    values = list(values)
    off, weights = BY_NAME[name].off, _WEIGHTS.get(name, {})
    on = max(1, sum(value not in (off, NOT_APPLICABLE) for value in values))

    def weight(value: Value) -> float:
        if off is None:
            return weights.get(value, 1.0)
        share = weights.get(off, 0.5)
        return share if value == off else weights.get(value, 1.0) * (1.0 - share) / on

    # Weighted order without replacement (Efraimidis and Spirakis): the largest u ** (1 / w) comes first.
    return sorted(values, key=lambda value: rng.random() ** (1.0 / weight(value)), reverse=True)


def _affordable_case(model: Model, base: Row, rng: random.Random, sizes: Sizes) -> Case:
    """Another case of the same compile key: batch, recipe and the sizes of what is on are drawn anew."""
    long = rng.random() < sizes.long_share
    fixed = {name: value for name, value in base.items() if BY_NAME[name].within_key == "fixed"}
    for name, value in base.items():
        if BY_NAME[name].within_key == "on" and value in (NONE, NOT_APPLICABLE):
            fixed[name] = value

    def order(name: str, values: tuple[Value, ...], _row: Row) -> list[Value]:
        stays_on = BY_NAME[name].within_key == "on"
        ordered = _by_weight(rng, name, [value for value in values if not (stays_on and value == NONE)])
        if long and name == "sliding_window" and rng.random() < 0.6:
            ordered.sort(key=lambda value: value not in WIDE_WINDOWS)
        return ordered

    for _ in range(REDRAWS):
        row = model.complete(fixed, order)
        if row is None:
            raise ValueError(f"row: found no way to complete {fixed}, expected one: the row it comes from is valid")
        case = realise(row, rng, sizes, long=long)
        if total_work(case.spec, case.batch, sizes) <= 2 * max(sizes.work):
            break  # what two requests share may be pages so large that they cost more than the rest of the case
    return case
