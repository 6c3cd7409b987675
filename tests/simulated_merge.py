"""merge_states in float32 torch, and seeded faults in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pageproof.oracle.candidate import NumericContract
from pageproof.oracle.case import Case

from .simulated_kernel import LOG2E, Simulated


@dataclass(frozen=True)
class SimulatedMerge:
    """A candidate for merge_states, with exp's declared error. `fault` names what is wrong with it."""

    fault: str = ""
    seed: int = 0
    name: str = "simulated merge"

    def declines(self, case: Case) -> str | None:
        return None

    def contract(self, case: Case) -> NumericContract:
        return NumericContract()

    def call(self, operation: str, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        outs = [arguments[name].float() for name in ("out_a", "out_b")]
        logs = [arguments[name] for name in ("lse_a", "lse_b")]
        exp = Simulated(seed=self.seed).exp
        highest = torch.maximum(*logs)
        shift = torch.where(highest.isfinite(), highest, 0.0)
        takes_all = highest == math.inf
        weights = [torch.where(takes_all, (lse == math.inf).float(), exp(lse - shift)) for lse in logs]
        total = weights[0] + weights[1]
        lse = torch.where(highest.isfinite(), shift + torch.log(total), highest)
        if self.fault == "weights swapped":
            weights.reverse()
        if self.fault == "weights not normalised":
            total = torch.ones_like(total)
        if self.fault == "lse of the larger part":
            lse = highest
        if self.fault == "lse in base 2":
            lse = lse * LOG2E
        pairs = zip(weights, outs, strict=True)
        first, second = (torch.where((w > 0)[..., None], w[..., None] * out, 0.0) for w, out in pairs)
        out = (first + second) / torch.where(total > 0, total, 1.0)[..., None]
        return out.to(arguments["out_a"].dtype), lse
