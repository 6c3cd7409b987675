"""Whether what a graph wrote is right, by the oracle's bound; of large prefills a sample of rows is looked at.

A sample is a problem of its own over the same caches: runs of tokens of a request, as requests that end there. Under
causal rules tokens after them do not matter, so their answer is that of the same rows in the whole batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pageproof.oracle import BatchShape, NumericContract
from pageproof.oracle.bound.evaluate import Expected, evaluate
from pageproof.oracle.building.problem import Problem
from pageproof.oracle.compare import compare
from pageproof.reference.problem import Batch

WHOLE = {"cuda": 2**29, "cpu": 2**22}  # pairs of a row and a key, over all heads, up to which every row is judged
RUN = 16  # neighbouring tokens that are judged together
MOST_RUNS = 64


class Judge:
    """Judges the outputs of one problem, for one implementation after the other."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._rows: Tensor | None = None
        self._part = problem
        if _is_large(problem):
            runs = list(_runs(problem))
            self._rows, self._part = _sample(problem, runs)

    def ask(
        self, outputs: dict[str, Tensor], contract: NumericContract, *, independent: bool = False
    ) -> dict[str, Any]:
        """The verdict on those outputs that are given; others are not looked at.

        By the hard bound; with `independent`, which asks for all outputs, also by what independent roundings allow:
        the hard bound alone does not see a few keys of very many.
        """
        found = outputs if self._rows is None else {name: tensor[self._rows] for name, tensor in outputs.items()}
        expected = _of(evaluate(self._part, contract, with_statistics=independent), found)
        mismatches, ratios = compare(found, expected, self._part)
        figures = dict(ratios)
        verdict = {"agrees": not mismatches, "error_over_bound": max(figures.pop(name) for name in found)}
        if figures:
            verdict["statistics"] = figures
        if mismatches:
            worst = mismatches[0]
            words = f"{worst.output} {worst.outcome.value}: {worst.count} of {worst.total}, {worst.where}"
            verdict["disagreement"] = f"{words} ({worst.check})" if worst.check else words
        if self._rows is not None:
            verdict |= {"rows_judged": len(self._rows), "rows": self._problem.case.batch.num_tokens}
        return verdict


def _of(expected: Expected, outputs: dict[str, Tensor]) -> Expected:
    """What is expected of these outputs alone."""
    parts = {
        name: {key: part[key] for key in outputs if key in part}
        for name, part in (("values", expected.values), ("bounds", expected.bounds), ("dtypes", expected.dtypes))
    }
    return replace(expected, **parts)


def _is_large(problem: Problem) -> bool:
    case = problem.case
    if "lse" not in problem.outputs:
        return False
    pairs = sum(new * keys for new, keys in zip(case.batch.query_lens, case.batch.seq_lens, strict=True))
    return pairs * case.spec.num_query_heads > WHOLE[problem.outputs["lse"].device.type]


@dataclass(frozen=True)
class _Run:
    request: int
    first: int  # token within the request
    stop: int


def _runs(problem: Problem) -> Iterator[_Run]:
    """The first and the last tokens of every request, and random ones between; all of short requests."""
    shape = problem.case.batch
    live = [request for request, new in enumerate(shape.query_lens) if new > 0]
    drawn = random.Random(problem.case.seed)
    if len(live) > MOST_RUNS:
        live = sorted({live[0], live[-1], *drawn.sample(live, MOST_RUNS - 2)})
    each = max(2, MOST_RUNS // len(live))
    for request in live:
        count = -(-shape.query_lens[request] // RUN)
        inner = range(1, count - 1)
        picked = {0, count - 1, *drawn.sample(inner, min(len(inner), each - 2))}
        for number in sorted(picked):
            yield _Run(request, number * RUN, min(number * RUN + RUN, shape.query_lens[request]))


def _sample(problem: Problem, runs: list[_Run]) -> tuple[Tensor, Problem]:
    """The rows of the runs, and the problem that they are."""
    case, arguments = problem.case, problem.arguments
    if not case.spec.causal or arguments["rules"].query_bias is not None:
        raise ValueError("a sample of rows: expected causal rules without a query bias")
    starts = [sum(case.batch.query_lens[:request]) for request in range(case.batch.num_requests)]
    device = arguments["batch"].device
    rows = torch.cat([torch.arange(run.first, run.stop) + starts[run.request] for run in runs]).to(device)
    query_lens = tuple(run.stop - run.first for run in runs)
    seq_lens = tuple(
        case.batch.seq_lens[run.request] - case.batch.query_lens[run.request] + run.stop for run in runs
    )  # fmt: skip
    owners = torch.tensor([run.request for run in runs], device=device)
    batch = Batch(
        torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32, device=device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        arguments["batch"].block_table[owners],
    )
    of_rows = {name: arguments[name][rows] for name in ("q", "q_nope", "q_pe", "out", "lse") if name in arguments}
    part = replace(
        problem,
        case=replace(case, batch=BatchShape(query_lens=query_lens, seq_lens=seq_lens)),
        arguments={**arguments, **of_rows, "batch": batch},
        outputs={name: of_rows[name] for name in problem.outputs},
    )
    return rows, part
