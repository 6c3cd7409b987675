"""How many cases the oracle needs to see a fault: the sequence of `fuzz`, judged one by one until one fails."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from multiprocessing.connection import Connection

import torch

from ..campaign.lengths import COMPILED, INTERPRETED, Sizes
from ..campaign.offers import make_plan
from ..campaign.pairs import Model
from ..campaign.sampler import random_group, row_group
from ..candidate import Candidate
from ..case import Case
from ..judging import judge
from .loading import candidate


@dataclass(frozen=True)
class Step:
    """What a hunt says: which case it is at, and once it is over, how the fault showed or that it did not."""

    case: int
    outcome: str = ""  # "" while the case is being judged
    is_over: bool = False


def hunt(name: str, *, seed: int, limit: int, device: str) -> Iterator[Step]:
    """Each case up to the first failure, `limit` of them at most."""
    mutant = candidate(name)
    for number, case in enumerate(islice(cases(mutant, seed, device), limit), start=1):
        yield Step(number)
        verdict = judge(case, mutant, device)
        if verdict.failed:
            yield Step(number, verdict.outcome.value, is_over=True)
            return
    yield Step(limit, is_over=True)


def hunt_apart(name: str, *, seed: int, limit: int, device: str) -> Step:
    """How a hunt ended, in a process of its own: a fault may take its process down, which shows it too.

    A RuntimeError if the process ended before its first case.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, name, seed, limit, device))
    process.start()
    sender.close()
    step = None
    with contextlib.suppress(EOFError):
        while step is None or not step.is_over:
            step = receiver.recv()
    process.join()
    if step is None:
        raise RuntimeError(f"the hunt for {name} ended before its first case (exit status {process.exitcode})")
    return step if step.is_over else Step(step.case, "crashed", is_over=True)


def _report(sender: Connection, name: str, seed: int, limit: int, device: str) -> None:
    torch.set_num_threads(1)
    for step in hunt(name, seed=seed, limit=limit, device=device):
        sender.send(step)


def cases(target: Candidate, seed: int, device: str) -> Iterator[Case]:
    """The cases that `fuzz --seed` gives one worker: the covering array's rows, then random groups without end."""
    sizes: Sizes = COMPILED if device == "cuda" else INTERPRETED
    plan = make_plan(target, seed, sizes)
    model = Model(extra=True, banned=plan.banned)
    rows = (row_group(seed, index, row, sizes) for index, row in enumerate(plan.rows))
    for group in chain(rows, (random_group(seed, index, sizes) for index in count())):
        yield from group.cases(model, sizes)
