"""Worker processes: started, watched, ended one at a time by their own process id, replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ..case import Case
from .messages import Assignment, Setup, Trial
from .summary import Options
from .worker import main

START_SECONDS = 300.0  # for importing torch and setting up a device
STOP_SECONDS = 10.0


@dataclass(kw_only=True)
class Handle:
    """One worker process, seen from the campaign."""

    setup: Setup
    process: BaseProcess
    connection: Connection
    clock: Any  # shared: [time.monotonic() at the start of the case at work or 0, its position, others may still run]
    started: float
    ready: bool = False
    task: Assignment | Trial | None = None
    position: int = 0  # in the task's group, reported so far
    ahead: frozenset[int] = frozenset()  # positions beyond it that were reported as well
    overdue: bool = False  # ended because its case took too long

    @property
    def seconds_at_work(self) -> float:
        """On the case at work, or on starting up; 0 between cases."""
        since = self.clock[0] if self.ready else self.started
        return time.monotonic() - since if since else 0.0

    @property
    def is_sure(self) -> bool:
        """Whether what befalls the worker is the doing of the case at work, or else of one issued before it."""
        return not self.clock[2]

    @property
    def case_at_work(self) -> Case | None:
        """The case that a dead worker was at, if it was at one."""
        try:
            return Case.from_json(self.setup.inflight.read_text()) if self.clock[0] else None
        except (OSError, ValueError):
            return None

    @property
    def idle(self) -> bool:
        return self.ready and self.task is None

    def begin(self, task: Assignment | Trial) -> None:
        self.task, self.ahead = task, frozenset()
        self.position = task.start if isinstance(task, Assignment) else 0
        self.send(task)

    def send(self, message: object) -> None:
        """Tell the worker; one that is dead is found out by its silence."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def kill(self) -> None:
        """End this process and no other."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(STOP_SECONDS)

    def close(self) -> None:
        self.kill()
        self.connection.close()
        for path in (self.setup.inflight, self.setup.inflight.with_suffix(".tmp")):
            path.unlink(missing_ok=True)

    def death(self) -> str:
        """How the process ended, in words."""
        if self.overdue:
            return "no answer in the time that a case has, compiling its kernels included"
        self.process.join(STOP_SECONDS)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"the process that judged this case was ended by {signal.Signals(-code).name}"
        return f"the process that judged this case ended by itself, with exit status {code}"


class Pool:
    """The workers of a campaign."""

    def __init__(self, setups: list[Setup]) -> None:
        self._context = multiprocessing.get_context("spawn")
        self.handles = [self._start(setup) for setup in setups]

    def _start(self, setup: Setup) -> Handle:
        here, there = self._context.Pipe()
        clock = self._context.RawArray("d", 3)
        name = f"pageproof-worker-{setup.number}"
        process = self._context.Process(target=main, args=(there, setup, clock), name=name, daemon=True)
        process.start()
        there.close()  # so that the end of the process is the end of the pipe
        return Handle(setup=setup, process=process, connection=here, clock=clock, started=time.monotonic())

    def replace(self, handle: Handle) -> None:
        """Another worker in the place of one that is dead, or has to be."""
        handle.close()
        self.handles[self.handles.index(handle)] = self._start(handle.setup)

    def waiting(self, seconds: float) -> list[Handle]:
        """The workers that have something to say, or have died, after at most so many seconds."""
        heard = wait([handle.connection for handle in self.handles], timeout=seconds)
        return [handle for handle in self.handles if handle.connection in heard]

    def close(self) -> None:
        """Ask all to leave, then see that they did."""
        for handle in self.handles:
            if handle.process.is_alive():
                handle.send(None)
        until = time.monotonic() + STOP_SECONDS
        for handle in self.handles:
            if handle.ready and handle.task is None:
                handle.process.join(max(0.0, until - time.monotonic()))
            handle.close()


def make_setups(options: Options, workers: int, devices: list[str]) -> list[Setup]:
    """One for each worker; the devices are dealt out in turn."""
    return [
        Setup(
            number=number,
            target=options.target,
            device=devices[number % len(devices)],
            judge=options.judge,
            inflight=options.findings / f"inflight-{number}.json",
            nightly=options.nightly,
            modes=options.modes,
        )
        for number in range(workers)
    ]
