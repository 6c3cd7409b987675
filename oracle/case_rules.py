"""Which cases mean something: the constraints between the fields of a Case.

Fields that an operation does not look at (the rules of a cache update, the pages of a merge) may hold anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .case import (
    ATTENTION_OPERATIONS,
    CACHE_LAYOUTS,
    CHECKS,
    DTYPES,
    FLOAT8,
    MLA_CACHE_LAYOUTS,
    MODES,
    OPERATIONS,
    POISON_TIERS,
    QUERY_BIASES,
    RECIPES,
    SCALE_KINDS,
    BatchShape,
    Case,
    Spec,
)
from .case_checks import why_not

LARGEST_LENGTH = 2**31 - 1  # lengths are int32


def why_invalid(case: Case) -> str | None:
    """What contradicts what in this case, in one sentence, or None if it can be built."""
    return next(_complaints(case), None)


def _complaints(case: Case) -> Iterator[str]:
    spec, batch = case.spec, case.batch
    yield from _unknown_words(case)
    yield from _impossible_sizes(spec)
    yield from _impossible_formats(spec)
    if spec.is_mla:
        yield from _impossible_mla(spec)
    if spec.operation in ATTENTION_OPERATIONS:
        yield from _impossible_rules(spec)
    yield from _impossible_batch(batch)
    yield from _impossible_mode(case)
    if (reason := why_not(case)) is not None:
        yield reason


def _unknown_words(case: Case) -> Iterator[str]:
    spec = case.spec
    words: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("operation", spec.operation, OPERATIONS),
        ("dtype", spec.dtype, DTYPES),
        ("q_dtype", spec.q_dtype, ("", FLOAT8)),
        ("kv_dtype", spec.kv_dtype, ("", FLOAT8)),
        ("out_dtype", spec.out_dtype, ("", FLOAT8)),
        ("scales", spec.scales, SCALE_KINDS),
        ("cache_layout", spec.cache_layout, CACHE_LAYOUTS),
        ("query_bias", spec.query_bias, QUERY_BIASES),
        ("recipe", case.recipe, RECIPES),
        ("mode", case.mode, MODES),
        ("check", case.check, CHECKS),
    )
    for name, found, expected in words:
        if found not in expected:
            yield f"{name}: found {found!r}, expected one of {expected}"
    if list(case.poison) != sorted(set(case.poison) & set(POISON_TIERS)):
        yield f"poison: found {case.poison!r}, expected letters of {POISON_TIERS!r} in order, each at most once"
    if not _is_int(case.seed) or case.seed < 0:
        yield f"seed: found {case.seed!r}, expected an int of at least 0"


def _impossible_sizes(spec: Spec) -> Iterator[str]:
    for name in ("num_kv_heads", "group_size", "head_size", "head_size_v", "block_size"):
        yield from _below(name, getattr(spec, name), 1)
    for name in ("rope_head_size", "nope_head_size", "bias_width"):
        yield from _below(name, getattr(spec, name), 0)


def _impossible_formats(spec: Spec) -> Iterator[str]:
    attends = spec.operation in ATTENTION_OPERATIONS
    if spec.q_dtype == FLOAT8 and spec.kv_dtype != FLOAT8:
        yield "q_dtype: float8 queries need float8 caches"
    if not attends:
        for name in ("q_dtype", "out_dtype"):
            if getattr(spec, name):
                yield f"{name}: {spec.operation} has no such tensor"
    if spec.operation == "merge_states" and spec.kv_dtype:
        yield "kv_dtype: merge_states has no caches"
    if spec.scales != "none" and FLOAT8 not in (spec.q_dtype, spec.kv_dtype, spec.out_dtype):
        yield f"scales: found {spec.scales!r} with no float8 tensor to scale"


def _impossible_mla(spec: Spec) -> Iterator[str]:
    if spec.num_kv_heads != 1:
        yield f"num_kv_heads: found {spec.num_kv_heads}, expected 1: MLA has one row that all heads share"
    if spec.cache_layout not in MLA_CACHE_LAYOUTS:
        yield f"cache_layout: found {spec.cache_layout!r}, expected one of {MLA_CACHE_LAYOUTS}: MLA has one row for all"
    if spec.rope_head_size < 1:
        yield f"rope_head_size: found {spec.rope_head_size}, expected at least 1 for MLA"
    if spec.operation == "mla_attention_decompressed" and spec.nope_head_size < 1:
        yield f"nope_head_size: found {spec.nope_head_size}, expected at least 1 for decompressed MLA"


def _impossible_rules(spec: Spec) -> Iterator[str]:
    if spec.sliding_window is not None:
        yield from _below("sliding_window", spec.sliding_window, 1)
    if spec.right_window is not None:
        yield from _below("right_window", spec.right_window, 0)
        if spec.causal:
            yield "right_window: only without causal, which already ends at the token"
    if spec.softcap is not None and not (math.isfinite(spec.softcap) and spec.softcap > 0):
        yield f"softcap: found {spec.softcap}, expected a positive number or None"
    if (spec.query_bias == "none") != (spec.bias_width == 0):
        yield f"bias_width: found {spec.bias_width} beside query_bias {spec.query_bias!r}: both or neither"


def _impossible_batch(batch: BatchShape) -> Iterator[str]:
    if len(batch.query_lens) != len(batch.seq_lens):
        yield f"seq_lens: found {len(batch.seq_lens)} of them beside {len(batch.query_lens)} query_lens"
    for name in ("query_lens", "seq_lens"):
        for length in getattr(batch, name):
            yield from _below(name, length, 0)
    for name in ("padding_tokens", "table_slack", "shared_blocks", "pool_blocks"):
        yield from _below(name, getattr(batch, name), 0)


def _impossible_mode(case: Case) -> Iterator[str]:
    yield from _below("replays", case.replays, 1)
    if case.mode != MODES[0] and case.spec.far_pages:
        yield f"mode: {case.mode} needs a second pool, for which far pages leave no room"
    if case.mode != MODES[0] and case.check != "answer":
        yield f"check: {case.check} is asked of plain calls, and the mode is {case.mode}"
    if case.cache_groups not in (1, 2):
        yield f"cache_groups: found {case.cache_groups!r}, expected 1 or 2"
    if case.cache_groups != 1 and (case.mode == MODES[0] or case.spec.operation not in ATTENTION_OPERATIONS):
        yield f"cache_groups: found {case.cache_groups} in mode {case.mode}, expected attention in a mode with replays"


def _below(name: str, found: Any, smallest: int) -> Iterator[str]:
    if not _is_int(found) or not smallest <= found <= LARGEST_LENGTH:
        yield f"{name}: found {found!r}, expected an int of at least {smallest}"


def _is_int(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool)
