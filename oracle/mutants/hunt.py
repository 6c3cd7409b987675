"""How many cases the oracle needs to see a fault: the sequence of `fuzz`, judged one by one until one fails."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count, islice

from ..campaign.lengths import COMPILED, INTERPRETED, Sizes
from ..campaign.offers import make_plan
from ..campaign.pairs import Model
from ..campaign.sampler import random_group, row_group
from ..candidate import Candidate
from ..case import Case
from ..judging import judge
from ..verdict import Verdict
from .loading import candidate


def hunt(name: str, *, seed: int, limit: int, device: str = "cpu") -> tuple[int, Verdict] | None:
    """(cases judged, the first failing verdict), or None if none of `limit` cases shows the mutant's fault."""
    mutant = candidate(name)
    for number, case in enumerate(islice(cases(mutant, seed, device), limit), start=1):
        verdict = judge(case, mutant, device)
        if verdict.failed:
            return number, verdict
    return None


def cases(target: Candidate, seed: int, device: str) -> Iterator[Case]:
    """The cases that `fuzz --seed` gives one worker: the covering array's rows, then random groups without end."""
    sizes: Sizes = COMPILED if device == "cuda" else INTERPRETED
    plan = make_plan(target, seed, sizes)
    model = Model(extra=True, banned=plan.banned)
    rows = (row_group(seed, index, row, sizes) for index, row in enumerate(plan.rows))
    for group in chain(rows, (random_group(seed, index, sizes) for index in count())):
        yield from group.cases(model, sizes)
