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
from .leaves import leaves, map_leaves
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
    _release_arguments_at_once()


def _release_arguments_at_once() -> None:
    """Make the interpreter take CPU tensors as they are, instead of copies that are the same memory.

    The functions that it copies them with refer to themselves, and so keep every argument of a launch alive until
    Python's garbage collector comes by: a graph that points to freed memory would look right until then.
    """
    take, restore = GridExecutor._init_args_hst, GridExecutor._restore_args_dev

    def take_directly(self: Any, args: Any, kwargs: Any) -> Any:
        return (list(args), dict(kwargs)) if _all_on_cpu(args, kwargs) else take(self, args, kwargs)

    def restore_nothing(self: Any, args: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        if not _all_on_cpu(args, kwargs):
            restore(self, args, args_hst, kwargs, kwargs_hst)

    GridExecutor._init_args_hst = take_directly
    GridExecutor._restore_args_dev = restore_nothing


def _all_on_cpu(args: Any, kwargs: Any) -> bool:
    return not any(
        isinstance(leaf, (TensorWrapper, TensorDescriptor)) or (isinstance(leaf, Tensor) and not leaf.is_cpu)
        for leaf in leaves((args, kwargs))
    )


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
