"""Loading a mutant: a copy of the optimized package under a name of its own, with one place changed."""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path
from types import ModuleType

from ... import optimized, reference
from ..adapters.ours import Ours
from .catalogue import Mutant, find


def candidate(name: str) -> Ours:
    """The mutant as a candidate with our kernels' contract; loaded once per process."""
    return Ours(load(find(name)), name=f"mutant:{name}")


def load(mutant: Mutant) -> ModuleType:
    """Import the mutated copy. Its operators register under its own namespace, its types are the reference's."""
    package = f"pageproof_mutant_{mutant.name}"
    if f"{package}.optimized" in sys.modules:
        return sys.modules[f"{package}.optimized"]
    root = Path(tempfile.mkdtemp(prefix=f"{package}_"))
    # Unlike atexit, this also runs at the end of a process that multiprocessing started.
    Finalize(None, shutil.rmtree, args=(root,), kwargs={"ignore_errors": True}, exitpriority=0)
    shutil.copytree(Path(optimized.__file__).parent, root / "optimized", ignore=shutil.ignore_patterns("__pycache__"))
    apply(mutant, root / "optimized")
    namespace = ModuleType(package)
    namespace.__path__ = [str(root)]
    sys.modules[package] = namespace
    # `..reference` has to be the one and only reference, or its dataclasses would be other classes.
    original = reference.__name__
    for name, module in list(sys.modules.items()):
        if name == original or name.startswith(f"{original}."):
            sys.modules[f"{package}.reference{name.removeprefix(original)}"] = module
    return importlib.import_module(f"{package}.optimized")


def apply(mutant: Mutant, folder: Path) -> None:
    """Change the one place; a ValueError where the source no longer has it exactly once."""
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"mutant {mutant.name}: found its text {text.count(mutant.old)} times in {mutant.file}, expected once"
        )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
