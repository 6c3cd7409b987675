"""What a way to capture and replay offers. Whatever is built on it (full, piecewise, breakable) runs on every backend.

    backend.warm_up(step)                      # compiles, loads, initialises: none of it may happen in a capture
    with capture(backend, pool) as graph:
        outputs = step()                       # records; the values in `outputs` mean nothing yet
    graph.replay()                             # reads and writes the memory that the capture saw

Memory allocated inside of a capture comes from `pool` and goes back to it when the last tensor that uses it dies; a
later allocation of the same pool, by this capture or another one, then takes it. Keep what has to survive. A capture
computes nothing: whoever runs something on its outputs before the first replay, as between two segments, finds NaN and
the largest integers, or with CUDA whatever lay there; replay the segment first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Graph(Protocol):
    """One capture, from `Backend.begin` on. Belongs to the thread that began it until it has ended."""

    replays: int  # how often it was really replayed

    @property
    def num_nodes(self) -> int:
        """How many operations a replay runs. Backends count differently: compare within one only."""

    def end(self) -> None:
        """Finish the capture. Raises CaptureError, and abandons it, where a branch has not been joined."""

    def abandon(self) -> None:
        """Leave a capture that failed. The thread can capture again, also into the same pool."""

    def replay(self) -> None:
        """Run everything again on what the memory holds now, in order after the work already issued.

        Raises ReplayError for a graph that is released, not finished or replayed inside of a capture.
        """

    def release(self) -> None:
        """Give up the graph and its claim to the pool's memory; does nothing the second time."""


class Branch(Protocol):
    """Work beside the main line: `with branch:` issues it, `join` makes what follows wait for it.

    Once joined, it starts anew after the work issued by then, where it is entered again.
    """

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: object) -> None: ...

    def join(self) -> None:
        """Everything issued after this waits for the branch; does nothing where it is joined already.

        A capture can only end with all its branches joined.
        """


class Backend(Protocol):
    """A way to capture and replay."""

    name: str
    device: torch.device

    def new_pool(self) -> Any:
        """Memory that the captures into it share; an opaque token for `begin`."""

    def pool_bytes(self, pool: Any) -> int:
        """How much memory the captures into `pool` have taken so far; backends count in granules of their own."""

    def begin(self, pool: Any) -> Graph:
        """From here on this thread's work is recorded and not run. `capture` does this and `end` together."""

    def is_capturing(self) -> bool:
        """Whether this thread's work is being recorded."""

    def warm_up(self, step: Callable[[], Result]) -> Result:
        """Run `step` for real, as a capture that follows will meet it. Call it before the first capture of a step."""

    def fork(self) -> Branch:
        """A branch that starts after the work issued so far. Raises NotEmulated where there are no streams."""

    def join_branches(self) -> None:
        """Join every branch of the capture under way, as before a segment of it ends.

        Raises CaptureError inside of a branch.
        """

    def pinned(self, values: Tensor) -> Tensor:
        """A copy of `values` in page-locked host memory: the one kind that a capture may copy from.

        A captured copy (with `non_blocking=True`) keeps the address, and every replay reads what is there then.
        """

    def synchronize(self) -> None:
        """Wait until all issued work is done."""


@contextmanager
def capture(backend: Backend, pool: Any) -> Iterator[Graph]:
    """Record the work of the block; what it raises comes through, with the capture abandoned."""
    graph = backend.begin(pool)
    try:
        yield graph
    except BaseException:
        graph.abandon()
        raise
    graph.end()
