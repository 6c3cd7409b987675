"""Errors measured by their expected size: the root mean square of error / sigma, of each row and of a whole case.

A wrong weight moves all elements of a row a little, each inside of its bound; together they show.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .bound import statistics as allowed
from .bound.statistics import Statistics
from .formats import name_of
from .locate import locate
from .verdict import Mismatch, Outcome

if TYPE_CHECKING:
    from .building.problem import Problem

SUB_GAUSSIAN, ROW_Z, CASE_Z = "sub-gaussian", "row z", "case z"
LIMITS = {SUB_GAUSSIAN: 1.0, ROW_Z: allowed.ROW_Z, CASE_Z: allowed.CASE_Z}


def z_scores(error: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """(z of each row [num_tokens, num_query_heads], z of each case [num_cases]) of out's errors; float64.

    0 for rows that are not counted, and where there are too few errors to say anything. What is not finite, the
    hard bound has found already.
    """
    squares = (error / statistics.sigma).square().mean(dim=-1)
    squares = squares.masked_fill_(~statistics.counted, 0.0).nan_to_num_(nan=0.0, posinf=0.0)
    width = error.shape[-1]
    rows = squares.sqrt() if width >= allowed.ROW_ELEMENTS else torch.zeros_like(squares)
    num_rows, total = _by_case(statistics.counted, statistics), _by_case(squares, statistics)
    enough = num_rows >= max(allowed.CASE_ROWS, math.ceil(allowed.CASE_ELEMENTS / width))
    return rows, torch.where(enough, (total / num_rows).sqrt(), 0.0)


def _by_case(values: Tensor, statistics: Statistics) -> Tensor:
    """[num_cases]: the sum over the rows of each case."""
    return torch.stack([part.sum() for part in values.split(statistics.cases or len(values))])


def describe(check: str, scores: Tensor, actual: Tensor, problem: Problem) -> Mismatch:
    """The mismatch of out [num_tokens, num_query_heads, head_size_v] whose z, of rows or of the case, is too large."""
    limit = LIMITS[check]
    worst = int(scores.argmax())
    index = () if check == CASE_Z else divmod(worst, scores.shape[1])
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
