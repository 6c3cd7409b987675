"""A row of feature values into a valid case that has them all."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from ..case import MODES, REPLAYS, BatchShape, Case, Spec
from ..case_rules import why_invalid
from .lengths import Batches, Sizes, spread
from .parameters import NONE, NOT_APPLICABLE, SAME, Row, Value
from .traits import LONG, NEAR_TILES

HEAD_SIZES = (16, 32, 64, 80, 96, 112, 128, 192, 256, 288)
REDRAWS = 20


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
    shared = (rng.choice((1, 1, 2)) if spec.block_size <= 16 else 1) if row["shared_blocks"] is True else 0
    repeated = row["repeated_blocks"] is True
    floor = max(shared * spec.block_size, spec.block_size + 1 if repeated else 1)
    mode = str(row["mode"])
    share = 1 if mode == MODES[0] else sizes.mode_share
    holders = 2 if shared else int(repeated)
    batches = Batches(spec, sizes, rng, long=long, floor=floor, holders=holders, share=share)
    requests = batches.draw(str(row["batch"]))
    padding = row["padding"]
    requests = spread(requests, rng.randint(1, 2) if padding in ("requests", "both") else 0, rng)
    batch = BatchShape(
        query_lens=tuple(n for n, _ in requests),
        seq_lens=tuple(length for _, length in requests),
        padding_tokens=rng.choice((1, 3, 8)) if padding in ("tokens", "both") else 0,
        table_slack=rng.randint(1, 3) if row["table_slack"] is True else 0,
        shared_blocks=shared,
        repeated_blocks=repeated,
        spare_blocks=row["spare_blocks"] is not False,
    )
    spec = _measured(spec, row, batch, rng)
    replays = REPLAYS if mode == MODES[0] else sizes.replays
    return Case(spec=spec, batch=batch, recipe=str(row["recipe"]), mode=mode, replays=replays, seed=rng.getrandbits(32))


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
