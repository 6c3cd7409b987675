"""How many cases the oracle needs to see a fault: the sequence of `fuzz`, judged one by one until one fails."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection

import torch

from ..campaign.lengths import sizes_for
from ..campaign.offers import make_plan
from ..campaign.pool import START_SECONDS, STOP_SECONDS
from ..campaign.summary import Options
from ..candidate import Candidate
from ..case import Case
from ..environment import Unusable
from ..judging import judge
from ..verdict import Outcome
from .loading import candidate

CASE_SECONDS = Options.case_seconds  # as for `fuzz`


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
    """How a hunt ended, in a process of its own: a fault may take its process down or never return, which shows it too.

    Unusable if it ended, or did not get there in time, before its first case.
    """
    return watch(name, report, (name, seed, limit, device))


def watch(name: str, hunter: Callable[..., None], arguments: tuple[object, ...], seconds: float = CASE_SECONDS) -> Step:
    """Start `hunter(sender, *arguments)` and hear its steps; no case may take longer than `seconds`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=hunter, args=(sender, *arguments), daemon=True)
    process.start()
    sender.close()
    try:
        step, silence = _last_step(receiver, seconds)
        if silence is Outcome.CRASHED:
            process.join(STOP_SECONDS)  # for its exit status
    finally:
        process.kill()
        process.join()
    if step is None:
        why = f"exit status {process.exitcode}" if silence is Outcome.CRASHED else f"not within {START_SECONDS:g} s"
        raise Unusable(f"the hunt for {name} ended before its first case ({why})")
    return step if step.is_over else Step(step.case, silence.value, is_over=True)


def _last_step(receiver: Connection, seconds: float) -> tuple[Step | None, Outcome]:
    """The last one that came, and if that was not the end of the hunt, what the silence after it means."""
    step = None
    while step is None or not step.is_over:
        if not receiver.poll(START_SECONDS if step is None else seconds):
            return step, Outcome.TIMED_OUT
        try:
            step = receiver.recv()
        except EOFError:
            return step, Outcome.CRASHED
    return step, Outcome.CRASHED


def report(sender: Connection, name: str, seed: int, limit: int, device: str) -> None:
    """What the process of a hunt does."""
    torch.set_num_threads(1)
    for step in hunt(name, seed=seed, limit=limit, device=device):
        sender.send(step)


def cases(target: Candidate, seed: int, device: str) -> Iterator[Case]:
    """The cases that `fuzz --modes eager --seed` gives one worker."""
    sizes = sizes_for(device)
    plan = make_plan(target, seed, sizes)
    for group in plan.groups(seed, sizes):
        yield from group.cases(plan.model, sizes)
