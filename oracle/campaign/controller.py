"""The controller of a campaign: hands groups and trials to workers, adds up what they report, replaces those that die.

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
from .messages import Assignment, Planned, PlanRequest, Ready, Refused, Report, Setup, Trial, Tried
from .offers import Plan
from .pairs import MODEL, PAIRS, TRIPLES, Values, describe, feasible
from .pool import START_SECONDS, Handle, Pool
from .sampler import Group, made_up_group
from .shrinker import TRIAL_SECONDS, Shrinker
from .summary import Options, Summary

TICK_SECONDS = 0.25
DEATHS_PER_GROUP = 3  # of workers; after these the rest of a group is left
UNEXPLAINED = "(in this case, or in one that was issued before it and still ran; judged one by one none of them failed)"
FRUITLESS_DEATHS = 3  # outside of any case and in a row; after these the campaign gives up
PAST_SHARE = 0.5  # of the time, at most, for the cases of earlier campaigns


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
        past_until = self.started + PAST_SHARE * options.seconds
        self.resumed = deque(  # what dead workers have left; at first, what earlier campaigns have
            Assignment(group=Group(seed=0, index=0, given=(case,)), stop_at=past_until) for case in summary.past.files
        )
        self.lost_pairs: deque[Values] | None = None  # after the rows; None: not known yet
        self.shrinker = Shrinker(summary.findings, options.shrink_seconds)
        self.planner: Handle | None = None
        self.fruitless = 0
        self.pool = Pool(setups)

    def run(self, watch: Callable[[Summary], None]) -> None:
        """Until the time, the cases or the groups are used up, whoever is at work has answered, and all is shrunk."""
        try:
            while self._hand_out():
                for handle in self.pool.waiting(TICK_SECONDS):
                    self._hear(handle)
                self._end_overdue()
                self._look_at_the_time()
                watch(self.summary)
        except KeyboardInterrupt:
            self.summary.interrupted = True
        except Unusable as error:
            if not self.summary.tally.cases:
                raise
            self.summary.broken = str(error)  # what was found until then is not thrown away
        finally:
            self._look_at_the_time()
            for task in self.resumed:  # for which there was no time
                self._say_unexplained(task)
            self.pool.close()
            self.shrinker.close()

    def _look_at_the_time(self) -> None:
        if self.shrinker.until is None:  # the time for shrinking is no part of any rate
            self.summary.seconds = time.monotonic() - self.started
        self.summary.trials = self.shrinker.trials

    def _hand_out(self) -> bool:
        """Give every idle worker a task; whether there is anything to wait for."""
        for handle in self.pool.handles:
            if handle.idle and handle is not self.planner:
                task = self._task_for(handle)
                if task is not None:
                    handle.begin(task)
        judging = any(isinstance(handle.task, Assignment) for handle in self.pool.handles)
        if judging or self._may_draw():
            return True
        self.shrinker.all_are_drawn()
        return not self.shrinker.over

    def _may_draw(self) -> bool:
        late = time.monotonic() >= self.stop_at
        return not late and (self.groups is None or self.left != 0 or bool(self.resumed))

    def _task_for(self, handle: Handle) -> Assignment | Trial | None:
        """What an idle worker does next; the plan it is asked for at once."""
        trial = self.shrinker.next_trial(len(self.pool.handles))
        if trial is not None or not self._may_draw():
            return trial
        if self.groups is None and self.planner is None:
            self.planner = handle
            handle.send(PlanRequest(seed=self.options.seed))
            return None
        return self.resumed.popleft() if self.resumed else self._next()

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
        return Assignment(group=group, banned=self.summary.no_rows, stop_at=self.stop_at)

    def _made_up(self) -> Group | None:
        """Once all rows are judged, another for a pair that no judged case had: its cases were declined or left."""
        if self.summary.rows_done is None or any(
            isinstance(handle.task, Assignment) and handle.task.group.row for handle in self.pool.handles
        ):
            return None
        if self.lost_pairs is None:
            lost = [pair for pair in self.summary.pairs_missing if not pair & self.summary.banned]
            self.lost_pairs = deque(sorted(lost, key=describe))
        while self.lost_pairs:
            pair = self.lost_pairs.popleft()
            if self.summary.tally.pairs.missing(MODEL, [pair]):
                index = self.summary.rows + 1
                group = made_up_group(self.options.seed, index, pair, self.summary.no_rows, self.sizes)
                if group is not None:  # values that go together only with a third, which is declined, have no row
                    self.summary.rows = index
                    return group
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
        elif isinstance(message, Tried):
            self._tell(handle, message.verdict)
            if message.lost:
                self.pool.replace(handle)

    def _follow(self, message: Planned) -> None:
        plan = message.plan
        self.summary.rows, self.summary.left_out = len(plan.rows), plan.left_out
        self.summary.banned = plan.banned - plan.left_out
        self.summary.feasible = self._to_cover(PAIRS, plan)
        if self.options.nightly:
            self.summary.feasible_triples = self._to_cover(TRIPLES, plan)
        self.groups = plan.groups(self.options.seed, self.sizes)

    def _to_cover(self, strength: int, plan: Plan) -> frozenset[Values]:
        return frozenset(values for values in feasible(MODEL, strength, plan.rows) if not values & plan.left_out)

    def _add(self, handle: Handle, report: Report) -> None:
        self.fruitless = 0
        handle.position, handle.ahead = report.position, report.ahead
        self.summary.tally.merge(report.tally)
        for verdict in report.verdicts:
            self._note_given(verdict)
        for failure in report.failures:
            self.summary.findings.add(failure)
        for signature, times in report.repeats.items():
            self.summary.findings.repeat(signature, times)
        seen = {failure.symptom.outcome for failure in report.failures} | {each.outcome for each, _ in report.repeats}
        if isinstance(handle.task, Assignment) and seen & {Outcome.CRASHED, Outcome.TIMED_OUT}:
            handle.task = replace(handle.task, suspect=None)  # a death is explained
        if report.done:
            self._say_unexplained(handle.task)
            handle.task = None
        elif report.lost:
            self._resume(handle, frozenset(), report.suspect)
            self.pool.replace(handle)

    def _tell(self, handle: Handle, verdict: Verdict) -> None:
        """Whether a finding's smaller case fails like the finding."""
        self.fruitless = 0
        if isinstance(handle.task, Trial):
            self.shrinker.tell(handle.task, verdict)
        handle.task = None

    def _note_given(self, verdict: Verdict) -> None:
        """Of a case that was given, or comes from an earlier campaign."""
        past, findings = self.summary.past, self.summary.findings
        if self.options.given:
            self.summary.verdicts.append(verdict)
        else:
            past.note(verdict)
        if verdict.failed:
            path = past.files.get(verdict.case)
            if path is not None and path.parent == findings.directory:
                findings.keep(Failure.of(verdict), path)
            else:
                findings.add(Failure.of(verdict))

    def _end_overdue(self) -> None:
        for handle in self.pool.handles:
            limit = self.options.case_seconds
            if isinstance(handle.task, Trial):
                limit = min(limit, TRIAL_SECONDS)
            if handle.ready and handle.seconds_at_work > limit:
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
            verdict = Verdict(outcome=outcome, case=case, candidate=name, target=target, reason=death)
            if handle.is_sure:
                self._count_dead(handle, verdict)
            else:
                self._resume(handle, frozenset(), verdict)
        if handle is self.planner:
            self.planner = None
        self.pool.replace(handle)

    def _count_dead(self, handle: Handle, verdict: Verdict) -> None:
        if isinstance(handle.task, Trial):
            self._tell(handle, verdict)
            return
        self.summary.tally.add(verdict, MODEL, triples=self.options.nightly)
        if handle.task is not None and handle.task.group.given:
            self._note_given(verdict)
        else:
            self.summary.findings.add(Failure.of(verdict))
        self._resume(handle, frozenset({int(handle.clock[1])}))

    def _say_unexplained(self, task: Assignment | Trial | None) -> None:
        """A worker died over several cases of the group, and one by one none of them failed."""
        if isinstance(task, Assignment) and task.suspect is not None:
            verdict = replace(task.suspect, reason=f"{task.suspect.reason}\n{UNEXPLAINED}")
            self.summary.tally.add(verdict, MODEL, triples=self.options.nightly)
            self.summary.findings.add(Failure.of(verdict))

    def _resume(self, handle: Handle, skip: frozenset[int], suspect: Verdict | None = None) -> None:
        """Give the rest of a group to another worker, which judges its cases one by one.

        suspect: the verdict, if it is not sure whose it is; it is told if none of those cases fails.
        """
        task = handle.task
        if isinstance(task, Trial):
            self.shrinker.ask_again(task)
        elif task is not None:
            skip = task.skip | handle.ahead | skip
            rest = replace(task, start=handle.position, skip=skip, deaths=task.deaths + 1, suspect=suspect)
            if rest.deaths >= DEATHS_PER_GROUP and not self.options.given:
                self._say_unexplained(rest)
                self.summary.abandoned += 1
            else:
                self.resumed.append(rest)
