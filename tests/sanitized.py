"""The fixed cases of the read set, compiled, under one of NVIDIA's checkers (docs/read_set.md, "On a GPU"):

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=tests/checkout:. \\
        compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitized.py

Every tensor is an allocation of its own then, and memory that nobody wrote stays so: this calls the kernels directly,
not by `execution.eager.run`, which fills what torch.empty gives.
"""

from __future__ import annotations

import sys

import torch

from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.building.tensors import build
from tests.read_set_cases import FIXED, LONGER


def main() -> str | None:
    """What is wrong, in words."""
    candidate, calls = Ours(), 0
    for name, case in (FIXED | LONGER).items():
        if candidate.declines(case) is not None:
            continue
        problem = build(case, torch.device("cuda"))
        candidate.call(case.spec.operation, dict(problem.arguments))
        torch.cuda.synchronize()
        calls += 1
        if found := problem.guards.violations():
            return f"{name}: {found}"
    sys.stdout.write(f"{calls} cases\n")
    return None if calls else "no case was run"


if __name__ == "__main__":
    sys.exit(main())
