"""What a campaign varies: the parameters of a case, their values, and which values go together.

A row is one choice for every parameter that applies; parameters that do not apply to the row's operation hold
`NOT_APPLICABLE`. The covering array (`pairs.py`) and the random rows (`sampler.py`) both satisfy the constraints
below; `traits.py` reads the values back from a finished case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..case import (
    ATTENTION_OPERATIONS,
    CACHE_LAYOUTS,
    DTYPES,
    FLOAT8,
    MLA_CACHE_LAYOUTS,
    MODES,
    OPERATIONS,
    QUERY_BIASES,
    RECIPES,
    SCALE_KINDS,
)

Value = str | int | bool
Row = dict[str, Value]

NOT_APPLICABLE = "-"
SAME = "same"  # as `dtype` or `head_size`
NONE = "none"

_ALL = frozenset(OPERATIONS)
_ATTENTION = frozenset(ATTENTION_OPERATIONS)
_PAGED = _ALL - {"merge_states"}
_WITH_HEADS = frozenset({"attention", "update_kv_cache"})  # K and V lie in two caches
_MLA = frozenset({"mla_attention", "mla_attention_decompressed", "update_mla_cache"})
_DECOMPRESSED = frozenset({"mla_attention_decompressed"})


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One dimension of a row. The covering array has all pairs of `values`; random rows draw from `extra` too."""

    name: str
    values: tuple[Value, ...]
    operations: frozenset[str]
    extra: tuple[Value, ...] = ()
    within_key: str = "fixed"  # under one compile key: "fixed", "free", or "on" (free as long as it stays on or off)
    off: Value | None = None  # the value that says that the feature is not used


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """`holds(*values of scope)` for every valid row."""

    scope: tuple[str, ...]
    holds: Callable[..., bool]


def _parameter(name: str, values: tuple[Value, ...], operations: frozenset[str], **rest: Any) -> Parameter:
    return Parameter(name=name, values=values, operations=operations, **rest)


PARAMETERS: tuple[Parameter, ...] = (
    _parameter("operation", OPERATIONS, _ALL),
    _parameter("dtype", DTYPES, _ALL),
    _parameter("kv_dtype", (SAME, FLOAT8), _PAGED, off=SAME),
    _parameter("q_dtype", (SAME, FLOAT8), _ATTENTION, off=SAME),
    _parameter("out_dtype", (SAME, FLOAT8), _ATTENTION, off=SAME),
    _parameter("scales", SCALE_KINDS, _PAGED, off=NONE),
    _parameter("num_kv_heads", (1, 2, 3), _WITH_HEADS | {"merge_states"}, extra=(4, 8)),
    _parameter("group_size", (1, 2, 3, 4, 5, 7, 12, 16), _ATTENTION | {"merge_states"}, extra=(6, 8, 71, 128)),
    _parameter(
        "head_size",
        (16, 64, 80, 96, 112, 128, 192, 256),
        _WITH_HEADS | {"merge_states"},
        extra=(24, 32, 40, 48, 72, 88, 120, 144, 160, 176, 208, 224, 240),
    ),
    _parameter("head_size_v", (SAME, "smaller", "larger"), _WITH_HEADS, extra=("half", "double"), off=SAME),
    _parameter("kv_lora_rank", (64, 256, 512), _MLA, extra=(80, 128, 192)),
    _parameter("rope_head_size", (32, 64), _MLA, extra=(16, 24)),
    _parameter("nope_head_size", (32, 128), _DECOMPRESSED, extra=(64, 80)),
    _parameter("v_head_dim", (32, 128), _DECOMPRESSED, extra=(64, 96)),
    _parameter("block_size", (1, 8, 16, 32, 48, 64, 128), _PAGED, extra=(4, 24, 256, 544)),
    _parameter("cache_layout", CACHE_LAYOUTS, _PAGED, off="NHD"),
    _parameter("odd_strides", (False, True), _ALL, off=False),
    _parameter("causal", (True, False), _ATTENTION, off=True),
    _parameter(
        "sliding_window",
        (NONE, "1", "2", "page-1", "page+1", "tile", "longest", "longest+1", "large"),
        _ATTENTION,
        extra=("few", "page", "pages", "longest-1", "inside"),
        within_key="on",
        off=NONE,
    ),
    _parameter(
        "right_window", (NONE, "0", "1", "page", "large"), _ATTENTION, extra=("inside",), within_key="on", off=NONE
    ),
    _parameter("softcap", (NONE, "tight", "usual"), _ATTENTION, within_key="on", off=NONE),
    _parameter("alibi", (False, True), _ATTENTION, off=False),
    _parameter("sinks", (False, True), _ATTENTION, off=False),
    _parameter("query_bias", QUERY_BIASES, _ATTENTION, within_key="on", off=NONE),
    _parameter("bias_width", ("narrow", "exact", "wide"), _ATTENTION, within_key="on"),
    _parameter("recipe", RECIPES, _ALL, within_key="free"),
    _parameter(
        "batch",
        ("decode", "prefill", "chunked", "speculative", "mixed", "overhang", "idle", "nothing"),
        _ALL,
        extra=("extremes",),
        within_key="free",
    ),
    _parameter("padding", (NONE, "tokens", "requests", "both"), _ALL, within_key="free", off=NONE),
    _parameter("table_slack", (False, True), _ATTENTION, within_key="free", off=False),
    _parameter("shared_blocks", (False, True), _ATTENTION, within_key="free", off=False),
    _parameter("repeated_blocks", (False, True), _ATTENTION, within_key="free", off=False),
    _parameter("spare_blocks", (True, False), _PAGED, within_key="free", off=True),
    _parameter("mode", MODES, _ALL, within_key="free", off=MODES[0]),
)
BY_NAME: Mapping[str, Parameter] = {parameter.name: parameter for parameter in PARAMETERS}

_SIZED_BY_KEYS = ("longest", "longest+1", "longest-1", "inside")
_LONE_TOKENS = ("decode", "nothing")  # no request with two new tokens


def _applies_where_operation_says(parameter: Parameter) -> Constraint:
    operations, name = parameter.operations, parameter.name
    return Constraint(
        scope=("operation", name), holds=lambda op, value: (value == NOT_APPLICABLE) == (op not in operations)
    )


def _float8_somewhere(kv_dtype: Value, q_dtype: Value, out_dtype: Value) -> bool:
    return FLOAT8 in (kv_dtype, q_dtype, out_dtype)


# Scales and bias widths need more than the operation's word to apply; every other parameter's "-" depends on it alone.
CONSTRAINTS: tuple[Constraint, ...] = (
    *(
        _applies_where_operation_says(parameter)
        for parameter in PARAMETERS
        if parameter.name not in ("operation", "scales", "bias_width")
    ),
    Constraint(
        scope=("scales", "kv_dtype", "q_dtype", "out_dtype"),
        holds=lambda scales, *dtypes: (scales != NOT_APPLICABLE) == _float8_somewhere(*dtypes),
    ),
    Constraint(
        scope=("bias_width", "query_bias"),
        holds=lambda width, bias: (width != NOT_APPLICABLE) == (bias not in (NOT_APPLICABLE, NONE)),
    ),
    Constraint(
        scope=("operation", "cache_layout"),
        holds=lambda op, layout: op not in _MLA or layout in MLA_CACHE_LAYOUTS,
    ),
    Constraint(scope=("q_dtype", "kv_dtype"), holds=lambda q, kv: q != FLOAT8 or kv == FLOAT8),
    Constraint(scope=("causal", "right_window"), holds=lambda causal, right: causal is not True or right == NONE),
    # A window of zero keys is an error, so a page of one slot has no "page-1".
    Constraint(scope=("block_size", "sliding_window"), holds=lambda page, window: (page, window) != (1, "page-1")),
    # Without keys, or new tokens, there is nothing that these could be measured by.
    Constraint(scope=("batch", "sliding_window"), holds=lambda batch, w: batch != "nothing" or w not in _SIZED_BY_KEYS),
    Constraint(scope=("batch", "right_window"), holds=lambda batch, w: batch != "nothing" or w not in _SIZED_BY_KEYS),
    Constraint(
        scope=("batch", "bias_width"), holds=lambda batch, width: width != "narrow" or batch not in _LONE_TOKENS
    ),
    Constraint(scope=("batch", "bias_width"), holds=lambda batch, width: width != "exact" or batch != "nothing"),
    Constraint(scope=("batch", "shared_blocks"), holds=lambda batch, shared: shared is not True or batch != "nothing"),
    Constraint(scope=("batch", "repeated_blocks"), holds=lambda batch, twice: twice is not True or batch != "nothing"),
)


def domain(parameter: Parameter, *, extra: bool = False) -> tuple[Value, ...]:
    """The values a row may hold for this parameter, `NOT_APPLICABLE` included."""
    values = parameter.values + (parameter.extra if extra else ())
    always = parameter.operations == _ALL
    return values if always else (*values, NOT_APPLICABLE)
