"""Every address that kernels touch, seen from inside of Triton's interpreter.

The interpreter computes a block of addresses and a mask for each load, store and atomic, and then walks over memory
itself. `tracing` stands in between for as long as a candidate runs, and puts everything back afterwards. What torch's
own operators read and write is not seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NEEDS_INTERPRETER = "needs the interpreter (TRITON_INTERPRET=1, --device cpu)"


def why_untraceable(device: torch.device) -> str | None:
    """Why nothing can be seen of kernels on this device, in one sentence; None if it can."""
    triton: Any = sys.modules.get("triton")
    if device.type != "cpu" or triton is None or not triton.knobs.runtime.interpret:
        return NEEDS_INTERPRETER
    return None


@dataclass(frozen=True)
class Trace:
    """What kernels did to memory, access after access in the order in which they did it.

    An access is one load or store of one program; an atomic operation is a load and then a store. Lanes that are
    masked off are not in it, and an access may have no lane at all.
    """

    launches: int
    programs: Ints  # [num_accesses]: which program instance, numbered through all launches
    is_store: Bools  # [num_accesses]
    widths: Ints  # [num_accesses]: bytes of one lane
    lanes: Ints  # [num_accesses]: how many there are
    addresses: Ints  # [sum of lanes]: of the first byte of each

    @cached_property
    def access_of_lane(self) -> Ints:
        """[sum of lanes]"""
        return np.repeat(np.arange(len(self.lanes)), self.lanes)


class StrayAccess(Exception):
    """A kernel was about to touch memory that nobody gave it; it was stopped before it did."""

    def __init__(self, address: int, width: int, is_store: bool) -> None:
        super().__init__(f"{'store to' if is_store else 'load from'} address {address:#x}")
        self.address, self.width, self.is_store = address, width, is_store


class Recorder:
    """Collects accesses, and stops those that lie neither in `memory` nor in a tensor given to a launch so far."""

    def __init__(self, memory: Iterable[Tensor]) -> None:
        self.stray: StrayAccess | None = None
        self.launches = 0
        self._program = -1
        self._accesses: list[tuple[int, bool, int, int]] = []
        self._addresses: list[Ints] = []
        self._known: dict[int, int] = {}  # where a storage begins -> where it ends
        self._bounds = np.zeros((2, 0), dtype=np.int64)
        self._know(memory)

    def trace(self) -> Trace:
        columns = np.array(self._accesses, dtype=np.int64).reshape(-1, 4).T
        addresses = np.concatenate([np.zeros(0, dtype=np.int64), *self._addresses])
        return Trace(self.launches, columns[0], columns[1].astype(bool), columns[2], columns[3], addresses)

    def launch(self, arguments: Any) -> None:
        """A kernel starts; what tensors it was given is its to touch, as far as this goes."""
        self.launches += 1
        self._know(_tensors(arguments))

    def start_program(self) -> None:
        self._program += 1

    def note(self, pointers: Any, mask: Any, *, is_store: bool) -> None:
        """An access through these handles of the interpreter is about to happen. Raises StrayAccess."""
        blocks = np.asarray(pointers.data)
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        active = slice(None) if mask is None else np.broadcast_to(mask.data, blocks.shape).astype(bool).reshape(-1)
        addresses = blocks.reshape(-1)[active].astype(np.int64)
        self._accesses.append((self._program, is_store, width, len(addresses)))
        self._addresses.append(addresses)
        starts, ends = self._bounds
        owner = np.searchsorted(starts, addresses, side="right") - 1
        outside = (owner < 0) | (addresses + width > ends[owner])
        if outside.any():
            self.stray = StrayAccess(int(addresses[outside.argmax()]), width, is_store)
            raise self.stray

    def _know(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            self._known[start] = max(start + storage.nbytes(), self._known.get(start, 0))
        pairs = sorted(self._known.items()) or [(0, 0)]
        self._bounds = np.array(pairs, dtype=np.int64).T


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a launch's arguments: also in tuples, and those that a descriptor or a wrapper is of."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(base := getattr(value, "base", None), Tensor):
        yield base


@contextmanager
def tracing(memory: Iterable[Tensor]) -> Iterator[Recorder]:
    """Record what interpreted kernels do while this is open; `memory` is known to them from elsewhere."""
    from triton.runtime import interpreter

    recorder = Recorder(memory)
    with ExitStack() as restored:
        for owner, name, stand_in in _stand_ins(recorder, interpreter):
            original = getattr(owner, name)
            restored.callback(setattr, owner, name, original)
            setattr(owner, name, stand_in(original))
        yield recorder


def _stand_ins(recorder: Recorder, interpreter: Any) -> list[tuple[Any, str, Callable[[Any], Any]]]:
    """(class, method, what wraps it): all ways in which the interpreter reaches memory end in these four."""

    def launched(original: Any) -> Any:
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            recorder.launch((*arguments, *named.values()))
            return original(self, *arguments, **named)

        return call

    def started(original: Any) -> Any:
        def call(self: Any, *place: Any) -> Any:
            recorder.start_program()
            return original(self, *place)

        return call

    def noted(pointers: int, mask: int | None, loads: bool, stores: bool) -> Callable[[Any], Any]:
        """`pointers` and `mask` are the places of the two handles among the positional arguments."""

        def wrap(original: Any) -> Any:
            def call(self: Any, *arguments: Any, **named: Any) -> Any:
                for wanted, is_store in ((loads, False), (stores, True)):
                    if wanted:
                        active = None if mask is None else arguments[mask]
                        recorder.note(arguments[pointers], active, is_store=is_store)
                return original(self, *arguments, **named)

            return call

        return wrap

    builder = interpreter.InterpreterBuilder
    return [
        (interpreter.GridExecutor, "__call__", launched),
        (builder, "set_grid_idx", started),
        (builder, "create_masked_load", noted(0, 1, loads=True, stores=False)),
        (builder, "create_masked_store", noted(0, 2, loads=False, stores=True)),
        (builder, "create_atomic_rmw", noted(1, 3, loads=True, stores=True)),
        (builder, "create_atomic_cas", noted(0, None, loads=True, stores=True)),
    ]
