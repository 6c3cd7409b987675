"""What the reference is asked of many runs: once for those of one kernel.

On a GPU an evaluation costs its launches, however many rows it is of.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from .bound.evaluate import Expected, evaluate, evaluate_together
from .bound.together import is_exact, joined, kernel_of
from .building.problem import Problem
from .candidate import NumericContract
from .compare import Ratios, ratios_by_case, ratios_of_caches

PADDED_ELEMENTS = 1 << 20  # of tables, or of biases, that padding may add whatever they take


@dataclass(frozen=True, kw_only=True)
class Question:
    """Is this what should have come of it? What the problem's answer is made of is as it was built."""

    problem: Problem
    contract: NumericContract
    actual: Mapping[str, Tensor]  # the outputs by name
    generic: bool  # whether the roundings of this case are independent


@dataclass(frozen=True)
class Reply:
    """What should have come of it; without `ratios` the two have to be compared, else there is nothing wrong."""

    expected: Expected
    ratios: Ratios | None


def ask_together(questions: Sequence[Question]) -> list[Reply]:
    """The reply to each. The device is waited for once for every kernel that is asked of."""
    groups: dict[Hashable, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(_kind_of(question) or index, []).append(index)
    replies: dict[int, Reply] = {}
    for group in groups.values():
        for part in _without_padding(group, questions):
            replies.update(zip(part, _answered([questions[index] for index in part]), strict=True))
    return [replies[index] for index in range(len(questions))]


def _without_padding(group: Sequence[int], questions: Sequence[Question]) -> Iterator[list[int]]:
    """The group in parts whose tables and biases, made as wide as the widest, take not much more than they do apart."""
    part: list[int] = []
    taken: list[Extent] = []
    for index in group:
        both = [_with(*pair) for pair in zip(taken or [Extent()] * 2, _extents(questions[index]), strict=True)]
        if part and any(extent.is_wasteful for extent in both):
            yield part
            part, both = [], _extents(questions[index])
        part, taken = [*part, index], both
    yield part


@dataclass(frozen=True)
class Extent:
    """What rows of several widths take, in elements, apart and made one rectangle."""

    rows: int = 0
    width: int = 0
    apart: int = 0

    @property
    def is_wasteful(self) -> bool:
        return self.rows * self.width > 2 * self.apart + PADDED_ELEMENTS


def _with(one: Extent, other: Extent) -> Extent:
    return Extent(one.rows + other.rows, max(one.width, other.width), one.apart + other.apart)


def _extents(question: Question) -> list[Extent]:
    """Of the block table and of the query bias; nothing where there is none."""
    arguments = question.problem.arguments
    table = arguments["batch"].block_table if "batch" in arguments else None
    bias = arguments["rules"].query_bias if "rules" in arguments else None
    shapes = [(0, 0) if tensor is None else tensor.shape for tensor in (table, bias)]
    return [Extent(rows, width, rows * width) for rows, width in shapes]


def _kind_of(question: Question) -> Hashable | None:
    """What questions that are answered together have in common: spec, contract, and the form of the outputs.

    None of what is answered alone: pages too far apart to be copied, outputs of another size than was asked for.
    """
    case = question.problem.case
    if case.spec.far_pages or not _fits(question):
        return None
    if is_exact(case.spec):
        return case.spec, question.contract
    forms = frozenset((name, tensor.dtype, tensor.shape[1:]) for name, tensor in question.actual.items())
    return kernel_of(case.spec), question.contract, question.generic, forms


def _fits(question: Question) -> bool:
    """Whether there is a row for each token."""
    case = question.problem.case
    rows = (case.batch.num_tokens,)
    return is_exact(case.spec) or all(found.shape[:1] == rows for found in question.actual.values())


def _answered(group: Sequence[Question]) -> list[Reply]:
    first = group[0]
    if is_exact(first.problem.case.spec):
        return _about_caches(group)
    whole = evaluate_together([each.problem for each in group], first.contract, generic=first.generic)
    num_tokens = [each.problem.case.batch.num_tokens for each in group]
    parts = [whole.rows(stop - rows, stop) for rows, stop in zip(num_tokens, accumulate(num_tokens), strict=True)]
    if not (_fits(first) and set(first.actual) >= set(whole.values)):
        return [Reply(part, None) for part in parts]
    actual = {name: joined([each.actual[name] for each in group]) for name in whole.values}
    return [Reply(*pair) for pair in zip(parts, ratios_by_case(actual, whole, num_tokens), strict=True)]


def _about_caches(group: Sequence[Question]) -> list[Reply]:
    parts = [evaluate(each.problem, each.contract) for each in group]
    pairs = [(each.actual, expected) for each, expected in zip(group, parts, strict=True)]
    return [Reply(*pair) for pair in zip(parts, ratios_of_caches(pairs), strict=True)]
