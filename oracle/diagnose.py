"""What a wrong output looks as if it came from: which key is missing, too many or misweighed, or read elsewhere.

Only for cases that have failed: the rows of one request are computed once more. A hint is no proof: it says
that nothing but this would have to be wrong for the row that is furthest outside of its bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.attention import Answer, attention_rows
from ..reference.casting import per_query_head
from ..reference.mla import mla_attention_decompressed_rows, mla_attention_rows
from ..reference.problem import Batch, Scales
from .bound.evaluate import Expected
from .building.problem import Problem
from .building.recipes.tagged import Tag, decode
from .case import ATTENTION_OPERATIONS
from .suspects import DIRECTIONS, SINK, TILES, Row, Suspect, misweighed, rescaled, suspects
from .verdict import Mismatch, Outcome

__all__ = ["DIRECTIONS", "MISPLACED", "Hint", "diagnose", "with_hints"]

MISPLACED = "wrong place"

_ROWS: dict[str, tuple[Callable[..., Iterator[Answer]], tuple[str, ...]]] = {
    "attention": (attention_rows, ("k_cache", "v_cache")),
    "mla_attention": (mla_attention_rows, ("latent_cache",)),
    "mla_attention_decompressed": (mla_attention_decompressed_rows, ("latent_cache", "w_uk", "w_uv")),
}
_QUERIES = {"attention": ("q",), "mla_attention": ("q_nope", "q_pe"), "mla_attention_decompressed": ("q_nope", "q_pe")}


class Hint(NamedTuple):
    """direction: one of DIRECTIONS, MISPLACED, or "" where nothing explains the error; text: a sentence, or ""."""

    direction: str = ""
    text: str = ""


def with_hints(
    problem: Problem, actual: Mapping[str, Tensor], expected: Expected, mismatches: tuple[Mismatch, ...]
) -> tuple[Mismatch, ...]:
    """The mismatches with what `diagnose` says of each. A device that is full keeps no finding back: then no hint."""
    hinted = []
    for mismatch in mismatches:
        try:
            hint = diagnose(problem, actual, expected, mismatch)
        except torch.OutOfMemoryError:
            hint = Hint()
        hinted.append(replace(mismatch, direction=hint.direction, hint=hint.text))
    return tuple(hinted)


@torch.no_grad()
def diagnose(problem: Problem, actual: Mapping[str, Tensor], expected: Expected, mismatch: Mismatch) -> Hint:
    """What explains the mismatch's worst row: a hint, empty for other operations and for rows that are not finite."""
    case = problem.case
    if case.spec.operation not in ATTENTION_OPERATIONS or mismatch.outcome is not Outcome.DIFFERS:
        return Hint()
    if case.recipe == "cancel" or len(mismatch.index) < 2 or not {"out", "lse"} <= actual.keys():
        return Hint()  # where all values are nearly alike, many keys would explain anything
    token, head = mismatch.index[:2]
    starts = problem.arguments["batch"].cu_seqlens_q.tolist()
    if token >= starts[-1]:
        return Hint()  # a padding row
    request = next(number for number, stop in enumerate(starts[1:]) if token < stop)
    place = _Place(problem, request, token, head)
    row = _row(place, actual, expected)
    if row is None:
        return Hint()
    rows = [row]
    if mismatch.output == "out":  # a wrong lse may have a cause of its own
        rows.append(replace(row, bound=torch.cat((row.bound[:-1], row.bound.new_full((1,), torch.inf)))))
    found = next(filter(None, (suspects(one, case.spec.block_size) for one in rows)), ())
    if not found and (hint := _misplaced(place, actual["out"][token, head], expected.values["out"][token, head])):
        return hint
    if not found and (common := next(filter(None, map(rescaled, rows)), None)):
        direction, factor = common
        lse = "lse agrees with that" if direction == SINK else "lse does not tell of it"
        return Hint(direction, f"all of the row's outputs are {factor:.4g} times what they should be, and {lse}")
    found = found or next(filter(None, map(misweighed, rows)), ())
    return _hint(found, place) if found else Hint()


class _Place(NamedTuple):
    problem: Problem
    request: int
    token: int
    head: int

    @property
    def lengths(self) -> tuple[int, int, int]:
        """(query length, sequence length, the token's position)."""
        batch = self.problem.arguments["batch"]
        start, stop = batch.cu_seqlens_q[self.request : self.request + 2].tolist()
        seq_len = int(batch.seq_lens[self.request])
        return stop - start, seq_len, seq_len - stop + self.token


def _row(place: _Place, actual: Mapping[str, Tensor], expected: Expected) -> Row | None:
    """The row's reference and its errors; None if an output is not finite."""
    answer, number = _answer(place)
    scores, weights = answer.scores, answer.weights
    kv_head, member = divmod(place.head, scores.s.shape[2])
    readable = answer.rows.readable[0]
    y = scores.y if scores.bias is None else scores.y + scores.bias
    y, sink = y[0, kv_head, member, number][readable], weights.sink[kv_head, member]
    highest = torch.cat((y, sink[None])).amax()
    if not highest.isfinite():
        return None
    at = place.token, place.head
    scales = place.problem.arguments.get("scales") or Scales()
    factor = per_query_head(scales.out, actual["out"].shape[1])
    unit = 1.0 if factor is None else factor[place.head].double()
    error = (actual["out"][at].double() - expected.values["out"][at]) * unit
    raised = (actual["lse"][at].double() - expected.values["lse"][at])[None]
    bounds = expected.bounds if expected.statistics is None else expected.statistics.bounds  # the narrower ones
    bound = torch.cat((bounds["out"][at] * unit, bounds["lse"][at][None]))
    bound[-1:] = torch.where(raised.isfinite(), bound[-1:], torch.inf)
    if not bool(error.isfinite().all()):
        return None
    tensors = {
        "keys": answer.rows.keys[0][readable],
        "visible": answer.rows.visible[0, number][readable],
        "mass": torch.exp(y - highest),
        "sink": torch.exp(sink - highest),
        "values": answer.rows.v[0, readable, kv_head],
        "error": torch.cat((error, raised.nan_to_num(0.0, posinf=0.0, neginf=0.0))),
        "bound": bound,
    }
    return Row(**{name: tensor.cpu() for name, tensor in tensors.items()})


def _answer(place: _Place) -> tuple[Answer, int]:
    """The chunk of the request alone that holds the token, and the token's row in it."""
    arguments = place.problem.arguments
    batch, rules = arguments["batch"], arguments["rules"]
    start, stop = batch.cu_seqlens_q[place.request : place.request + 2].tolist()
    one = slice(place.request, place.request + 1)
    alone = Batch(batch.cu_seqlens_q.new_tensor([0, stop - start]), batch.seq_lens[one], batch.block_table[one])
    if rules.query_bias is not None:
        rules = replace(rules, query_bias=rules.query_bias[start:stop])
    operation = place.problem.case.spec.operation
    rows_of, rest = _ROWS[operation]
    tensors: list[Any] = [arguments[name][start:stop] for name in _QUERIES[operation]]
    tensors += [arguments[name] for name in rest]
    for answer in rows_of(*tensors, alone, rules, arguments.get("scales")):
        found = (answer.rows.tokens[0] == place.token - start).nonzero()
        if len(found):
            return answer, int(found[0])
    raise AssertionError(f"token {place.token} is in no chunk of request {place.request}")


def _hint(found: Sequence[Suspect], place: _Place) -> Hint:
    """Of suspects that show alike the one at most edges speaks for all: that is where faults are."""
    suspect = max(found, key=lambda one: len(_classes(one.first, place)) + len(_classes(one.last, place)))
    weights = f"weight {suspect.found:.3g}, expected {suspect.expected:.3g}"
    others = f" ({len(found) - 1} others would show alike)" if len(found) > 1 else ""
    ends = [_key(key, place) for key in sorted({suspect.first, suspect.last})]
    if len(ends) == 1:
        return Hint(suspect.direction, f"{ends[0]} has {weights}{others}")
    count = suspect.last - suspect.first + 1
    return Hint(suspect.direction, f"{' to '.join(ends)}, {count} keys, have {weights}{others}")


def _key(key: int, place: _Place) -> str:
    block_size = place.problem.case.spec.block_size
    page = int(place.problem.arguments["batch"].block_table[place.request, key // block_size])
    return f"key {key} ({'; '.join((f'page {page}, slot {key % block_size}', *_classes(key, place)))})"


def _classes(key: int, place: _Place) -> list[str]:
    """What is special about this key to this row."""
    spec = place.problem.case.spec
    query_len, seq_len, position = place.lengths
    left = None if spec.sliding_window is None else position - spec.sliding_window + 1
    right = None if spec.right_window is None else position + spec.right_window
    tile = max((size for size in TILES if key % size == 0), default=0)
    tile_end = max((size for size in TILES if (key + 1) % size == 0), default=0)
    classes = {
        "first key": key == 0,
        "last key": key == seq_len - 1,
        "the token's own": key == position,
        "one after the token's own": key == position + 1,
        "first of the window": key == left,
        "one before the window": left is not None and key == left - 1,
        "last of the window": key == right,
        "one after the window": right is not None and key == right + 1,
        "first new key": key == seq_len - query_len,
        "last cached key": key == seq_len - query_len - 1,
        "first of its page": key % spec.block_size == 0,
        "last of its page": (key + 1) % spec.block_size == 0,
        f"first of a tile of {tile}": tile > 0 < key,
        f"last of a tile of {tile_end}": tile_end > 0,
    }
    return [words for words, holds in classes.items() if holds]


def _misplaced(place: _Place, found: Tensor, due: Tensor) -> Hint | None:
    """Where the value lies that was found instead, if the case's values say so; else None."""
    case, arguments = place.problem.case, place.problem.arguments
    if case.recipe != "tagged" or case.spec.operation == "mla_attention_decompressed":
        return None
    scales = arguments.get("scales") or Scales()
    heads = arguments["out"].shape[1]
    unit = per_query_head(scales.out, heads)
    value_scale = per_query_head(scales.k if case.spec.is_mla else scales.v, heads)
    tags = []
    for row in (found, due):
        stored = row.double()
        stored = stored if unit is None else stored * unit[place.head]
        stored = stored if value_scale is None else stored / value_scale[place.head]
        tags.append(decode(case, stored.tolist()))
    read, meant = tags
    if read is None or read == meant:
        return None
    expected = f", expected {_of(meant)}" if meant is not None else ""
    return Hint(MISPLACED, f"the value found is that of {_of(read)}{expected}")


def _of(tag: Tag) -> str:
    return f"page {tag.page}, slot {tag.offset}, kv head {tag.head}"
