"""Steps of attention without an answer: what the choice of a kernel for Hopper looks at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pageproof.optimized.kernels.arguments import (
    DeviceScales,
    PagedKV,
    ScoreRules,
    Step,
    WorkLists,
    outputs,
    queries,
)

BLOCKS, BLOCK_SIZE = 3, 16
RULES = ScoreRules(0.1, None, None, None, None, None)


def bfloat16(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.bfloat16)


def step(q: Tensor, *, cache: PagedKV, rope: Tensor | None = None, **changes: Any) -> Step:
    few = torch.zeros(8, dtype=torch.int32)
    plain = Step(
        queries(q, rope),
        cache,
        few.view(2, 4),
        RULES,
        DeviceScales(),
        outputs(torch.empty_like(q), torch.empty(q.shape[:2])),
        WorkLists(few, few, few, few),
    )
    return plain._replace(**changes)
