"""Attention over the first keys and attention over the rest, merged by their lse, is attention over all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...reference.merge import merge_states
from ...reference.problem import Batch, Rules
from ..bound.evaluate import Expected
from ..building.hashing import host_hashes
from ..building.pages import Ints
from .comparison import Outputs, expected_rows, within
from .finding import Finding
from .layout import packed
from .memory import gathered_rows, gathered_slots, sent, sent_table
from .session import Session


def split(session: Session) -> Finding | None:
    """Requests twice in one batch, with a prefix and with the rest of the keys they see, and without a sink.

    The two are merged in float64 by the reference, and then with the sink, which is a part without values. The
    result is the whole within its bound and what the bounds of the parts come to in the merge.
    """
    requests = splittable(session)
    rows = np.flatnonzero(np.isin(session.layout.rows.requests, requests))
    index = sent(rows, session.arguments["out"].device)
    queries = gathered_rows(session.queries, index.repeat(2), session.case)
    cuts = _cuts(session, requests)
    problem = session.changed(**queries, **_halves(session, requests, cuts), rules=_rules(session, index))
    parts = session.run(problem)
    merged, bounds = _merge(session, _anchored(session, parts, cuts), session.expect(problem))
    bounds = {name: bound + session.expected.bounds[name][index] for name, bound in bounds.items()}
    expected = expected_rows(session, index, merged, bounds)
    return within(session, session.actual, "from prefix and suffix merged", expected)


def splittable(session: Session) -> Ints:
    """Requests of one new token; others too if all of their rows see all keys, whatever their position."""
    spec, query_lens = session.case.spec, np.array(session.case.batch.query_lens)
    limited = spec.causal or spec.sliding_window or spec.right_window is not None or spec.query_bias != "none"
    return np.flatnonzero((query_lens == 1) if limited else (query_lens > 0))


def without_sinks(session: Session) -> Rules:
    """The rules with all sinks -inf, where there are any: the same kernel, and nobody in the denominator but keys."""
    rules: Rules = session.arguments["rules"]
    return rules if rules.sinks is None else replace(rules, sinks=torch.full_like(rules.sinks, -torch.inf))


def _rules(session: Session, index: Tensor) -> Rules:
    """Without sinks; a prefix has no new key that a query bias could mean."""
    rules = without_sinks(session)
    if rules.query_bias is None:
        return rules
    bias = gathered_rows({"": rules.query_bias}, index.repeat(2), session.case)[""]
    bias[: index.shape[0]] = 0.0
    return replace(rules, query_bias=bias)


@dataclass(frozen=True)
class _Cuts:
    """Of each request that is split [requests]: the keys first .. cut - 1 and cut .. end - 1, and its new tokens."""

    first: Ints
    cut: Ints  # before `end`, so that the new tokens' own keys are in the second part, as their positions have it
    end: Ints
    query_lens: Ints


def _cuts(session: Session, requests: Ints) -> _Cuts:
    """Anywhere among what the first row sees, which is what all see."""
    case, rows = session.case, session.layout.rows
    query_lens = np.array(case.batch.query_lens, dtype=np.int64)
    first_rows = (np.cumsum(query_lens) - query_lens)[requests]
    first, end = rows.first[first_rows], rows.end[first_rows]
    drawn = host_hashes(case.seed, "cuts", len(requests)).astype(np.int64)
    return _Cuts(first, first + drawn % np.maximum(end - first, 1), end, query_lens[requests])


def _halves(session: Session, requests: Ints, cuts: _Cuts) -> dict[str, object]:
    """Caches and batch of all prefixes, followed by all suffixes, in pages of their own."""
    case, pages, batch = session.case, session.layout.pages, session.arguments["batch"]
    starts = pages.key_starts[requests]
    first, end = (np.concatenate(pair) for pair in ((cuts.first, cuts.cut), (cuts.cut, cuts.end)))
    keys = [
        pages.slot_of_key[slice(*pair)]
        for pair in zip(np.tile(starts, 2) + first, np.tile(starts, 2) + end, strict=True)
    ]
    packing = packed(keys, case.spec.block_size, batch.max_blocks)
    token_starts = np.cumsum(np.concatenate(([0], cuts.query_lens, cuts.query_lens)))
    return {
        **gathered_slots(session.caches, sent(packing.slots, batch.device), case),
        "batch": Batch(
            sent(token_starts.astype(np.int32), batch.device),
            sent((end - first).astype(np.int32), batch.device),
            sent_table(packing.table, batch.block_table),
        ),
    }


def _anchored(session: Session, parts: Outputs, cuts: _Cuts) -> Outputs:
    """The parts in float64, the prefixes' lse with ALiBi measured from where the tokens really stand."""
    wide = {name: tensor.double() for name, tensor in parts.items()}
    slopes = session.arguments["rules"].alibi_slopes
    if slopes is not None:
        distances = sent(np.repeat(cuts.cut - cuts.end, cuts.query_lens), slopes.device).double()
        wide["lse"][: len(distances)] += distances[:, None] * slopes.double()
    return wide


def _merge(session: Session, parts: Outputs, expected: Expected) -> tuple[Outputs, Outputs]:
    """The merged (out, lse) in float64, and how far they may be from the exact ones.

    With every lse within lambda of the exact one, no weight is off by a factor of more than e^(2 lambda). So
    |out - exact| <= e^(2 lambda) sum w_i delta_i + (e^(2 lambda) - 1) sum w_i |o_i|, and lse is within lambda.
    """
    rows = parts["lse"].shape[0] // 2
    (out_a, out_b), (lse_a, lse_b) = (parts[name].split(rows) for name in ("out", "lse"))
    out, lse = merge_states(out_a, lse_a, out_b, lse_b)
    sinks = session.arguments["rules"].sinks
    if sinks is not None:
        out, lse = merge_states(out, lse, torch.zeros_like(out), sinks.double().expand_as(lse).contiguous())
    lse_bounds = torch.stack(expected.bounds["lse"].split(rows))
    wrong = torch.where(torch.stack((lse_a, lse_b)) == -torch.inf, 0.0, lse_bounds).amax(dim=0)
    growth = torch.expm1(2 * wrong)[..., None]
    bound = torch.zeros_like(out)
    sides = zip((out_a, out_b), (lse_a, lse_b), expected.bounds["out"].split(rows), strict=True)
    for part, part_lse, part_bound in sides:
        weight = _weight(part_lse, lse)[..., None]
        bound += torch.where(weight > 0, weight * ((1 + growth) * part_bound + growth * part.abs()), 0.0)
    return {"out": out, "lse": lse}, {"out": bound.nan_to_num(nan=torch.inf), "lse": wrong}


def _weight(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part - whole); a part that is empty, or beside an infinite sink, weighs nothing."""
    return torch.where((part == -torch.inf) | (whole == torch.inf), 0.0, torch.exp(part - whole))
