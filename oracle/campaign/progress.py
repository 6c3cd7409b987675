"""Live progress: a line that is drawn over where there is a terminal, a line every few seconds where there is none."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from .report import modes_line, opening, status
from .summary import Summary

if TYPE_CHECKING:
    from rich.live import Live

PLAIN_SECONDS = 10.0


class Progress(Protocol):
    """Called with the summary a few times a second, between `__enter__` and `__exit__`."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, summary: Summary) -> None: ...


class _Once:
    """What is said once: what runs, what the workers say of where it runs, and in which modes."""

    def __init__(self) -> None:
        self._said = 0

    def lines(self, summary: Summary) -> list[str]:
        modes = [modes_line(summary)] if summary.rows else []  # the planner is a worker whose notes have come
        lines = [opening(summary), *summary.notes, *modes][self._said :]
        self._said += len(lines)
        return lines


class Plain:
    """Whole lines, now and then: for logs."""

    def __init__(self, stream: TextIO, seconds: float = PLAIN_SECONDS) -> None:
        self.stream, self.seconds = stream, seconds
        self.last = time.monotonic()
        self.once = _Once()

    def __enter__(self) -> Plain:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, summary: Summary) -> None:
        lines = self.once.lines(summary)
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            lines.append(status(summary))
        for line in lines:
            self.stream.write(line + "\n")
        if lines:
            self.stream.flush()


class Drawn:
    """One status line under what was printed, with rich."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.once = _Once()

    def __enter__(self) -> Drawn:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def __call__(self, summary: Summary) -> None:
        from rich.text import Text

        for line in self.once.lines(summary):
            self.live.console.print(Text(line))
        self.live.update(Text(status(summary)))


def make(stream: TextIO | None = None) -> Progress:
    """What suits the stream, by default standard output; plain lines as well where rich is not installed."""
    stream = stream or sys.stdout
    if stream.isatty():
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError:
            return Plain(stream)
        return Drawn(Live(console=Console(file=stream), refresh_per_second=4, transient=True))
    return Plain(stream)
