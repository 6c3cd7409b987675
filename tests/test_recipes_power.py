"""For each recipe a fault of a single key, or of a rounding, that leaves its bound there but not in independent values.

Rows see 4,096 keys and weights are rounded to 16 bits. What the statistical checks, which are asked of independent
values only, would find besides does not count here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof.oracle import BatchShape, Case, NumericContract, Spec, judge
from pageproof.reference.attention import Answer, answer, weigh

from .planted import Planted, times

SPEC = Spec(head_size=80, head_size_v=64)
LONG = BatchShape(query_lens=(1,), seq_lens=(4096,))
SEEDS = range(6)


@dataclass
class FoldedScale(Planted):
    """The softmax scale is multiplied into q, which is then rounded once more."""

    def wrong(self, part: Answer) -> Answer:
        scale = torch.tensor(80**-0.5)
        folded = (part.rows.q.float() * scale).half().double() / scale.double()
        return answer(replace(part.rows, q=folded), self.rules)

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        self.rules = arguments["rules"]
        super().call(operation, arguments)


@dataclass
class NarrowSums(Planted):
    """The sum of P V is kept in bfloat16 from tile to tile."""

    def wrong(self, part: Answer) -> Answer:
        p, v = part.weights.p, part.rows.v
        largest = p.amax(-1, keepdim=True)
        total = torch.zeros_like(part.out)
        for start in range(0, p.shape[-1], 32):
            tile = slice(start, start + 32)
            total = (total + weigh(p[..., tile] / largest, v[:, tile])).bfloat16().double()
        return replace(part, out=total * largest)


def last_value_of_its_neighbour(part: Answer) -> Tensor:
    values = part.rows.v.clone()
    values[:, -1] = values[:, -2]
    return values


HALF = NumericContract(p_dtype="float16", tile_keys=32)
FAULTS: dict[str, tuple[str, Planted, dict[str, Any], int]] = {
    # what is wrong -> (recipe, candidate, what the case has to be, least number of seeds that show it)
    "a key of little weight is dropped": ("census", Planted(factors=times(100, 0.0)), {}, 6),
    "a value is read one slot off": ("tagged", Planted(values=last_value_of_its_neighbour), {}, 2),
    "a weight is a tenth too small": ("one_hot_full", Planted(factors=times(4095, 0.9)), {}, 3),
    "the scale is rounded into q": ("cancel", FoldedScale(arithmetic=HALF), {"dtype": "float16"}, 2),
    "sums in bfloat16": ("cancel", NarrowSums(), {}, 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_leaves_the_bound_only_in_its_recipe(fault: str) -> None:
    recipe, candidate, formats, least = FAULTS[fault]
    case = Case(spec=replace(SPEC, **formats), batch=LONG)
    shown = hidden = 0
    for seed in SEEDS:
        for name in (recipe, "normal"):
            judge(replace(case, recipe=name, seed=seed), Planted(arithmetic=candidate.arithmetic)).require()
        hidden += judge(replace(case, seed=seed), candidate).check != "bound"
        shown += judge(replace(case, recipe=recipe, seed=seed), candidate).check == "bound"
    assert shown >= least
    assert hidden >= 2
