"""What can go wrong with a graph. All are RuntimeErrors, which is also what torch raises for CUDA graphs."""

from __future__ import annotations


class CaptureError(RuntimeError):
    """Something was done inside of a capture that no capture allows, or a capture was left in a state to refuse."""


class ReplayError(RuntimeError):
    """A graph cannot be replayed: it was released, never finished, or is replayed inside of a capture."""


class DanglingPointer(ReplayError):
    """The emulation's word for memory that a graph points to and that is gone. CUDA reads it, and says nothing."""


class NotEmulated(RuntimeError):
    """The emulation declines: it does not model what was asked for. Says nothing about the code that asked."""
