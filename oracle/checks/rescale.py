"""Factors of two that cancel change no bit: arithmetic in binary does not see them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ...reference.problem import FLOAT8, Scales
from .comparison import same_bits
from .finding import Finding
from .memory import copies
from .session import Session


def rescale(session: Session) -> Finding | None:
    """Twice q (float8: twice its scale), twice the scale of a float8 K, and softmax_scale halved for each.

    Beside a float8 out with a scale, the scales of V and of out are doubled as well. Nothing here overflows: queries
    stay below 2**11, sums of products in float32 below 2**100; and doubling loses nothing.
    """
    rules, scales = session.arguments["rules"], session.arguments.get("scales") or Scales()
    doubled = _doubled_scales(session, scales)
    changes: dict[str, Any] = {}
    halvings = sum(doubled[name] is not getattr(scales, name) for name in ("q", "k"))
    if all(tensor.dtype != FLOAT8 for tensor in session.queries.values()):
        halvings += 1
        changes = {name: tensor.mul_(2) for name, tensor in copies(session.queries).items()}
    if session.arguments.get("scales") is not None:
        changes["scales"] = Scales(**doubled)
    problem = session.changed(**changes, rules=replace(rules, softmax_scale=rules.softmax_scale / 2**halvings))
    return same_bits(session, session.run(problem), "after factors of two that cancel")


def _doubled_scales(session: Session, scales: Scales) -> dict[str, Tensor | None]:
    """q's and k's, and v's together with out's; an MLA row's scale is the values' as well, and stays."""
    names = {"q"} if session.case.spec.is_mla else {"q", "k"}
    if scales.v is not None and scales.out is not None:
        names |= {"v", "out"}
    present = {name: getattr(scales, name) for name in ("q", "k", "v", "out")}
    return {name: scale * 2 if name in names and scale is not None else scale for name, scale in present.items()}
