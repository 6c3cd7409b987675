"""What the kernels for Hopper ask of their surroundings: a compiler that knows them, and tensors copied in boxes.

`hopper_prefill.py` and `hopper_mla.py` each say with `why_portable` why a step goes on with the portable kernel, and
launch the one for Hopper if nothing is said. The choice follows from the architecture, the formats, the rules, the
sizes and the strides: never from a batch, so a captured graph holds one of the two.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from .kernels.hopper.sizes import CHUNK
from .launching import TRITON_VERSION

# Gluon is an experimental language of Triton's: of other versions it is not known whether they compile these kernels.
GLUON_VERSIONS = ("3.6", "3.7")

ALIGNMENT = 16  # bytes, of an address or a stride that copies take
LARGEST_STRIDE = 2**40  # bytes


class Form(NamedTuple):
    """A tensor as its copies see it; strides count elements.

    It holds no memory: one that outlives its tensor is still right of whatever has the same form in the same place.
    """

    address: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def data_ptr(self) -> int:
        return self.address


def why_not_compiled(architecture: str, triton_version: str = TRITON_VERSION) -> str | None:
    """Why kernels for Hopper cannot be had here, or None."""
    if architecture != "sm_90":
        return f"architecture {architecture}"
    if triton_version not in GLUON_VERSIONS:
        return f"Triton {triton_version}, not one of {', '.join(GLUON_VERSIONS)}"
    return None


@functools.lru_cache(maxsize=1024)
def why_not_copied(name: str, form: Form) -> str | None:
    """Why a tensor cannot be copied in boxes, or None."""
    if 0 in form.sizes:
        return f"{name} is empty"
    if form.address % ALIGNMENT:
        return f"{name} does not begin on {ALIGNMENT} bytes"
    if form.strides[-1] != 1:
        return f"{name}'s last dimension is not contiguous"
    steps = [stride * form.dtype.itemsize for stride in form.strides[:-1]]
    if any(step % ALIGNMENT or not 0 < step < LARGEST_STRIDE for step in steps):
        return f"{name}'s strides {form.strides} are not multiples of {ALIGNMENT} bytes"
    return None


def box_slots(block_size: int, most: int) -> int:
    """Slots of one page that a copy brings: the largest power of two up to `most` that divides a page."""
    return min(block_size & -block_size, most)


@functools.lru_cache(maxsize=1024)
def descriptor(form: Form, *box: int) -> Any:
    """What a launch encodes for copies of boxes [*box, CHUNK]; kept, because making one takes 6 us.

    Kernels get it by value, so a captured launch keeps it.
    """
    # Here, so that a Triton without Gluon never imports it.
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .kernels.hopper.layouts import swizzled

    block_shape = [*box, CHUNK]
    return TensorDescriptor(form, list(form.sizes), list(form.strides), block_shape, swizzled(len(block_shape)))
