"""The kernels for Hopper on a CPU: a copy of them in which gluon_emulation.py stands for Triton and Gluon.

`pageproof.optimized` chooses and launches as it does on sm_90. Everything but these kernels (plan, merge, the portable
ones) runs in Triton's interpreter.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pageproof import optimized
from pageproof.optimized import hopper
from pageproof.optimized.hopper import Form
from pageproof.optimized.kernels.hopper.sizes import CHUNK

from . import gluon_emulation

PROGRAMS = 3
PACKAGE = "emulated_kernels"
KERNELS = {"prefill": "hopper_prefill", "mla": "attend_latent"}  # module -> what is launched
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}

REPLACED = (
    (r"import triton\.experimental\.gluon\.language as (\w+)", r"import gluon_emulation as \1"),
    (r"from triton\.experimental import gluon", "import gluon_emulation as gluon"),
    (r"from triton\.experimental\.gluon\.language\.nvidia\.(?:ampere|hopper) import", "from gluon_emulation import"),
    (r"import triton\.language as tl", "import gluon_emulation as tl"),
    (r"import triton\b(?!\.)", "import gluon_emulation as triton"),
)


def emulated(module: str) -> ModuleType:
    """A module of the copied kernels for Hopper, such as "prefill"; the copy is made once in a process."""
    if PACKAGE not in sys.modules:
        sys.modules["gluon_emulation"] = gluon_emulation
        with tempfile.TemporaryDirectory() as folder:
            _copy_kernels(Path(folder) / PACKAGE)
            sys.path.insert(0, folder)
            try:
                for name in KERNELS:
                    importlib.import_module(f"{PACKAGE}.hopper.{name}")
            finally:
                sys.path.remove(folder)
    return sys.modules[f"{PACKAGE}.hopper.{module}"]


def _copy_kernels(folder: Path) -> None:
    shutil.copytree(Path(optimized.__file__).parent / "kernels", folder)
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for pattern, name in REPLACED:
            text = re.sub(pattern, name, text)
        path.write_text(text, encoding="utf-8")


def descriptor(form: Form, *box: int) -> SimpleNamespace:
    """What copies go by: as on a GPU an address, sizes and strides."""
    last = sum((size - 1) * stride for size, stride in zip(form.sizes, form.strides, strict=True))
    memory = (ctypes.c_char * ((last + 1) * form.dtype.itemsize)).from_address(form.address)
    tensor = torch.frombuffer(memory, dtype=form.dtype).as_strided(form.sizes, form.strides)
    return SimpleNamespace(tensor=tensor, shape=form.sizes, block_shape=(*box, CHUNK), dtype=form.dtype)


def _as_in_a_kernel(value: Any) -> Any:
    """Pointers for tensors, and numbers in float32."""
    if isinstance(value, torch.Tensor):
        return gluon_emulation.Pointer(value)
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32)
    return type(value)(*map(_as_in_a_kernel, value)) if isinstance(value, tuple) else value


class Launched:
    """Stands for a kernel where it is launched; counts what each launch stored."""

    def __init__(self, kernel: Callable[..., None]) -> None:
        self.kernel = kernel
        self.stored: list[int] = []  # elements

    def __getitem__(self, _grid: tuple[int]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, SIZES: Any, num_warps: int, **constants: Any) -> None:
        sizes = replace(SIZES, arithmetic=KINDS[SIZES.arithmetic.name])
        gluon_emulation.stored.clear()
        for index in range(PROGRAMS):
            gluon_emulation.program.index, gluon_emulation.program.count = index, PROGRAMS
            self.kernel(*map(_as_in_a_kernel, arguments), SIZES=sizes, **constants)
        self.stored.append(sum(gluon_emulation.stored))


def emulate(module: str, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Let steps that take the kernels for Hopper on sm_90 take them here; the launches of this module's kernel."""
    kernels = {name: Launched(getattr(emulated(name), kernel)) for name, kernel in KERNELS.items()}
    for name, kernel in kernels.items():
        monkeypatch.setattr(f"pageproof.optimized.kernels.hopper.{name}.{KERNELS[name]}", kernel)
    monkeypatch.setattr(hopper, "why_not_compiled", lambda _architecture: None)
    monkeypatch.setattr(hopper, "descriptor", descriptor)
    return kernels[module]
