"""Which way the packages import each other, read from their source; and that every module can be imported."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("reference", "optimized", "oracle")
FILES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = [
    ".".join(["pageproof", *Path(file).with_suffix("").parts]).removesuffix(".__init__")
    for file in FILES
    if not file.endswith("__main__.py")
]

# What a file may import beside the standard library and its own package. The longest prefix with a rule decides.
ALLOWED = {
    "reference/": {"torch"},
    "optimized/": {"torch", "triton", "reference.errors", "reference.problem", "reference.validation"},
    "optimized/interpreter.py": {"torch", "triton", "numpy"},  # Triton's interpreter is written in numpy
    "oracle/": {"torch", "numpy", "reference"},
    "oracle/campaign/progress.py": {"rich"},
    "oracle/execution/graphs/launches.py": {"torch", "triton"},
    "oracle/execution/tracing.py": {"torch", "numpy", "triton"},
    "oracle/adapters/": {"torch", "numpy", "reference"},
    "oracle/adapters/ours.py": {"torch", "numpy", "reference", "optimized"},
    "oracle/mutants/": {"torch", "numpy", "reference", "optimized"},
    "oracle/strategies.py": {"torch", "numpy", "reference", "hypothesis"},
    "oracle/pytest_plugin.py": {"torch", "pytest"},
}
ADAPTERS = "oracle/adapters/"  # these may import any third-party package, inside a function


class Import(NamedTuple):
    line: int
    target: str  # of ours, from the top folder on: "reference.problem"
    relative: bool
    inside_function: bool


def find_imports(tree: ast.AST, path: str, *, inside_function: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(node.lineno, name.name, False, inside_function)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield Import(node.lineno, node.module or "", False, inside_function)
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                yield Import(node.lineno, _relative_target(path, node, name.name), True, inside_function)
        opens = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from find_imports(node, path, inside_function=inside_function or opens)


def _relative_target(path: str, node: ast.ImportFrom, name: str) -> str:
    folders = path.split("/")[:-1]
    base = folders[: len(folders) + 1 - node.level] + (node.module.split(".") if node.module else [])
    # What `from ..reference import problem` names may be a module; if so, it is the target.
    is_module = not base or ROOT.joinpath(*base, f"{name}.py").exists()
    return ".".join([*base, name] if is_module else base)


def violations(path: str, source: str) -> list[str]:
    """One line for each import that the file at `path` may not have."""
    rule = max((prefix for prefix in ALLOWED if path.startswith(prefix)), key=len)
    found = []
    for item in find_imports(ast.parse(source), path):
        root = item.target.split(".")[0]
        ours = root in PACKAGES or root == "pageproof"
        allowed = any(item.target == name or item.target.startswith(f"{name}.") for name in ALLOWED[rule])
        if ours and not item.relative:
            found.append(f"{path}:{item.line}: {item.target}: import our own packages relatively")
        elif root in sys.stdlib_module_names or root == path.split("/")[0] or allowed:
            continue
        elif ours or not (item.inside_function and path.startswith(ADAPTERS)):
            found.append(f"{path}:{item.line}: {item.target}: beside its own package it may import {ALLOWED[rule]}")
    return found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("reference/attention.py", "import numpy"),
        ("reference/attention.py", "import triton.language as tl"),
        ("reference/attention.py", "from ..optimized import attention"),
        ("reference/attention.py", "from .. import oracle"),
        ("reference/attention.py", "import reference"),
        ("reference/attention.py", "from pageproof.reference import problem"),
        ("optimized/attention.py", "from ..reference.attention import attention"),
        ("optimized/attention.py", "from ..reference import attention"),
        ("optimized/attention.py", "from ..oracle import case"),
        ("optimized/attention.py", "import numpy"),
        ("optimized/kernels/decode.py", "from ...reference import kv_cache"),
        ("oracle/judging.py", "def f():\n    import triton"),
        ("oracle/judging.py", "from ..optimized.attention import attention"),
        ("oracle/judging.py", "from hypothesis import strategies"),
        ("oracle/judging.py", "if TYPE_CHECKING:\n    import pytest"),
        ("oracle/judging.py", "from rich import console"),
        ("oracle/execution/eager.py", "from ...optimized import plan"),
        ("oracle/execution/eager.py", "import triton"),
        ("oracle/mutants/loading.py", "import triton"),
        ("oracle/strategies.py", "import pytest"),
        ("oracle/adapters/reference.py", "def f():\n    from ...optimized import attention"),
        ("oracle/adapters/vllm.py", "import vllm"),
    ],
)
def test_a_forbidden_import_is_reported(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "reference/attention.py",
            "import math\nimport torch.nn\nfrom . import visibility\nfrom .problem import Batch",
        ),
        (
            "optimized/kernels/decode.py",
            "import triton\nfrom ...reference.problem import Rules\nfrom ..plan import Plan",
        ),
        ("oracle/execution/eager.py", "import numpy\nfrom ..case import Case\nfrom ... import reference"),
        ("oracle/campaign/progress.py", "from rich.live import Live"),
        ("oracle/execution/tracing.py", "def f():\n    from triton.runtime import interpreter"),
        ("oracle/adapters/ours.py", "from ... import optimized"),
        ("oracle/adapters/vllm.py", "def f():\n    import vllm"),
    ],
)
def test_an_allowed_import_is_not(path: str, source: str) -> None:
    assert violations(path, source) == []


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file: str) -> None:
    assert violations(file, (ROOT / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    assert importlib.import_module(module).__name__ == module


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pageproof.reference", ["triton", "pageproof.optimized", "pageproof.oracle"]),
        ("pageproof.optimized", ["pageproof.oracle", "pytest", "hypothesis"]),
        ("pageproof.oracle.judging", ["pageproof.optimized", "pytest", "hypothesis"]),
        ("pageproof.oracle.pytest_plugin", ["torch", "triton", "numpy"]),
        ("pageproof.oracle.shrinking", ["torch", "triton", "numpy"]),
    ],
)
def test_a_fresh_process_loads_nothing_that_it_does_not_need(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; sys.exit(', '.join(sorted({set(absent)} & set(sys.modules))) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
