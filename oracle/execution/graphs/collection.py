"""Python's collector of reference cycles, stopped while CUDA captures.

A graph that died in a cycle, as with a traceback that holds the frame of its step, is destroyed wherever the collector
happens to run. Inside of a capture CUDA refuses that, and ends the capture.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_depth = 0
_was_enabled = False


@contextmanager
def paused() -> Iterator[None]:
    """No collection until the last block of all threads is left; then as it was before the first."""
    global _depth, _was_enabled
    with _lock:
        if _depth == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0 and _was_enabled:
                gc.enable()
