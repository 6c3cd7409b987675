"""One call between two captured segments: what it was given, what it returned, and how both stay where they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import CaptureError, ReplayError

# Equal values of these are the same to the code that was captured after the call; of other objects only themselves.
_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class EagerCall:
    """Called again at each replay, with the arguments of the capture.

    The segment before the call writes its arguments by address, and the segment after it reads its outputs by address.
    So both are held here: memory that nobody holds goes back to its allocator, and from there to a later capture of
    the same pool or to anybody else. That the tensors still lie at those addresses is verified before each call.
    Arguments are passed by reference: what the function finds in an object or a container is what is there by then.
    """

    def __init__(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.name = name
        self._function, self._args, self._kwargs = function, args, kwargs
        self._modes = _modes()
        self._arguments = _addresses({**{str(index): value for index, value in enumerate(args)}, **kwargs}, "argument ")
        self._result: list[tuple[str, Any]] = []
        self._returned_nothing = False
        self._outputs: list[tuple[str, Tensor, int]] = []

    def first(self) -> Any:
        """Call it at the capture; its outputs are the memory that the segments after it are captured on."""
        result = self._function(*self._args, **self._kwargs)
        self._returned_nothing = result is None
        self._result = list(parts(result, "output "))
        for path, leaf in self._result:
            if isinstance(leaf, Tensor) and any(
                size > 1 and stride == 0 for size, stride in zip(leaf.shape, leaf.stride(), strict=True)
            ):
                raise CaptureError(f"{path}: found an expanded tensor, expected memory that a replay can write to")
        self._outputs = _addresses(result, "output ")
        return result

    def run(self) -> None:
        """Call it again and copy what it returns into the outputs of the first call."""
        for path, tensor, address in (*self._arguments, *self._outputs):
            if tensor.data_ptr() != address:
                raise ReplayError(f"{path}: found its memory exchanged after the capture, which the segments still use")
        if _modes() == self._modes:  # to enter the same ones again costs as much as the rest of a replay
            self._run()
            return
        inference, grad = self._modes
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            self._run()

    def _run(self) -> None:
        result = self._function(*self._args, **self._kwargs)
        if result is None and self._returned_nothing:  # all was written in place; to take it apart costs a microsecond
            return
        self._copy(list(parts(result, "output ")))

    def _copy(self, found: list[tuple[str, Any]]) -> None:
        paths, expected_paths = [path for path, _ in found], [path for path, _ in self._result]
        if paths != expected_paths:
            raise ReplayError(f"found the outputs {paths}, expected {expected_paths}")
        copies = []
        for (path, actual), (_, recorded) in zip(found, self._result, strict=True):
            _require_same(path, actual, recorded)
            if isinstance(recorded, Tensor) and not _is_same_memory(actual, recorded):
                copies.append((recorded, actual))
        if not copies:
            return
        written = {target.untyped_storage().data_ptr() for target, _ in copies}
        # What lies in an output itself, as when two buffers are returned in turns, is read before any is written.
        sources = [source.clone() if source.untyped_storage().data_ptr() in written else source for _, source in copies]
        with torch.no_grad():
            for (target, _), source in zip(copies, sources, strict=True):
                target.copy_(source)


def _modes() -> tuple[bool, bool]:
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


def parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What lies inside of lists, tuples, dicts and dataclasses, in order, each with its place."""
    if isinstance(value, (list, tuple)):
        named: Any = enumerate(value)
    elif isinstance(value, dict):
        named = value.items()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = ((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))
    else:
        yield path.rstrip(" ."), value
        return
    for name, part in named:
        yield from parts(part, f"{path}{name}.")


def _addresses(value: Any, path: str) -> list[tuple[str, Tensor, int]]:
    """The tensors inside of `value`, with where they are."""
    return [
        (place, leaf, leaf.data_ptr())
        for place, leaf in parts(value, path)
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided
    ]


def _require_same(path: str, actual: Any, recorded: Any) -> None:
    """Raise ReplayError where the segments after the call were captured for something else than `actual`."""
    if isinstance(recorded, Tensor):
        expected = f"a tensor of {tuple(recorded.shape)}, {recorded.dtype} on {recorded.device}"
        if not isinstance(actual, Tensor):
            raise ReplayError(f"{path}: found {type(actual).__name__}, expected {expected}")
        if (actual.shape, actual.dtype, actual.device) != (recorded.shape, recorded.dtype, recorded.device):
            found = f"{tuple(actual.shape)}, {actual.dtype} on {actual.device}"
            raise ReplayError(f"{path}: found {found}, expected {expected}")
    elif actual is not recorded and not (
        isinstance(recorded, _VALUES) and type(actual) is type(recorded) and actual == recorded
    ):
        raise ReplayError(f"{path}: found {actual!r}, expected {recorded!r}, which the segments were captured with")


def _is_same_memory(actual: Tensor, recorded: Tensor) -> bool:
    return actual is recorded or (actual.data_ptr() == recorded.data_ptr() and actual.stride() == recorded.stride())
