"""Errors measured by their expected size: the root mean square of error / sigma, of each row and of a whole case.

A wrong weight moves all elements of a row a little, each inside of its bound; together they show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .bound.statistics import CASE_ELEMENTS, CASE_ROWS, CASE_Z, ROW_ELEMENTS, ROW_Z, Statistics
from .formats import name_of
from .locate import locate
from .verdict import Mismatch, Outcome

if TYPE_CHECKING:
    from .building.problem import Problem

LIMITS = {"row z": ROW_Z, "case z": CASE_Z}


@dataclass(frozen=True, kw_only=True)
class ZScores:
    """float64, on the device of the output; 0 where there are too few errors to say anything."""

    rows: Tensor  # [num_tokens, num_query_heads]
    case: Tensor  # [1]: of all counted rows together


def z_scores(error: Tensor, statistics: Statistics) -> ZScores:
    """Of out's errors [num_tokens, num_query_heads, head_size_v], as far as rows are counted.

    What is not finite, the hard bound has found already.
    """
    squares = (error / statistics.sigma).square().mean(dim=-1)
    squares = torch.where(statistics.counted, squares, 0.0).nan_to_num(nan=0.0, posinf=0.0)
    width = error.shape[-1]
    rows = squares.sqrt() if width >= ROW_ELEMENTS else torch.zeros_like(squares)
    num_rows = statistics.counted.sum()
    enough = num_rows >= max(CASE_ROWS, math.ceil(CASE_ELEMENTS / width))
    case = torch.where(enough, (squares.sum() / num_rows).sqrt(), 0.0)
    return ZScores(rows=rows, case=case[None])


def describe(check: str, scores: Tensor, actual: Tensor, problem: Problem) -> Mismatch:
    """The mismatch of out [num_tokens, num_query_heads, head_size_v] whose z, of rows or of the case, is too large."""
    limit = LIMITS[check]
    worst = int(scores.argmax())
    index = () if check == "case z" else divmod(worst, scores.shape[1])
    return Mismatch(
        output="out",
        outcome=Outcome.DIFFERS,
        check=check,
        count=int((scores > limit).sum()),
        total=scores.numel(),
        index=index,
        actual=float(scores.flatten()[worst]),
        expected=1.0,
        bound=limit,
        where=locate(problem, "out", index) if index else "all rows together",
        dtype=name_of(actual.dtype),
    )
