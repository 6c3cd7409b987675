"""What the numbers in q, K and V are, so that a wrong kernel shows: each recipe makes a class of bugs visible.

| recipe | data | shows |
|---|---|---|
| normal | independent values | gross faults, in every lse a dropped key |
| needle | a few keys at edges get nearly all of the weight, with values four times as large | masks off by one |
| one_hot | V rows are hashed basis vectors: out[d] is the weight of the keys with hash d | dropped, doubled keys |
| one_hot_full | V is the identity over a chunk of the keys, 0 elsewhere: out[d] is one weight | a weight off by 1% |
| census | one_hot with equal scores: out[d] is a count over a total | faults of keys whose weight would be small |
| tagged | a query looks up one key, whose value spells its page, slot and head | wrong pages, slots, heads by name |
| extreme | one of `VARIANTS` | maxima, overflow, saturation, order of operations |
| cancel | large parts of scores and values cancel | sums, partial results and operands that are rounded |

A recipe works on float32 values of the rows that are written, before the cast and without the poison. For MLA
it works on the parts that scores and values have in plain sight: q_pe and k_pe, and the latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...case import Case
from ..pages import Pages
from ..poison import Slots
from . import cancel, extreme, needle, one_hot, tagged
from .extreme import VARIANTS, variant
from .needle import needles
from .roles import Arrays, Values, gains, roles

__all__ = ["VARIANTS", "needles", "plan", "shape_", "variant"]


@dataclass(frozen=True)
class _Recipe:
    """What the host works out of a case, and what becomes of its independent values on the device."""

    plan: Callable[[Case, Pages, Slots], Arrays]
    shape_: Callable[[Case, Values, Values], None]


_RECIPES = {
    "needle": _Recipe(needle.plan, needle.shape_),
    "one_hot": _Recipe(one_hot.plan, one_hot.shape_),
    "one_hot_full": _Recipe(one_hot.plan_full, one_hot.shape_),
    "census": _Recipe(one_hot.plan, one_hot.shape_census_),
    "tagged": _Recipe(tagged.plan, tagged.shape_),
    "extreme": _Recipe(extreme.plan, extreme.shape_),
    "cancel": _Recipe(cancel.plan, cancel.shape_),
}


def plan(case: Case, pages: Pages, slots: Slots) -> Arrays:
    """The small arrays that `shape_` needs on the device."""
    arrays: Arrays = {"gains": gains(case)}
    if case.recipe in _RECIPES:
        arrays |= _RECIPES[case.recipe].plan(case, pages, slots)
    return arrays


def shape_(case: Case, values: Values, small: Values) -> None:
    """Turn independent values of q, k and v (MLA: q_pe, k_pe and latent) into the case's recipe, in place."""
    k = values[roles(case.spec)[1]]
    if case.spec.scales != "none":
        k.mul_(small["gains"][:, None] if k.dim() == 3 else small["gains"])  # scores stay near 1, whatever the scales
    if case.recipe in _RECIPES:
        _RECIPES[case.recipe].shape_(case, values, small)
