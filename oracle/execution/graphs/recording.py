"""The mode under which an emulated capture runs: every operator is written down instead of run."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from . import host
from .errors import CaptureError, NotEmulated
from .leaves import leaves, map_leaves
from .meta import Shapes
from .nodes import Node, Tape

_TORCHS_OWN = ("aten", "prims")
_EXCHANGES_MEMORY = ("aten::resize_", "aten::resize_as_", "aten::set_")
_ALLOCATES = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided")
# Where a Python body of a registered operator may sit for it to serve CPU tensors.
_PYTHON_BODIES = ("CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
_BELOW_EVERYTHING = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Recorder(TorchDispatchMode):
    """Writes a thread's operators on a tape; of an operator with a Python body, what the body does."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape
        self._opened: list[str] = []
        self._host_reads = host.HostReads(self._opened)
        self._scope = contextlib.ExitStack()

    def where(self) -> str:
        """The operators whose bodies are running."""
        return host.prefix(self._opened)

    def start(self) -> None:
        self._scope.enter_context(self)
        self._scope.enter_context(self._host_reads)

    def stop(self) -> None:
        if self._opened or _get_current_dispatch_mode() is not self:
            raise CaptureError(f"{self.where()}the capture ends inside of an operator, or of a mode entered after it")
        if _get_current_function_mode() is not self._host_reads:
            raise NotEmulated("a capture that ends inside of a function mode entered after it, as torch.device is one")
        self._scope.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if func.namespace not in _TORCHS_OWN:
            return self._open(func, args, kwargs)
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self, self._host_reads:  # made of other operators; in inference mode torch leaves it whole until here
                return func.redispatch(_BELOW_EVERYTHING, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            return self._record(func, args, kwargs)

    def _open(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.name()
        space, _, operator = name.partition("::")
        if not any(f"{space}/{operator}/{key}" in torch.library._impls for key in _PYTHON_BODIES):
            raise NotEmulated(f"{self.where()}{name}: an operator without a Python body cannot be opened and recorded")
        self._opened.append(name)
        try:
            with self, self._host_reads:
                return func.redispatch(_BELOW_EVERYTHING, *args, **kwargs)
        finally:
            self._opened.pop()

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "aten::lift_fresh":
            host.mark(args[0], host.PAGEABLE)  # a tensor made from Python numbers
            return func(*args, **kwargs)
        if tensors and all(host.kind_of(tensor) is not None for tensor in tensors):
            return _run_on_host(func, args, kwargs)
        self._refuse(func, args, kwargs)
        if _is_view(func):
            return func(*args, **kwargs)
        user = self.where() + func.name()
        shapes = Shapes(user, func, args, kwargs)
        results = shapes.results(self._tape.allocate)
        if name not in _ALLOCATES:
            frozen_args, frozen_kwargs = map_leaves(lambda leaf: self._freeze(leaf, user), (args, kwargs))
            targets = [self._freeze(new, user) if new is not None else None for new in shapes.new]
            self._tape.append(Node(user, func, frozen_args, frozen_kwargs, targets))
        return results

    def _freeze(self, leaf: Any, user: str) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if host.kind_of(leaf) != host.PAGEABLE:
            return self._tape.pointers.freeze(leaf, user)
        if leaf.dim():
            raise CaptureError(f"{user}: found pageable host memory used on the device inside of a capture")
        return leaf.clone()  # CUDA reads a number on the host when it launches, and the launch keeps the value

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raise for what a CUDA capture refuses, and for what is not emulated."""
        name, user = func._schema.name, self.where() + func.name()
        if name in _EXCHANGES_MEMORY:
            raise NotEmulated(f"{user}: a tensor whose memory is exchanged inside of a capture is not emulated")
        if _waits_for_device(func, args, kwargs):
            raise CaptureError(f"{user}: found a value or a size that the host has to read inside of a capture")
        if name == "aten::copy_" and host.PINNED in map(host.kind_of, args[:2]):
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            if not non_blocking:
                raise CaptureError(f"{user}: found a copy that waits for the device, expected non_blocking=True")


def _waits_for_device(func: Any, args: Any, kwargs: Any) -> bool:
    name = func._schema.name
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        # A single number is filled in under the mask, which needs no list of places.
        return masks and not (len(args) > 2 and args[2].dim() == 0)
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is not None:
        return False
    return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags


def _is_view(func: Any) -> bool:
    """Whether it only makes another tensor over the same memory, which is the host's own business."""
    if func._schema.name == "aten::_unsafe_view" or torch.Tag.inplace_view in func.tags:
        return True
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _run_on_host(func: Any, args: Any, kwargs: Any) -> Any:
    """Host memory only: the host does it now, capture or not, and its result is host memory too."""
    results = func(*args, **kwargs)
    for leaf in leaves(results):
        if isinstance(leaf, Tensor) and host.kind_of(leaf) is None:
            host.mark(leaf, host.PAGEABLE)
    return results
