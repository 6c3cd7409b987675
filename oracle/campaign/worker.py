"""A worker process: judges groups of cases, and says in a file which case it is at.

A worker is expendable. A CUDA fault poisons its process, a wild write may kill it, a kernel may never return: the
campaign then learns from the in-flight file which case did it and starts another worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..adapters import find
from ..building import pinned
from ..candidate import Candidate, plan_of
from ..case import Case
from ..environment import Unusable, describe_device
from ..verdict import ORACLE_FAILED, Outcome, Verdict
from .findings import Failure, Findings
from .lengths import sizes_for
from .messages import Assignment, Planned, PlanRequest, Ready, Refused, Report, Setup, Trial, Tried
from .offers import make_plan
from .pairs import MODEL, Model

Judge = Callable[[Case, Candidate, torch.device | str], Verdict]

REPORT_SECONDS = 0.5
DEVICE_LOST = 71  # exit status of a worker whose device no longer answers
OUT_OF_MEMORY = "out of device memory, beside the other workers' cases"
FULL_SHARE = 8  # a device with less than this part of its memory free is full
KEPT_BYTES = 4 << 30  # device memory that a worker may keep for its next cases
FAR_PLACES = 2  # workers that may hold a case with far pages at a time


def main(connection: Connection, setup: Setup, clock: Any) -> None:
    """Answer messages until the campaign hangs up. `clock` is shared: [start of the case at work, its position]."""
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


def _ran_out_of_memory(reason: str) -> bool:
    """torch's words, or Triton's, which has no exception of its own for it."""
    return "OutOfMemoryError" in reason or "Triton Error [CUDA]: out of memory" in reason


def refuse_drift(device: str) -> None:
    """Unusable where cases have other bits than elsewhere: what is found there would replay nowhere else."""
    if (drift := pinned.drift(device)) is not None:
        raise Unusable(f"cases are not the same here as everywhere: {drift}")


def load_judge(path: str) -> Judge:
    module, _, name = path.partition(":")
    judge: Judge = getattr(importlib.import_module(module, __package__), name)
    return judge


class _Worker:
    def __init__(self, connection: Connection, setup: Setup, clock: Any) -> None:
        self.connection, self.setup, self.clock = connection, setup, clock
        self.device = torch.device(setup.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        refuse_drift(setup.device)
        self.candidate = find(setup.target)
        self.judge = load_judge(setup.judge)
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
        cases = task.group.cases(Model(extra=True, banned=task.banned), self.sizes)
        for position, case in enumerate(cases):
            now = time.monotonic()
            if now >= task.stop_at:
                break
            if position < task.start or position in task.skip:
                continue
            if now - sent >= REPORT_SECONDS or task.group.given:  # given cases are few, and in order
                self.connection.send(report)
                report, sent = Report(position=position), now
            with self._room_for(case):
                self._take_off(case, position)
                verdict = self._verdict(case)
                self._note(report, verdict, given=bool(task.group.given))
            report.position = position + 1
            if report.lost:
                self.connection.send(report)
                os._exit(DEVICE_LOST)
        report.done = True
        self.connection.send(report)

    def attempt(self, trial: Trial) -> None:
        with self._room_for(trial.case):
            self._take_off(trial.case, 0)
            verdict = self._verdict(trial.case)
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
        lost = verdict.outcome is Outcome.CRASHED and self._device_is_lost()
        self.clock[0] = 0.0
        if self.device.type == "cuda" and not lost and torch.cuda.memory_reserved() > KEPT_BYTES:
            torch.cuda.empty_cache()  # what one large case took, sixteen workers would keep from each other
        return lost

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
        os.replace(scratch, self.setup.inflight)
        self.clock[1] = position
        self.clock[0] = time.monotonic()

    def _verdict(self, case: Case) -> Verdict:
        """The judge's, asked once more where there was no device memory; then nothing is known of the case."""
        for _ in range(2):
            try:
                verdict, whose = self.judge(case, self.candidate, self.device), "the candidate"
            except torch.OutOfMemoryError as error:
                verdict, whose = self._crash(case, error), "the oracle"
            except Exception as error:
                return self._crash(case, error)
            if not (verdict.outcome is Outcome.CRASHED and _ran_out_of_memory(verdict.reason)):
                return replace(verdict, target=self.setup.target)
            torch.cuda.empty_cache()
        if whose == "the candidate" and not self._device_is_full():
            return replace(verdict, target=self.setup.target)  # it asked for too much, and that is its own fault
        return self._say(Outcome.NOT_JUDGED, case, f"{OUT_OF_MEMORY} ({whose}'s request)")

    def _crash(self, case: Case, error: Exception) -> Verdict:
        """An error that left the judge: the oracle's own, unless the device failed after the candidate had run."""
        lines = "".join(traceback.format_exception(error))
        whose = "the device failed" if "CUDA error" in str(error) else ORACLE_FAILED
        return self._say(Outcome.CRASHED, case, f"{whose}:\n{lines}")

    def _say(self, outcome: Outcome, case: Case, reason: str) -> Verdict:
        name, target = self.candidate.name, self.setup.target
        return Verdict(outcome=outcome, case=case, candidate=name, target=target, reason=reason)

    def _device_is_full(self) -> bool:
        """Whether other processes hold so much of the device that a modest request may fail."""
        if self.device.type != "cuda":
            return False
        free, total = torch.cuda.mem_get_info(self.device)
        return free < total // FULL_SHARE

    def _device_is_lost(self) -> bool:
        """Whether CUDA no longer works in this process; an illegal access is for good."""
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.device)
            return bool((torch.ones(8, device=self.device) * 2).sum().item() != 16.0)
        except Exception:
            return True
