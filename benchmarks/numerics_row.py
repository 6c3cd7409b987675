"""One line of the table that numerics.py prints."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Row:
    """One measured constant. `measured <= assumed` is what the bound needs; without `assumed` it is information."""

    section: str
    what: str
    measured: float
    assumed: float | None
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.assumed is None or self.measured <= self.assumed

    @property
    def line(self) -> str:
        shown = 0 < self.measured < math.inf and self.assumed not in (None, 1.0)
        power = f"2^{math.log2(self.measured):.2f}" if shown else ""
        assumed = "" if self.assumed is None else f"{self.assumed:.4g}"
        verdict = "ok" if self.holds else "EXCEEDS"
        return f"{self.section:9}{self.what:78}{self.measured:<12.5g}{power:10}{assumed:12}{verdict:8}{self.note}"
