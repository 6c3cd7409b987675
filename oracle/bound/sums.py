"""What a bound needs to know of a row's keys: sums over them, chunk by chunk, and one table of them for a whole case.

This is the part of a bound that handles every pair of a row and a key. All that is left (`rows.py`) works on rows
alone, once per case: on a GPU a bound costs its launches, not its arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...reference.attention import Answer, weigh
from ...reference.problem import Rules
from ..candidate import NumericContract
from .formats import EXACT, FLUSH, TF32, Format, format_of
from .scores import Operands, score_errors

_SCALARS = (
    "lse",
    "maximum",
    "denominator",
    "sink",
    "num_keys",
    "span",
    "gained",
    "least",
    "largest",
    "effective_keys",
)

SATURATED = 2.0**-8  # scores this near to the softcap give weights that differ by less than half a unit of bfloat16


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """Float64 by token and query head: [num_tokens, num_query_heads], and with head_size_v behind where a v is in it.

    P are the weights of the keys, r how far their exponents may be off. Sinks are not in these sums. Rows that need
    no arithmetic (nothing visible, a sink of +inf) hold numbers that mean nothing, but for out, lse and num_keys.
    """

    out: Tensor  # [..., Dv]
    values: Tensor  # [..., Dv]: W = sum P |v|
    moved: Tensor  # [..., Dv]: sum P (e^r - 1) |v|
    lse: Tensor
    maximum: Tensor  # M: over the visible scores and the sink
    denominator: Tensor  # L: sum of exp(s - M), sink included
    sink: Tensor  # its logit; -inf without one
    num_keys: Tensor  # n: visible keys
    span: Tensor  # from the first visible key to the last
    gained: Tensor  # sum P (e^r - 1)
    least: Tensor  # sum P e^-r
    largest: Tensor  # max |v| of the request
    effective_keys: Tensor  # so many equal weights, rounded apart, would have the same roundings; see `_effective_keys`
    lost: Tensor | None  # [..., Dv]: sum |v| over the visible keys, where a cast P may underflow by more than float32
    wrong: Tensor | None  # [..., Dv]: sum P e^r * (error of v), where v is computed
    squares: Tensor | None  # [..., Dv]: sum P^2 v^2, where independent roundings are asked for


class Collector:
    """Makes the `RowSums` of a case from the chunks of its answer."""

    def __init__(self, out: Tensor, contract: NumericContract, *, with_squares: bool, with_wrong: bool) -> None:
        """`out`: the output [num_tokens, num_query_heads, head_size_v] of the case."""
        num_tokens, num_query_heads, self._width = out.shape
        self._contract = contract
        loses = probability_format(contract).underflow > FLUSH
        optional = {"lost": loses, "wrong": with_wrong, "squares": with_squares}
        self._vectors = ["out", "values", "moved", *(name for name, wanted in optional.items() if wanted)]
        columns = len(self._vectors) * self._width + len(_SCALARS)
        shape = num_tokens + 1, num_query_heads, columns  # the last row is waste: padding inside of a chunk
        self._table = torch.zeros(shape, dtype=torch.float64, device=out.device)
        self._table[..., -len(_SCALARS)] = -torch.inf  # lse, of rows that belong to no request

    def add(self, answer: Answer, rules: Rules, operands: Operands) -> None:
        """One chunk: every row of it once."""
        scores, weights, rows = answer.scores, answer.weights, answer.rows
        p, v = weights.p, rows.v.abs()
        num_keys = rows.visible.sum(dim=2).double()[:, None, None]
        span = num_keys if rows.query_bias is None else _span(rows.visible)
        errors = score_errors(answer, rules, self._contract, operands, span)
        logarithms = scores.s - weights.lse[..., None]
        greater = torch.exp(logarithms + errors)
        moved = greater - p
        vectors = {"out": answer.out, "values": weigh(p, v), "moved": weigh(moved, v)}
        if "lost" in self._vectors:
            visible = rows.visible[:, None, None].double()
            vectors["lost"] = weigh(visible.expand(p.shape), v)
        if operands.value_error is not None:
            vectors["wrong"] = weigh(greater, operands.value_error)
        scalars = {
            "lse": weights.lse,
            "maximum": weights.maximum,
            "denominator": weights.denominator,
            "sink": weights.sink[..., None],
            "num_keys": num_keys,
            "span": span,
            "gained": moved.sum(dim=-1),
            "least": torch.exp(logarithms - errors).sum(dim=-1),
            "largest": v.amax(dim=(1, 2, 3))[:, None, None, None],
            "effective_keys": num_keys,
        }
        if "squares" in self._vectors:
            squares = p.square()
            vectors["squares"] = weigh(squares, rows.v.square())
            scalars["effective_keys"] = _effective_keys(squares, scores.y, rows.softcap)
        parts = [vectors[name] for name in self._vectors]
        parts += [scalars[name].expand(weights.lse.shape)[..., None] for name in _SCALARS]
        # By token, all heads in one dimension: more than four, and torch copies the parts one by one.
        columns = torch.cat([part.movedim(3, 1).flatten(2, 3) for part in parts], dim=-1)
        self._table[rows.tokens] = columns

    def finish(self) -> RowSums:
        """All rows of the case; those of no request are empty."""
        sizes = [self._width] * len(self._vectors) + [1] * len(_SCALARS)
        parts = self._table[:-1].split(sizes, dim=-1)
        found: dict[str, Tensor | None] = dict.fromkeys(("lost", "wrong", "squares"))
        found.update(zip(self._vectors, parts, strict=False))
        found.update((name, part[..., 0]) for name, part in zip(_SCALARS, parts[len(self._vectors) :], strict=True))
        return RowSums(**found)  # type: ignore[arg-type]


def _effective_keys(squares: Tensor, y: Tensor, softcap: float | Tensor | None) -> Tensor:
    """(sum P^2)^2 / sum P^4 of a row's weights; those that a softcap makes equal are rounded alike, and count as one.

    At either end: with a softcap of 0.5 the lowest weight is a third of the highest.
    """
    total, fourth = squares.sum(dim=-1), squares.square()
    if softcap is None:
        return total.square() / fourth.sum(dim=-1)
    ends = y > softcap - SATURATED, y < SATURATED - softcap
    together = [squares.masked_fill(~alike, 0.0).sum(dim=-1).square() for alike in ends]
    apart = fourth.masked_fill_(ends[0] | ends[1], 0.0).sum(dim=-1)
    return total.square() / (apart + together[0] + together[1])


def _span(visible: Tensor) -> Tensor:
    """[G, 1, 1, T]: from the first visible key to the last, of rows in which a query bias may hide some between."""
    columns = torch.arange(1, visible.shape[2] + 1, device=visible.device)
    numbered = visible * columns
    last = numbered.amax(dim=2)
    first = numbered.masked_fill(~visible, visible.shape[2] + 1).amin(dim=2)
    return (last - first + 1).clamp(min=0).double()[:, None, None]


def probability_format(contract: NumericContract) -> Format:
    """What P goes through before P @ V; float32 is what exp already gave, and costs nothing."""
    if contract.p_dtype == "float32":
        return Format(TF32, 0.0, float("inf")) if contract.tf32 else EXACT
    return format_of(contract.p_dtype)
