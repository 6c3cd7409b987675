"""The controller of a campaign: hands groups to workers, adds up what they report, replaces those that die.

It draws nothing, judges nothing and never initialises CUDA.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from ..environment import Unusable
from ..verdict import Outcome, Verdict
from .findings import Failure
from .lengths import sizes_for
from .messages import Assignment, Planned, PlanRequest, Ready, Refused, Report, Setup
from .pairs import MODEL, PAIRS, TRIPLES, Values, describe, feasible
from .pool import START_SECONDS, Handle, Pool
from .sampler import Group, made_up_group
from .summary import Options, Summary

TICK_SECONDS = 0.25
DEATHS_PER_GROUP = 3  # of workers; after these the rest of a group is left
FRUITLESS_DEATHS = 3  # outside of any case and in a row; after these the campaign gives up


class Controller:
    """One campaign, as it goes on."""

    def __init__(self, options: Options, summary: Summary, setups: list[Setup]) -> None:
        self.options, self.summary = options, summary
        self.sizes = sizes_for(summary.device)
        self.started = time.monotonic()
        self.stop_at = float("inf") if options.given else self.started + options.seconds
        self.left = options.cases  # cases that may still be handed out; None: any number
        self.groups: Iterator[Group] | None = None  # None until there is a plan
        if options.given:
            self.groups = iter([Group(seed=0, index=0, given=options.given, count=len(options.given))])
        self.resumed: deque[Assignment] = deque()  # what dead workers have left
        self.lost_pairs: deque[Values] | None = None  # after the rows; None: not known yet
        self.planner: Handle | None = None
        self.fruitless = 0
        self.pool = Pool(setups)

    def run(self, watch: Callable[[Summary], None]) -> None:
        """Until the time, the cases or the groups are used up, and whoever is at work has answered."""
        try:
            while self._hand_out():
                for handle in self.pool.waiting(TICK_SECONDS):
                    self._hear(handle)
                self._end_overdue()
                self.summary.seconds = time.monotonic() - self.started
                watch(self.summary)
        except KeyboardInterrupt:
            self.summary.interrupted = True
        except Unusable as error:
            if not self.summary.tally.cases:
                raise
            self.summary.broken = str(error)  # what was found until then is not thrown away
        finally:
            self.summary.seconds = time.monotonic() - self.started
            self.pool.close()

    def _hand_out(self) -> bool:
        """Give every idle worker a task; whether there is anything to wait for."""
        late = time.monotonic() >= self.stop_at
        for handle in self.pool.handles:
            if late or not handle.idle or handle is self.planner:
                continue
            if self.groups is None:
                if self.planner is None:
                    self.planner = handle
                    handle.send(PlanRequest(seed=self.options.seed))
                continue
            task = self.resumed.popleft() if self.resumed else self._next()
            if task is not None:
                handle.begin(task)
        at_work = any(handle.task is not None for handle in self.pool.handles)
        return at_work or (not late and (self.groups is None or self.left != 0 or bool(self.resumed)))

    def _next(self) -> Assignment | None:
        if self.left == 0 or self.groups is None:
            return None
        group = self._made_up() or next(self.groups, None)
        if group is None:
            self.left = 0
            return None
        if self.left is not None:
            group = replace(group, count=min(group.count, self.left))
            self.left -= group.count
        if group.row is None and self.summary.rows_done is None:
            self.summary.rows_done = time.monotonic() - self.started, self.summary.tally.cases
        return Assignment(group=group, banned=self.summary.banned, stop_at=self.stop_at)

    def _made_up(self) -> Group | None:
        """Once all rows are judged, another for a pair that no judged case had: its cases were declined or left."""
        if self.summary.rows_done is None or any(handle.task and handle.task.group.row for handle in self.pool.handles):
            return None
        if self.lost_pairs is None:
            lost = [pair for pair in self.summary.pairs_missing if not pair & self.summary.banned]
            self.lost_pairs = deque(sorted(lost, key=describe))
        while self.lost_pairs:
            pair = self.lost_pairs.popleft()
            if self.summary.tally.pairs.missing(MODEL, [pair]):
                self.summary.rows += 1
                return made_up_group(self.options.seed, self.summary.rows, pair, self.summary.banned, self.sizes)
        return None

    def _hear(self, handle: Handle) -> None:
        try:
            message = handle.connection.recv()
        except (EOFError, OSError):
            self._bury(handle)
            return
        if isinstance(message, Ready):
            handle.ready = True
            self.summary.notes = self.summary.notes or message.notes
            self.summary.candidate = message.candidate
        elif isinstance(message, Refused):
            raise Unusable(message.reason)
        elif isinstance(message, Planned):
            self.planner = None
            self._follow(message)
        elif isinstance(message, Report):
            self._add(handle, message)

    def _follow(self, message: Planned) -> None:
        plan = message.plan
        self.summary.rows, self.summary.banned = len(plan.rows), plan.banned
        self.summary.feasible = frozenset(feasible(MODEL, PAIRS, plan.rows))
        if self.options.nightly:
            self.summary.feasible_triples = frozenset(feasible(MODEL, TRIPLES, plan.rows))
        self.groups = plan.groups(self.options.seed, self.sizes)

    def _add(self, handle: Handle, report: Report) -> None:
        self.fruitless = 0
        handle.position = report.position
        self.summary.tally.merge(report.tally)
        self.summary.verdicts.extend(report.verdicts)
        for failure in report.failures:
            self.summary.findings.add(failure)
        for signature, times in report.repeats.items():
            self.summary.findings.repeat(signature, times)
        if report.done:
            handle.task = None
        elif report.lost:
            self._resume(handle, frozenset())
            self.pool.replace(handle)

    def _end_overdue(self) -> None:
        for handle in self.pool.handles:
            if handle.ready and handle.seconds_at_work > self.options.case_seconds:
                handle.overdue = True
                handle.kill()  # what it still had to say is heard first, then the end of its pipe
            elif not handle.ready and handle.seconds_at_work > START_SECONDS:
                raise Unusable(f"a worker process was not ready within {START_SECONDS:g} s")

    def _bury(self, handle: Handle) -> None:
        """A worker has died: the case it was at is a finding, the rest of its group goes to another."""
        death, case = handle.death(), handle.case_at_work
        if case is None:
            self.fruitless += 1
            if self.fruitless >= FRUITLESS_DEATHS:
                raise Unusable(f"worker processes keep ending outside of any case: {death}")
            self._resume(handle, frozenset())
        else:
            outcome = Outcome.TIMED_OUT if handle.overdue else Outcome.CRASHED
            name, target = self.summary.candidate, self.options.target
            self._count_dead(Verdict(outcome=outcome, case=case, candidate=name, target=target, reason=death))
            self._resume(handle, frozenset({int(handle.clock[1])}))
        if handle is self.planner:
            self.planner = None
        self.pool.replace(handle)

    def _count_dead(self, verdict: Verdict) -> None:
        self.summary.tally.add(verdict, MODEL, triples=self.options.nightly)
        self.summary.findings.add(Failure.of(verdict))
        if self.options.given:
            self.summary.verdicts.append(verdict)

    def _resume(self, handle: Handle, skip: frozenset[int]) -> None:
        task = handle.task
        if task is None:
            return
        rest = replace(task, start=handle.position, skip=task.skip | skip, deaths=task.deaths + 1)
        if rest.deaths >= DEATHS_PER_GROUP and not self.options.given:
            self.summary.abandoned += 1
        else:
            self.resumed.append(rest)
