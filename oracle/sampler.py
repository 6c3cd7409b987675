"""Rows of feature values into cases, and groups of cases that share a compile key.

Everything is a function of (seed, kind, index): the same seed gives the same groups, on any number of workers.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .case import FLOAT8, BatchShape, Case, Spec
from .case_rules import why_invalid
from .lengths import Batches, Sizes, spread, total_work
from .pairs import Model
from .parameters import BY_NAME, NONE, NOT_APPLICABLE, SAME, Row, Value
from .traits import LONG, NEAR_TILES

HEAD_SIZES = (16, 32, 64, 80, 96, 128, 192, 256, 288)
WIDE_WINDOWS = ("longest-1", "longest", "longest+1", "large", "inside")
REDRAWS = 20

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
    "batch": {"mixed": 2, "decode": 2, "overhang": 0.5, "nothing": 0.15},
    "padding": {"both": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cases that are drawn and judged one after the other, in one process."""

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
        rng = random.Random(f"{self.seed}:{'random' if self.row is None else 'row'}:{self.index}")
        if self.row is not None:
            yield from (realise(dict(self.row), rng, sizes) for _ in range(self.count))
            return
        base = _random_base(model, rng, sizes)
        far = rng.random() < sizes.far_share and _may_be_far(base)
        for _ in range(self.count):
            case = _affordable_case(model, base, rng, sizes)
            yield case.with_spec(far_pages=True) if far else case


def _may_be_far(row: Row) -> bool:
    """Pages past 2**31 elements: not of four bytes, which would be 26 GB for K and V."""
    return row["operation"] != "merge_states" and (row["kv_dtype"] == FLOAT8 or row["dtype"] != "float32")


def row_group(seed: int, index: int, row: Row, sizes: Sizes) -> Group:
    return Group(seed=seed, index=index, row=tuple(row.items()), count=sizes.cases_per_row)


def random_group(seed: int, index: int, sizes: Sizes) -> Group:
    return Group(seed=seed, index=index, count=sizes.cases_per_key)


def random_row(model: Model, rng: random.Random, fixed: Row | None = None) -> Row:
    """A valid row by swarm: every feature on or off by a coin, then one of its values."""
    row = model.complete(fixed or {}, lambda name, values, _row: _by_weight(rng, name, values))
    if row is None:
        raise ValueError(f"row: found no valid row with {fixed}, expected one; what the target declines leaves none")
    return row


def _random_base(model: Model, rng: random.Random, sizes: Sizes) -> Row:
    """A random row without more query heads than cases of this size may have."""
    for _ in range(REDRAWS):
        row = random_row(model, rng)
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


def realise(row: Row, rng: random.Random, sizes: Sizes, *, long: bool | None = None) -> Case:
    """A valid case that has every value of the row."""
    if long is None:
        long = rng.random() < sizes.long_share
    for _ in range(REDRAWS):
        case = _case(row, rng, sizes, long)
        reason = why_invalid(case)
        if reason is None:
            return case
    raise ValueError(f"row: found {row}, expected a valid case from it: {reason}")


def _case(row: Row, rng: random.Random, sizes: Sizes, long: bool) -> Case:
    spec = _spec(row, rng)
    shared = rng.choice((1, 1, 2)) if row["shared_blocks"] is True and spec.block_size <= 16 else 1
    floor = shared * spec.block_size if row["shared_blocks"] is True else 1
    requests = Batches(spec, sizes, rng, long=long, floor=floor).draw(str(row["batch"]))
    padding = row["padding"]
    requests = spread(requests, rng.randint(1, 2) if padding in ("requests", "both") else 0, rng)
    batch = BatchShape(
        query_lens=tuple(n for n, _ in requests),
        seq_lens=tuple(length for _, length in requests),
        padding_tokens=rng.choice((1, 3, 8)) if padding in ("tokens", "both") else 0,
        table_slack=rng.randint(1, 3) if row["table_slack"] is True else 0,
        shared_blocks=shared if row["shared_blocks"] is True else 0,
    )
    spec = _measured(spec, row, batch, rng)
    return Case(spec=spec, batch=batch, recipe=str(row["recipe"]), seed=rng.getrandbits(32))


def _spec(row: Row, rng: random.Random) -> Spec:
    """Everything that does not depend on the batch; windows that do are left out."""

    def get(name: str, default: Value) -> Value:
        value = row[name]
        return default if value in (NOT_APPLICABLE, SAME) else value

    spec = Spec(
        operation=str(row["operation"]),
        dtype=str(row["dtype"]),
        q_dtype=str(get("q_dtype", "")),
        kv_dtype=str(get("kv_dtype", "")),
        out_dtype=str(get("out_dtype", "")),
        scales=str(get("scales", NONE)),
        num_kv_heads=int(get("num_kv_heads", 1)),
        group_size=int(get("group_size", 1)),
        block_size=int(get("block_size", 16)),
        cache_layout=str(get("cache_layout", "NHD")),
        odd_strides=bool(row["odd_strides"]),
        causal=row["causal"] is not False,
        alibi=row["alibi"] is True,
        sinks=row["sinks"] is True,
        softcap=_softcap(row["softcap"], rng),
        query_bias=str(get("query_bias", NONE)),
    )
    page = spec.block_size
    widths = {"1": 1, "2": 2, "page-1": page - 1, "page": page, "page+1": page + 1, "few": rng.randint(3, 7)}
    widths |= {"tile": rng.choice(sorted(NEAR_TILES)), "pages": page * rng.randint(2, 5) + rng.choice((-1, 0, 1))}
    return replace(
        spec,
        **_head_sizes(row),
        sliding_window=widths.get(str(row["sliding_window"])),
        right_window={"0": 0, "1": 1, "page": page}.get(str(row["right_window"])),
    )


def _head_sizes(row: Row) -> dict[str, Any]:
    if row["kv_lora_rank"] != NOT_APPLICABLE:
        names = {"head_size": "kv_lora_rank", "rope_head_size": "rope_head_size"}
        names |= {"nope_head_size": "nope_head_size", "head_size_v": "v_head_dim"}
        return {field: int(row[name]) for field, name in names.items() if row[name] != NOT_APPLICABLE}
    head_size = int(row["head_size"])
    sizes = {
        "smaller": max((n for n in HEAD_SIZES if n < head_size), default=8),
        "larger": min(n for n in HEAD_SIZES if n > head_size),
        "half": head_size // 2,
        "double": 2 * head_size,
    }
    return {"head_size": head_size, "head_size_v": sizes.get(str(row["head_size_v"]), head_size)}


def _softcap(kind: Value, rng: random.Random) -> float | None:
    return {"tight": rng.choice((0.5, 1.0, 2.0)), "usual": rng.choice((15.0, 30.0, 50.0))}.get(str(kind))


def _measured(spec: Spec, row: Row, batch: BatchShape, rng: random.Random) -> Spec:
    """The windows and the bias width that are measured by the batch."""
    longest, widest = max(batch.seq_lens, default=0), max(batch.query_lens, default=0)
    inside = rng.randint(min(LONG, longest) if rng.random() < 0.5 else 1, max(1, longest)) if longest else 1
    large = longest + rng.choice((2, 3, 100, 2**31 - 1 - longest))
    windows = {"longest-1": max(1, longest - 1), "longest": longest, "longest+1": longest + 1}
    windows |= {"inside": inside, "large": large}
    widths = {
        "exact": widest,
        "narrow": rng.randint(1, max(1, min(64, widest - 1))),
        "wide": widest + rng.randint(1, 8),
    }
    return replace(
        spec,
        sliding_window=windows.get(str(row["sliding_window"]), spec.sliding_window),
        right_window={"inside": inside, "large": large}.get(str(row["right_window"]), spec.right_window),
        bias_width=widths.get(str(row["bias_width"]), 0),
    )
