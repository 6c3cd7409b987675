"""Features off, sizes and formats plain: every step asks for kernels of another compile key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..case import DTYPES, Case, Spec
from .reducing import Trials, fewest

# What goes off together, in the order in which single ones are tried: what needs another thing stands before it.
_TOGETHER: tuple[tuple[str, ...], ...] = (
    ("softcap",),
    ("alibi",),
    ("sinks",),
    ("query_bias", "bias_width"),
    ("sliding_window",),
    ("right_window",),
    ("causal",),
    ("scales",),
    ("q_dtype",),
    ("kv_dtype",),
    ("out_dtype",),
    ("odd_strides",),
    ("far_pages",),
    ("cache_layout",),
    ("num_kv_heads",),
    ("group_size",),
    ("head_size", "head_size_v"),
)
# Where the plainest value will not do, the next ones in this order.
_HEAD_SIZES = (64, 32, 16, 128, 256)
_NEXT_BEST: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES,
    "num_kv_heads": (1, 2, 3, 4),
    "group_size": (1, 2, 3, 4, 5, 8, 16, 32),
    "rope_head_size": (32, 16),
    "nope_head_size": (32, 64),
    "block_size": (16, 8, 32, 64),
}


def plain(spec: Spec) -> Spec:
    """The operation with nothing on, one head, float32."""
    return Spec(
        operation=spec.operation,
        dtype=DTYPES[0],
        num_kv_heads=1,
        group_size=1,
        rope_head_size=32 if spec.is_mla else 0,
        nope_head_size=32 if spec.operation == "mla_attention_decompressed" else 0,
    )


def plainer(case: Case) -> Trials[Case]:
    """The case with the fewest features that it fails with."""
    target = plain(case.spec)
    held = [names for names in _groups() if any(getattr(case.spec, name) != getattr(target, name) for name in names)]

    def case_with(kept: Sequence[tuple[str, ...]]) -> Case:
        return case.with_spec(**{name: getattr(target, name) for names in held if names not in kept for name in names})

    case = case_with((yield from fewest(held, case_with)))
    for name, ladder in _NEXT_BEST.items():
        case = yield from _next_best(case, (name,), ladder)
    if case.spec.is_mla:
        for name in ("head_size", "head_size_v"):
            case = yield from _next_best(case, (name,), _HEAD_SIZES)
        return case
    # Values as wide as keys, or else values of another width are one feature more.
    case = yield from _next_best(case, ("head_size", "head_size_v"), _HEAD_SIZES)
    return (yield from _next_best(case, ("head_size_v",), (case.spec.head_size, *_HEAD_SIZES)))


def _groups() -> list[tuple[str, ...]]:
    """Every field of a spec but the operation; those that stand alone last."""
    named = {name for names in _TOGETHER for name in names} | {"operation"}
    return [*_TOGETHER, *((item.name,) for item in fields(Spec) if item.name not in named)]


def _next_best(case: Case, names: tuple[str, ...], ladder: tuple[Any, ...]) -> Trials[Case]:
    """The fields' one common value as far up the ladder as it still fails; a size of 0 is not in use."""

    def case_with(value: Any) -> Case:
        return case.with_spec(**dict.fromkeys(names, value))

    held = [getattr(case.spec, name) for name in names]
    if 0 in held:
        return case
    better = [value for value in ladder[: _rank(ladder, held)] if any(value != one for one in held)]
    for value in better:
        if (yield case_with(value)):
            return case_with(value)
    return case


def _rank(ladder: tuple[Any, ...], held: list[Any]) -> int:
    """Where on the ladder the fields stand: at its end where they differ or are not on it."""
    return ladder.index(held[0]) if held[0] in ladder and len(set(held)) == 1 else len(ladder)
