"""Launching a compiled kernel again: Triton binds, specialises and looks up every argument anew, which costs more than
all else that a call does on the host. Here what a kernel was compiled for is described once per launch and looked up.

The description is at least as fine as Triton's own: two launches with one description run the same binary. A launch
that has not been seen goes through Triton, which compiles, and tells which binary it was. Switches of Triton's that
change what it compiles, such as TRITON_DEBUG, are not described: they have to be set before the first launch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver

from .interpreter import INTERPRETED

TRITON_VERSION = ".".join(triton.__version__.split(".")[:2])
# How a binary is launched, and how long it stays loaded, is no promise of Triton's: of other versions it is not known.
KNOWN_VERSIONS = ("3.6", "3.7")


def is_remembered(triton_version: str = TRITON_VERSION) -> bool:
    """Whether launches are; else all go through Triton."""
    # AMD's compiler also asks how much memory lies behind a pointer, which is not described here.
    return not INTERPRETED and torch.version.hip is None and triton_version in KNOWN_VERSIONS


IS_REMEMBERED = is_remembered()
MOST_LAUNCHES = 4096
INT32 = range(-(2**31), 2**31)

Constants = dict[str, Any]
Integers = tuple[int | None, ...]
Description = tuple[Any, ...]


class _Launch(NamedTuple):
    run: Any
    function: Any
    packed_metadata: Any
    constant_values: tuple[Any, ...]  # in the order of the kernel's parameters
    constants: Constants  # held, so that no other constants get its id


_launches: dict[tuple[Any, ...], _Launch] = {}


def launch(
    kernel: Any,
    programs: int,
    groups: tuple[Any, ...],
    numbers: Integers,
    constants: Constants,
    description: Description | None = None,
) -> None:
    """Run `kernel` on a grid of `programs`, on the current device and stream.

    groups: its first arguments, tensors and NamedTuples of tensors, numbers and None. numbers: the arguments behind
    them, which the kernel does not specialise. constants: its compile-time arguments, num_warps and num_stages; told
    apart by identity, so callers keep them. description: what `describe` says of these groups and numbers, or of more;
    for callers that launch several kernels with the same. Raises what Triton raises.
    """
    if not IS_REMEMBERED:
        kernel[(programs,)](*groups, *numbers, **constants)
        return
    # Hooks are a profiler's, and want to be told what only Triton's own launch tells them. Nor is it remembered: a
    # profiler may have had its own instructions compiled in.
    if _is_hooked(kernel):
        kernel[(programs,)](*groups, *numbers, **constants)
        return
    device = driver.active.get_current_device()
    # Of the kernel its function: Triton hashes a kernel by its source.
    key = (kernel.fn, id(constants), device, description or describe(groups, numbers))
    known = _launches.get(key)
    if known is None:
        compiled = kernel[(programs,)](*groups, *numbers, **constants)
        _remember(key, kernel, compiled, constants)
        return
    stream = driver.active.get_current_stream(device)
    # As Triton launches it, without metadata and hooks.
    known.run(
        programs, 1, 1, stream, known.function, known.packed_metadata, None, None, None,
        *groups, *numbers, *known.constant_values,
    )  # fmt: skip


def _is_hooked(kernel: Any) -> bool:
    """Triton has a chain of hooks in either place; a program may have put a hook of its own there, or None."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks)


def _remember(key: tuple[Any, ...], kernel: Any, compiled: Any, constants: Constants) -> None:
    if compiled is None:  # a hook of Triton's kept it from compiling
        return
    if len(_launches) >= MOST_LAUNCHES:
        _launches.clear()
    values = tuple(constants[name] for name in kernel.arg_names if name in constants)
    _launches[key] = _Launch(compiled.run, compiled.function, compiled.packed_metadata, values, constants)


def describe(groups: tuple[Any, ...], numbers: Integers) -> Description:
    """What a kernel is compiled for: dtypes, alignments, the integers in a group, and where there is nothing."""
    if not IS_REMEMBERED:
        return ()
    description: list[Any] = [number if number is None else number in INT32 for number in numbers]
    _describe(groups, description)
    return tuple(description)


def _describe(group: tuple[Any, ...], description: list[Any]) -> None:
    for each in group:
        kind = type(each)
        if kind is int or each is None:
            description.append(each)
        elif kind is float:
            description.append(kind)
        elif issubclass(kind, tuple):
            description.append(kind)
            _describe(each, description)
        else:
            description.append(each.dtype)
            description.append(each.data_ptr() % 16 == 0)
