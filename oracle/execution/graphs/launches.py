"""Triton kernels in an emulated capture: a launch through Triton's interpreter is written down instead of run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from .errors import CaptureError, NotEmulated
from .leaves import map_leaves
from .nodes import Tape

# The tape of this thread's capture and the operators that are open, or None where none is under way.
CurrentTape = Callable[[], tuple[Tape, str] | None]


class Launch:
    """One kernel with its grid and numbers as they were; its tensors are addresses."""

    def __init__(self, name: str, executor: Any, args: Any, kwargs: Any) -> None:
        self.name = name
        self._executor, self._args, self._kwargs = executor, args, kwargs

    def run(self) -> None:
        self._executor(*self._args, **self._kwargs)


def install(current_tape: CurrentTape) -> None:
    """Hook Triton's interpreter and autotuner, once in a process; they are as before outside of captures."""
    if getattr(GridExecutor, "pageproof_recorded", False):
        return
    GridExecutor.pageproof_recorded = True
    launch, tune = GridExecutor.__call__, Autotuner.run

    def recorded_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = current_tape()
        if current is None:
            return launch(self, *args, **kwargs)
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            return _record(self, args, kwargs, *current)

    def declined_tuning(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = current_tape()
        if current is not None and len(self.configs) > 1:
            raise NotEmulated(f"{current[1]}{self.base_fn.__name__}: Triton's autotuner inside of a capture")
        return tune(self, *args, **kwargs)

    GridExecutor.__call__ = recorded_launch
    Autotuner.run = declined_tuning


def _record(executor: Any, args: Any, kwargs: Any, tape: Tape, where: str) -> None:
    user = f"{where}kernel {executor.fn.__name__}"
    if executor.pre_run_hooks:
        raise NotEmulated(f"{user}: hooks that run before a kernel are not emulated")
    names = inspect.getfullargspec(executor.fn).args
    kwargs = {name: value for name, value in kwargs.items() if name in names}
    grid = executor.grid
    if callable(grid):
        grid = grid(inspect.getcallargs(executor.fn, *args, **kwargs))
    grid = tuple(int(programs) for programs in grid)
    frozen = type(executor)(executor.fn, executor.arg_names, grid)
    frozen_args, frozen_kwargs = map_leaves(lambda leaf: _freeze(leaf, tape, user), (args, kwargs))
    tape.append(Launch(user, frozen, frozen_args, frozen_kwargs))


def _freeze(value: Any, tape: Tape, user: str) -> Any:
    if isinstance(value, Tensor):
        return tape.pointers.freeze(value, user)
    if isinstance(value, TensorWrapper):
        return TensorWrapper(tape.pointers.freeze(value.base, user), value.dtype)
    if isinstance(value, TensorDescriptor):
        raise NotEmulated(f"{user}: tensor descriptors are not emulated")
    if hasattr(value, "data_ptr"):
        raise CaptureError(f"{user}: found a pointer of the class {type(value).__name__}, expected a torch tensor")
    return value
