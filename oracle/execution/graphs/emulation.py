"""Captures on a CPU: what a CUDA graph freezes is frozen, and what its replay reads again is read again.

docs/graphs.md says what is emulated and what is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import host, launches
from .errors import CaptureError, NotEmulated, ReplayError
from .interface import Result
from .memory import Pool
from .nodes import Tape
from .recording import Recorder

_thread = threading.local()  # `graph`: the capture under way, of whichever backend


class EmulatedGraph:
    """A capture, and the tape that comes out of it."""

    def __init__(self, pool: Pool) -> None:
        self.replays = 0
        self._num_nodes: int | None = None
        self._tape: Tape | None = Tape(pool)
        self._recorder: Recorder | None = Recorder(self._tape)
        self._recorder.start()
        _thread.graph = self

    @property
    def num_nodes(self) -> int:
        """Operators of torch and kernels; views and allocations are none."""
        if self._num_nodes is None:
            raise CaptureError("num_nodes: the capture has not ended")
        return self._num_nodes

    def end(self) -> None:
        tape = self._stop()
        self._num_nodes = len(tape.operations)

    def abandon(self) -> None:
        self._stop()
        self._tape = None

    def replay(self) -> None:
        if self._tape is None or self._num_nodes is None:
            raise ReplayError("replay: the graph was released, or its capture never ended")
        if _active() is not None:
            raise ReplayError("replay: a graph is replayed inside of a capture")
        self._tape.run()
        self.replays += 1

    def release(self) -> None:
        if self._num_nodes is not None:
            self._tape = None

    def recording(self) -> tuple[Tape, Recorder]:
        """What this thread records with."""
        if _active() is not self or self._tape is None or self._recorder is None:
            raise CaptureError("this capture is not under way in this thread")
        return self._tape, self._recorder

    def _stop(self) -> Tape:
        tape, recorder = self.recording()
        recorder.stop()
        self._recorder = _thread.graph = None
        return tape


class EmulatedBackend:
    """Captures of operators on CPU tensors and of kernels in Triton's interpreter."""

    name = "emulation"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        launches.install(_current_tape)

    def new_pool(self) -> Pool:
        return Pool()

    def pool_bytes(self, pool: Any) -> int:
        return sum(segment.reached for segment in pool.segments)

    def begin(self, pool: Any) -> EmulatedGraph:
        if self.is_capturing():
            raise CaptureError("a capture begins inside of another one")
        return EmulatedGraph(pool)

    def is_capturing(self) -> bool:
        return _active() is not None

    def warm_up(self, step: Callable[[], Result]) -> Result:
        return step()

    def fork(self) -> NoReturn:
        raise NotEmulated("fork: streams and events are not emulated")

    def join_branches(self) -> None:
        """Without streams there is nothing to join."""

    def pinned(self, values: Tensor) -> Tensor:
        copied = values.clone()
        host.mark(copied, host.PINNED)
        return copied

    def synchronize(self) -> None:
        """Everything has been done when its call returns."""


def _active() -> EmulatedGraph | None:
    return getattr(_thread, "graph", None)


def _current_tape() -> tuple[Tape, str] | None:
    graph = _active()
    if graph is None:
        return None
    tape, recorder = graph.recording()
    return tape, recorder.where()
