"""The reference with a fault planted into the weights or the values of chosen keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.candidate import NumericContract
from pageproof.oracle.case import Case
from pageproof.reference.attention import Answer, attention_rows, collect, weigh
from pageproof.reference.mla import mla_attention_decompressed_rows, mla_attention_rows

ROWS: dict[str, tuple[Callable[..., Iterator[Answer]], tuple[str, ...]]] = {
    "attention": (attention_rows, ("q", "k_cache", "v_cache")),
    "mla_attention": (mla_attention_rows, ("q_nope", "q_pe", "latent_cache")),
    "mla_attention_decompressed": (
        mla_attention_decompressed_rows,
        ("q_nope", "q_pe", "latent_cache", "w_uk", "w_uv"),
    ),
}


@dataclass
class Planted(Reference):
    """`factors` says what becomes of every weight, `values` what becomes of the values; both see the whole answer."""

    factors: Callable[[Answer], Tensor] | None = None  # [G, T, L], broadcast over heads
    values: Callable[[Answer], Tensor] | None = None  # [G, L, Hkv, Dv]
    arithmetic: NumericContract = field(default_factory=lambda: NumericContract(p_dtype="bfloat16", tile_keys=64))
    name: str = "planted"

    def contract(self, case: Case) -> NumericContract:
        return self.arithmetic

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        rows_of, names = ROWS[operation]
        rest = [arguments[name] for name in ("batch", "rules", "scales")]
        answers = (self.wrong(part) for part in rows_of(*(arguments[name] for name in names), *rest))
        out, lse = arguments["out"], arguments["lse"]
        like = arguments[names[0]]
        collect(answers, tuple(out.shape), like=like, out=out, lse=lse, scales=arguments["scales"])

    def wrong(self, part: Answer) -> Answer:
        """The answer with unnormalised weights times the factors; 1 leaves a key that is seen as it is.

        A key that is not seen has weight 0 and takes its own weight at any factor above 0.
        """
        rows, scores, weights = part.rows, part.scores, part.weights
        y = scores.y if scores.bias is None else scores.y + scores.bias
        shift = torch.where(weights.maximum.isfinite(), weights.maximum, 0.0)
        factors = rows.visible.double() if self.factors is None else self.factors(part)
        mass = torch.where(factors[:, None, None] > 0, torch.exp(y - shift[..., None]), 0.0) * factors[:, None, None]
        sink = torch.exp(weights.sink[None, :, :, None] - shift)
        total = mass.sum(dim=-1) + sink
        p = mass / torch.where(total > 0, total, 1.0)[..., None]
        out = weigh(p, rows.v if self.values is None else self.values(part))
        return replace(part, out=out, weights=replace(weights, p=p, lse=shift + torch.log(total)))


def times(key: int, factor: float) -> Callable[[Answer], Tensor]:
    """Every request's weight of this key times a factor."""

    def factors(part: Answer) -> Tensor:
        chosen = (part.rows.keys == key)[:, None]
        return part.rows.visible * torch.where(chosen, factor, 1.0)

    return factors
