"""If all values are one, an output is what the sink leaves: 1 - exp(sink - lse)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...reference.casting import per_query_head
from ...reference.problem import FLOAT8, Scales
from ..bound.formats import U
from ..formats import FLOAT8_LARGEST
from .comparison import Outputs, within
from .finding import Finding
from .memory import bits_of, bits_of_number, copies, sent
from .session import Session


def ones(session: Session) -> Finding | None:
    """Every value that may be read becomes 1, and the output follows from the candidate's own lse.

    1 without a sink, 0 in an empty row, times the value's scale; and the lse keeps its bits. MLA: all latents become
    1 (the rotated parts still tell keys apart), so decompressed a value is the sum of its row of w_uv.
    """
    problem = session.changed(**_caches_of_ones(session))
    again = session.run(problem)
    expected = session.expect(problem)
    out, allowed = _from_lse(session, again, expected.bounds["lse"])
    # Keys make the lse, and of MLA's keys values are a part.
    lse = (again if session.case.spec.is_mla else session.actual)["lse"].double()
    values = {"out": out, "lse": lse}
    bounds = {"out": expected.bounds["out"] + allowed, "lse": torch.zeros_like(lse)}
    return within(session, again, "where all values are 1", replace(expected, values=values, bounds=bounds))


def _caches_of_ones(session: Session) -> dict[str, Tensor]:
    spec = session.case.spec
    changed = copies(session.caches)
    cache = changed["latent_cache"][..., : spec.head_size] if spec.is_mla else changed["v_cache"]
    blocks, offsets = (sent(part, cache.device) for part in session.layout.written_places(spec.block_size))
    bits_of(cache)[blocks, offsets] = bits_of_number(1.0, cache)
    return changed


def _from_lse(session: Session, again: Outputs, lse_bounds: Tensor) -> tuple[Tensor, Tensor]:
    """The out that the candidate's lse asks for, as it is stored, and how far a wrong lse may move it."""
    lse = again["lse"].double()
    sinks = session.arguments["rules"].sinks
    sink = torch.full_like(lse, -torch.inf) if sinks is None else sinks.double().expand_as(lse)
    # An empty row has the lse of its sink, -inf without one, as padding has in any case; a sink of +inf takes all.
    taken = torch.where((lse == sink) | (lse == -torch.inf), 1.0, torch.exp(sink - lse))
    kept = 1 - taken
    moved = torch.where(taken == 0, 0.0, taken * torch.expm1(lse_bounds))
    value = _value(session)
    out, wrong = kept[..., None] * value, moved[..., None] * value.abs()
    scales = session.arguments.get("scales") or Scales()
    out_scale = per_query_head(scales.out, lse.shape[1])
    if out_scale is not None:
        out, wrong = out / out_scale, wrong / out_scale
    if again["out"].dtype == FLOAT8:
        out = out.clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST)
    return out, wrong * (1 + U)


def _value(session: Session) -> Tensor:
    """The one value that all keys have, float64 [num_query_heads, head_size_v]."""
    arguments = session.arguments
    heads, width = arguments["out"].shape[1:]
    scales = arguments.get("scales") or Scales()
    scale = per_query_head(scales.k if session.case.spec.is_mla else scales.v, heads)
    one = torch.ones(heads, width, dtype=torch.float64, device=arguments["out"].device)
    if "w_uv" in arguments:
        one = arguments["w_uv"].double().sum(dim=2)
    return one if scale is None else one * scale
