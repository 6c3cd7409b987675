"""Registration with PyTorch: each operation is one operator with a flat schema that mutates its outputs.

Registered in this form a call costs a third of `torch.library.custom_op`, the compiler sees what is written, and
piecewise graph splitters find the operators by name. Operators return nothing: one may not return its own argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# `pageproof` in a normal import; a copy of this package under another name registers beside it.
NAMESPACE = (__package__ or "pageproof").split(".")[0]
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_overloads: dict[str, Callable[..., None]] = {}


def define(name: str, schema: str, implementation: Callable[..., None]) -> None:
    """Register `implementation` as the operator NAMESPACE::name for every device."""
    _library.define(f"{name}({schema}) -> ()")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _nothing, lib=_library)
    _overloads[name] = getattr(getattr(torch.ops, NAMESPACE), name).default


def call(name: str, *arguments: Any) -> None:
    _overloads[name](*arguments)


def _nothing(*_: Any, **__: Any) -> None:
    """What an operator does to fake tensors: it only writes, so no shape or value comes out of it."""
