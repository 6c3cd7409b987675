"""The fixed cases of the read set, compiled, under one of NVIDIA's checkers (docs/read_set.md, "On a GPU"):

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=tests/checkout:. \\
        compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitized.py

Every tensor is an allocation of its own then, and memory that nobody wrote stays so: this calls the kernels directly,
not by `execution.eager.run`, which fills what torch.empty gives. But for the plan's lists: programs ask for their first
item before they know whether there is one, and `initcheck` would call that a fault. There lies a request that no batch
has, so that `memcheck` names a program which uses it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from pageproof.optimized import Plan, call, make_plan, operators
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.building.tensors import build
from tests.read_set_cases import FIXED, LONGER

NO_REQUEST = 2**30


def filled_plan(batch: Any, capacity: Any, **options: Any) -> Plan:
    """What make_plan returns, in memory that was all written before."""
    plan = make_plan(batch, capacity, **options)
    for tensor in plan.tensors:
        tensor.fill_(NO_REQUEST)
    operators.call("make_plan", batch.cu_seqlens_q, batch.seq_lens, options["request_programs"], False, *plan.tensors)
    return plan


def main() -> str | None:
    """What is wrong, in words."""
    candidate, calls = Ours(), 0
    call.make_plan = filled_plan
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
