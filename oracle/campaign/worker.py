"""A worker process: judges groups of cases, and says in a file which case it is at.

A worker is expendable. A CUDA fault poisons its process, a wild write may kill it, a kernel may never return: the
campaign then learns from the in-flight file which case did it and starts another worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import signal
import time
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..adapters import find
from ..building import pinned
from ..candidate import plan_of
from ..case import MODES, Case
from ..environment import Unusable, describe_device, memory_of, sleep_while_waiting
from ..judging_many import TOGETHER
from ..verdict import Outcome, Verdict
from .asking import Asking
from .findings import Failure, Findings
from .lengths import sizes_for
from .messages import Assignment, Planned, PlanRequest, Ready, Refused, Report, Setup, Trial, Tried
from .offers import make_plan
from .pairs import MODEL, Model

REPORT_SECONDS = 0.5
DEVICE_LOST = 71  # exit status of a worker whose device no longer answers
KEPT_SHARE = 1 / 36  # of the device's memory, that a worker may keep for its next cases
FAR_PLACES = 2  # workers that may hold a case with far pages at a time


def main(connection: Connection, setup: Setup, clock: Any) -> None:
    """Answer messages until the campaign hangs up. `clock` is shared: see `pool.Handle`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the campaign stops its workers itself
    torch.set_num_threads(1)
    try:
        worker = _Worker(connection, setup, clock)
        connection.send(Ready(candidate=worker.candidate.name, notes=worker.notes()))
    except Exception as error:
        connection.send(Refused(reason=f"{type(error).__name__}: {error}"))
        return
    try:
        while (message := connection.recv()) is not None:
            if isinstance(message, PlanRequest):
                connection.send(worker.plan(message))
            elif isinstance(message, Trial):
                worker.attempt(message)
            else:
                worker.run(message)
    except (EOFError, BrokenPipeError):
        return  # the campaign is gone
    except Exception:
        connection.send(Refused(reason=traceback.format_exc()))


def refuse_drift(device: str) -> None:
    """Unusable where cases have other bits than elsewhere: what is found there would replay nowhere else."""
    if (drift := pinned.drift(device)) is not None:
        raise Unusable(f"cases are not the same here as everywhere: {drift}")


class _Worker:
    def __init__(self, connection: Connection, setup: Setup, clock: Any) -> None:
        self.connection, self.setup, self.clock = connection, setup, clock
        self.device = torch.device(setup.device)
        sleep_while_waiting(self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        refuse_drift(setup.device)
        self.candidate = find(setup.target)
        self.asking = Asking.of(self.candidate, setup)
        self.sizes = sizes_for(setup.device)
        self.known = Findings()

    def notes(self) -> tuple[str, ...]:
        """Lines about the device, and what the candidate says of where it runs.

        A candidate may have a method `notes() -> list[str]`; its lines are printed when a campaign starts.
        """
        notes = getattr(self.candidate, "notes", list)
        return (describe_device(self.device), *notes())

    def plan(self, request: PlanRequest) -> Planned | Refused:
        try:
            modes, nightly = self.setup.modes, self.setup.nightly
            return Planned(plan=make_plan(self.candidate, request.seed, self.sizes, modes=modes, nightly=nightly))
        except ValueError as error:
            return Refused(reason=str(error))

    def run(self, task: Assignment) -> None:
        report, sent = Report(position=task.start), time.monotonic()
        noted = set(task.skip)
        given = bool(task.group.given)  # given cases are few, and judged in order
        for position, verdict in self._judged(task):
            if self.clock[2] and verdict.outcome is Outcome.CRASHED and self.asking.device_is_lost():
                report.lost, report.suspect = True, verdict
                self.connection.send(report)
                os._exit(DEVICE_LOST)
            self._note(report, verdict, given=given)
            noted.add(position)
            while report.position in noted:
                report.position += 1
            report.ahead = frozenset(each for each in noted if each > report.position)
            if report.lost:
                self.connection.send(report)
                os._exit(DEVICE_LOST)
            if given or time.monotonic() - sent >= REPORT_SECONDS:
                self.connection.send(report)
                report, sent = Report(position=report.position, ahead=report.ahead), time.monotonic()
        report.done = True
        self.connection.send(report)

    def _judged(self, task: Assignment) -> Iterator[tuple[int, Verdict]]:
        """Positions of the task and what came of their cases, while there is time."""
        drawn = enumerate(task.group.cases(Model(extra=True, banned=task.banned), self.sizes))
        wanted = ((at, case) for at, case in drawn if at >= task.start and at not in task.skip)
        in_time = itertools.takewhile(lambda _: time.monotonic() < task.stop_at, wanted)
        alone = bool(task.group.given) or task.deaths > 0  # so that the next death has one case to its name
        if alone or not (self.sizes.together and self.asking.may_ask_together):
            yield from self._one_by_one(in_time)
            return
        while batch := list(itertools.islice(in_time, TOGETHER)):
            far = any(case.spec.far_pages for _, case in batch)
            yield from self._one_by_one(batch) if far else self._together(batch)

    def _one_by_one(self, cases: Iterable[tuple[int, Case]]) -> Iterator[tuple[int, Verdict]]:
        for position, case in cases:
            with self._room_for(case):
                self._take_off(case, position)
                yield position, self.asking.alone(case)
                self._tidy()

    def _together(self, batch: list[tuple[int, Case]]) -> Iterator[tuple[int, Verdict]]:
        """The same, of cases that wait for one evaluation of all."""
        left, raised = dict(batch), None
        self.clock[2] = float(any(case.mode != MODES[0] for _, case in batch))  # replays are not waited for
        try:
            for index, verdict in self.asking.together(batch, self._take_off):
                position, _ = batch[index]
                del left[position]
                yield position, verdict
        except torch.OutOfMemoryError:
            pass  # one by one they take less
        except Exception as error:
            raised = error
        self._tidy()
        if raised is None:
            self.clock[2] = 0.0
            yield from self._one_by_one(left.items())
        else:
            yield from self._apart(left, raised)

    def _apart(self, left: dict[int, Case], raised: Exception) -> Iterator[tuple[int, Verdict]]:
        """What an evaluation of several did not bear: the case that fails alone as well; if none does, the last one."""
        if self.asking.device_is_lost():
            position = int(self.clock[1])  # of the case at work
            yield position, self.asking.crash(left.pop(position), raised)
        self.clock[2] = 0.0
        failed, last = False, max(left, default=-1)
        for position, verdict in self._one_by_one(left.items()):
            failed = failed or verdict.failed
            yield position, verdict if failed or position != last else self.asking.crash(verdict.case, raised)

    def attempt(self, trial: Trial) -> None:
        with self._room_for(trial.case):
            self._take_off(trial.case, 0)
            verdict = self.asking.alone(trial.case)
            lost = self._land(verdict)
        self.connection.send(Tried(verdict=verdict, lost=lost))
        if lost:
            os._exit(DEVICE_LOST)

    def _note(self, report: Report, verdict: Verdict, *, given: bool) -> None:
        plan = plan_of(self.candidate, verdict.case) if verdict.judged else None
        report.tally.add(verdict, MODEL, plan, triples=self.setup.nightly)
        if given:
            report.verdicts.append(verdict)
        elif verdict.failed:
            failure = Failure.of(verdict)
            if self.known.add(failure):
                report.failures.append(failure)
            else:
                report.repeats[failure.signature] += 1
        report.lost = self._land(verdict)

    def _land(self, verdict: Verdict) -> bool:
        """No case is at work any more; whether the device was lost over it."""
        lost = verdict.outcome is Outcome.CRASHED and self.asking.device_is_lost()
        self.clock[0] = 0.0
        return lost

    def _tidy(self) -> None:
        """Give back what large cases took: so many workers would keep it from each other."""
        if self.device.type == "cuda" and torch.cuda.memory_reserved() > KEPT_SHARE * memory_of(self.device):
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _room_for(self, case: Case) -> Iterator[None]:
        """Wait until few enough of the workers hold a case with far pages, of up to 13 GB each."""
        if not (case.spec.far_pages and self.device.type == "cuda"):
            yield
            return
        place = os.getpid() % FAR_PLACES
        with open(self.setup.inflight.parent / f"far-{place}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when the file is closed, also by a dying process
            yield

    def _take_off(self, case: Case, position: int) -> None:
        """Say which case is at work: in a file, because nothing else of a dead process is left."""
        scratch = self.setup.inflight.with_suffix(".tmp")
        scratch.write_text(case.to_json())
        self.clock[0] = 0.0  # until file and position are those of one case
        os.replace(scratch, self.setup.inflight)
        self.clock[1] = position
        self.clock[0] = time.monotonic()
