"""The prefill for Hopper on a CPU: a copy of the kernels in which gluon_emulation.py stands for Triton and Gluon."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from pageproof import optimized

from . import gluon_emulation

REPLACED = (
    (r"import triton\.experimental\.gluon\.language as (\w+)", r"import gluon_emulation as \1"),
    (r"from triton\.experimental import gluon", "import gluon_emulation as gluon"),
    (r"from triton\.experimental\.gluon\.language\.nvidia\.hopper import", "from gluon_emulation import"),
    (r"import triton\.language as tl", "import gluon_emulation as tl"),
    (r"import triton\b(?!\.)", "import gluon_emulation as triton"),
)


def load_kernels(folder: Path) -> ModuleType:
    """Import a copy of the kernels, made below `folder`: its module of the prefill for Hopper."""
    sys.modules["gluon_emulation"] = gluon_emulation
    package = f"emulated_kernels_{folder.name}"
    shutil.copytree(Path(optimized.__file__).parent / "kernels", folder / package)
    for path in (folder / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for pattern, name in REPLACED:
            text = re.sub(pattern, name, text)
        path.write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{package}.hopper.prefill")
    finally:
        sys.path.remove(str(folder))


def _pointers(group: Any) -> Any:
    if isinstance(group, torch.Tensor):
        return gluon_emulation.Pointer(group)
    return type(group)(*map(_pointers, group)) if isinstance(group, tuple) else group


def launch(kernels: ModuleType, step: Any, numbers: Any, sizes: Any, tile: Any, programs: int) -> int:
    """What `launch_hopper_prefill` does, one program after the other; returns how many elements were stored."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    caches = (SimpleNamespace(tensor=pages.base, shape=pages.base.shape) for pages in (step.cache.k, step.cache.v))
    groups = (step.queries, step.requests, step.rules, step.scales, step.outputs, step.work)
    queries, requests, rules, scales, outputs, work = map(_pointers, groups)
    # As a kernel takes a number: in float32.
    rules = rules._replace(softmax_scale=torch.tensor(rules.softmax_scale, dtype=torch.float32))
    arguments = (*caches, queries, requests, rules, scales, outputs, work, *numbers)
    gluon_emulation.stored.clear()
    for index in range(programs):
        gluon_emulation.program.index, gluon_emulation.program.count = index, programs
        kernels.hopper_prefill(*arguments, SIZES=replace(sizes, arithmetic=kinds[sizes.arithmetic.name]), TILE=tile)
    return sum(gluon_emulation.stored)
