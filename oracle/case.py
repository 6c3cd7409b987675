"""A case: plain frozen values that say everything about one checked call, and their JSON.

A case holds no tensors. Its tensors are made from the case alone, bit for bit the same on every machine
(`tensors.build`), so a case is all that a finding needs to be replayed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from typing import Any

SCHEMA = 1
WIDTH = 100  # characters of a line of JSON at most

OPERATIONS = (
    "attention",
    "mla_attention",
    "mla_attention_decompressed",
    "update_kv_cache",
    "update_mla_cache",
    "merge_states",
)
ATTENTION_OPERATIONS = OPERATIONS[:3]
DTYPES = ("float32", "float16", "bfloat16")
FLOAT8 = "float8_e4m3fn"
CACHE_LAYOUTS = ("NHD", "HND", "interleaved", "head_major", "sliced", "transposed", "slot_major")  # building/layouts.py
MLA_CACHE_LAYOUTS = ("NHD", "sliced", "transposed", "slot_major")  # of rows without heads
SCALE_KINDS = ("none", "tensor", "head")
QUERY_BIASES = ("none", "chain", "tree", "deep", "dense")
TREES = ("chain", "tree", "deep")  # of the query biases those that hide keys and add nothing
RECIPES = ("normal", "needle", "one_hot", "extreme", "census", "tagged", "one_hot_full", "cancel")
POISON_TIERS = "abcde"
# How the calls of a case are executed (execution/modes.py): once and plainly, or captured and run again and again.
MODES = ("eager", "full", "compiled", "piecewise", "breakable", "full_and_piecewise")
REPLAYS = 6
# Beyond the answer itself, one more thing may be asked of a case (the checks of oracle/checks).
# Between several of a candidate's own runs.
RELATIONS = (
    "repeat",
    "interference",
    "must_read",
    "sequential",
    "key_order",
    "page_order",
    "request_order",
    "split",
    "ones",
    "shift",
    "rescale",
    "groups",
    "swap",
)
CHECKS = ("answer", *RELATIONS, "reads")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is asked for: the operation, the shapes and formats, the rules. A kernel's compile key lies in here.

    For MLA, `num_kv_heads` is 1, `group_size` the number of query heads, `head_size` the kv_lora_rank and
    `rope_head_size` the qk_rope_head_dim; decompressed, `nope_head_size` is qk_nope_head_dim and
    `head_size_v` is v_head_dim.
    """

    operation: str = "attention"
    dtype: str = "bfloat16"  # of q, key, value and out, unless said otherwise
    q_dtype: str = ""  # "" for dtype, or float8_e4m3fn
    kv_dtype: str = ""  # the caches': "" for dtype, or float8_e4m3fn
    out_dtype: str = ""  # "" for dtype, or float8_e4m3fn
    scales: str = "none"  # for every float8 tensor: none (1), one per tensor, one per kv head
    num_kv_heads: int = 2
    group_size: int = 2
    head_size: int = 64
    head_size_v: int = 64
    rope_head_size: int = 0
    nope_head_size: int = 0
    block_size: int = 16
    cache_layout: str = "NHD"
    odd_strides: bool = False  # padded rows and heads instead of packed ones
    far_pages: bool = False  # pages so far apart that a third of the pool lies past 2**31 elements
    causal: bool = True
    sliding_window: int | None = None
    right_window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    query_bias: str = "none"
    bias_width: int = 0

    @property
    def num_query_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def is_mla(self) -> bool:
        return self.operation in ("mla_attention", "mla_attention_decompressed", "update_mla_cache")


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Who is in the batch. A padding request is one with query length 0 and sequence length 0."""

    query_lens: tuple[int, ...] = ()
    seq_lens: tuple[int, ...] = ()
    padding_tokens: int = 0  # rows of the buffers beyond the last request's
    table_slack: int = 0  # unused columns of the block table
    shared_blocks: int = 0  # leading pages that all requests share with the first one long enough
    repeated_blocks: bool = False  # every request of two pages or more has one of them in its table twice
    spare_blocks: bool = True  # the pool has pages that nobody owns, page 0 among them
    pool_blocks: int = 0  # pages that the pool has at least: batches that come after each other share one pool

    @property
    def num_requests(self) -> int:
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens) + self.padding_tokens


@dataclass(frozen=True, kw_only=True)
class Case:
    """One (spec, batch, recipe, poison, mode, check, seed); compared in full when it is judged."""

    spec: Spec = field(default_factory=Spec)
    batch: BatchShape = field(default_factory=BatchShape)
    recipe: str = "normal"
    poison: str = POISON_TIERS
    mode: str = MODES[0]
    replays: int = REPLAYS  # in a mode other than eager: how often what was captured or compiled runs again
    cache_groups: int = 1  # in a mode other than eager: layers of one step, each with pages of its own (case_layers.py)
    check: str = "answer"
    seed: int = 0

    def with_spec(self, **changes: Any) -> Case:
        return replace(self, spec=replace(self.spec, **changes))

    def with_batch(self, **changes: Any) -> Case:
        return replace(self, batch=replace(self.batch, **changes))

    def to_json(self) -> str:
        """Indented JSON in lines of at most `WIDTH` characters; fields that hold their default are left out."""
        body: dict[str, Any] = {"schema": SCHEMA}
        for part in ("spec", "batch"):
            values = _changed(getattr(self, part))
            if values:
                body[part] = values
        body.update((name, value) for name, value in _changed(self).items() if name not in ("spec", "batch"))
        return "{\n" + ",\n".join(f"  {_written(name, value, '  ')}" for name, value in body.items()) + "\n}\n"

    @staticmethod
    def from_json(text: str) -> Case:
        """The case that `to_json` wrote; a ValueError names what is not understood."""
        body = json.loads(text)
        if not isinstance(body, dict) or body.get("schema") != SCHEMA:
            found = body.get("schema") if isinstance(body, dict) else type(body).__name__
            raise ValueError(f"schema: found {found!r}, expected {SCHEMA}")
        body = {name: value for name, value in body.items() if name != "schema"}
        spec = _read(Spec, body.pop("spec", {}), "spec")
        batch = _read(BatchShape, body.pop("batch", {}), "batch")
        case: Case = _read(Case, body, "case")
        return replace(case, spec=spec, batch=batch)


def _changed(value: Any) -> dict[str, Any]:
    default = type(value)()
    names = [item.name for item in fields(value)]
    return {name: getattr(value, name) for name in names if getattr(value, name) != getattr(default, name)}


def _written(name: str, value: Any, indent: str) -> str:
    """`"name": value`, broken over lines where it is too long for the rest of one."""
    line = f"{json.dumps(name)}: {json.dumps(value)}"
    if not isinstance(value, (dict, tuple)) or len(indent) + len(line) < WIDTH:  # a comma has to fit as well
        return line
    deeper = indent + "  "
    if isinstance(value, dict):
        parts, (opening, closing) = [_written(*item, deeper) for item in value.items()], "{}"
    else:
        parts, (opening, closing) = [json.dumps(part) for part in value], "[]"
    return f"{json.dumps(name)}: {opening}\n{_filled(parts, deeper)}\n{indent}{closing}"


def _filled(parts: list[str], indent: str) -> str:
    """The parts with commas between them, as many on a line as fit; one that is broken already has lines of its own."""
    lines: list[str] = []
    for part in parts:
        fits = lines and "\n" not in lines[-1] + part and len(lines[-1]) + len(part) + 2 < WIDTH
        if fits:
            lines[-1] += f", {part}"
        else:
            lines.append(indent + part)
    return ",\n".join(lines)


def _read(kind: Any, values: dict[str, Any], where: str) -> Any:
    known = {item.name for item in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: found the unknown fields {unknown}, expected only {sorted(known)}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
