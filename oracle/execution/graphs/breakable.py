"""One capture that is broken where a function has to run eagerly: captured segments, and calls between them.

    @eager_break
    def attention(q, metadata):                # runs at every replay, on the metadata of that step
        ...

    graph = BreakableGraph(backend, backend.new_pool())
    outputs = graph.capture(step)              # `step` calls `attention` somewhere
    graph.replay()

A capture computes nothing, and what runs eagerly needs the values. So a capture runs the step once, piece by piece:
each segment is replayed as soon as it has ended, and the call after it works on what the segment really wrote.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any, ParamSpec, TypeVar

from .breaks import eager_break, thread
from .calls import EagerCall
from .errors import CaptureError, ReplayError
from .interface import Backend, Graph
from .required import RequiredBreaks

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


__all__ = ["BreakableGraph", "eager_break"]

_pools_in_use: set[Any] = set()
_pools_lock = threading.Lock()


class Segment:
    """A captured piece between two breaks."""

    def __init__(self, graph: Graph, number: int) -> None:
        self.graph, self.name = graph, f"segment {number}"

    def run(self) -> None:
        # An empty one is kept for its claim to the pool, and costs no launch.
        if self.graph.num_nodes:
            self.graph.replay()


class BreakableGraph:
    """Segments and eager calls, in the order in which the step did them.

    Graphs of one pool share its memory: they may be replayed in any order, and one at a time.
    """

    def __init__(self, backend: Backend, pool: Any, *, must_break: Collection[str] = ()) -> None:
        """`must_break` names registered operators ("namespace::operator") that no segment may contain."""
        self.replays = 0  # that were done to their end; the run at capture is none
        self._backend, self._pool = backend, pool
        self._required = RequiredBreaks(must_break)
        self._steps: list[Segment | EagerCall] = []
        self._open: Graph | None = None
        self._complete = False

    @property
    def segments(self) -> int:
        """How many pieces were captured, empty ones included."""
        return sum(isinstance(step, Segment) for step in self._steps)

    @property
    def breaks(self) -> int:
        """How many calls each replay does between its segments."""
        return sum(isinstance(step, EagerCall) for step in self._steps)

    @property
    def num_nodes(self) -> int:
        """How many operations the segments of a replay run."""
        return sum(step.graph.num_nodes for step in self._steps if isinstance(step, Segment))

    def capture(
        self, function: Callable[Parameters, Returned], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Returned:
        """Capture one call of `function`; its result is the memory that each replay writes to."""
        with self.record():
            return function(*args, **kwargs)

    @contextlib.contextmanager
    def record(self) -> Iterator[BreakableGraph]:
        """Capture the work of the block, which runs once. What the block raises comes through, nothing is kept then.

        Raises CaptureError for a block that never broke, for an operator of `must_break` inside of a segment, inside
        of another capture, and where this graph holds a capture already.
        """
        if self._steps:
            raise CaptureError("record: the graph holds a capture already; release it first")
        with self._alone_in_pool(CaptureError):
            try:
                self._begin()
                thread.graph = self
                try:
                    yield self
                finally:
                    thread.graph = None
                self._finish()
            except BaseException as error:
                error.add_note(
                    f"a breakable capture was given up in segment {self.segments + (self._open is not None)}"
                )
                self._give_up()
                raise

    def replay(self) -> None:
        """Run everything again: each segment on what the memory holds now, each call on its captured arguments.

        Raises ReplayError, which names the segment or call that failed; the next replay begins from the first one.
        """
        if not self._complete:
            raise ReplayError("replay: the graph was released, or its capture never ended")
        if self._backend.is_capturing():
            raise ReplayError("replay: a graph is replayed inside of a capture")
        with self._alone_in_pool(ReplayError):
            for step in self._steps:
                try:
                    step.run()
                except Exception as error:
                    kind = type(error) if isinstance(error, ReplayError) else ReplayError
                    raise kind(f"{step.name} of {self.segments} segments, {self.breaks} breaks: {error}") from error
        self.replays += 1

    def release(self) -> None:
        """Give up the capture, and every tensor that is held for it; does nothing the second time."""
        for step in self._steps:
            if isinstance(step, Segment):
                step.graph.release()
        self._steps.clear()
        self._complete = False

    def run_between(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """End the segment, call `function` for real, and open the next segment."""
        self._end().run()
        call = EagerCall(f"break {self.breaks + 1}, {name},", function, args, kwargs)
        thread.graph = None
        try:
            result = call.first()
            self._steps.append(call)
        except BaseException as error:
            error.add_note(f"in break {self.breaks + 1} of a breakable capture, {name}")
            raise
        finally:
            # Whoever called the function may catch what it raised and go on: that is captured too.
            self._begin()
            thread.graph = self
        return result

    def _begin(self) -> None:
        self._open = self._backend.begin(self._pool)
        self._required.start()

    def _end(self) -> Segment:
        graph = self._open
        if graph is None:
            raise CaptureError("an earlier segment of this capture could not be run, or the next one not begun")
        self._backend.join_branches()
        self._required.stop()
        graph.end()
        self._open = None
        segment = Segment(graph, self.segments + 1)
        self._steps.append(segment)
        return segment

    def _finish(self) -> None:
        last = self._end()
        if not self.breaks:
            raise CaptureError("the capture never broke: no function with eager_break was called in this thread")
        last.run()
        self._complete = True

    def _give_up(self) -> None:
        graph, self._open = self._open, None
        if graph is not None:
            self._required.stop()
            with contextlib.suppress(CaptureError):  # CUDA may have ended it by itself, where it refused something
                graph.abandon()
        self.release()

    @contextlib.contextmanager
    def _alone_in_pool(self, error: type[RuntimeError]) -> Iterator[None]:
        """Values that cross a break lie in the pool: no other graph of it may write there before they are read."""
        with _pools_lock:
            if self._pool in _pools_in_use:
                raise error("found another graph of the same pool under way, in a break of it or in another thread")
            _pools_in_use.add(self._pool)
        try:
            yield
        finally:
            _pools_in_use.discard(self._pool)
