"""Attention over the first keys and attention over the rest, merged by their lse, is attention over all of them."""

from __future__ import annotations

from dataclasses import replace

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
    """Every request twice in one batch, with a prefix and with a suffix of its keys, and without a sink.

    The two are merged in float64 by the reference, and then with the sink, which is a part without values. The
    result is the whole within its bound and what the bounds of the parts come to in the merge.
    """
    requests = splittable(session)
    rows = np.flatnonzero(np.isin(session.layout.rows.requests, requests))
    index = sent(rows, session.arguments["out"].device)
    changes = {**_halves(session, requests), **gathered_rows(session.queries, index.repeat(2), session.case)}
    problem = session.changed(**changes, rules=without_sinks(session))
    parts = session.run(problem)
    merged, bounds = _merge(session, parts, session.expect(problem), len(rows))
    bounds = {name: bound + session.expected.bounds[name][index] for name, bound in bounds.items()}
    expected = expected_rows(session, index, merged, bounds)
    return within(session, session.actual, "from prefix and suffix merged", expected)


def splittable(session: Session) -> Ints:
    """Requests whose rows see all keys, whatever their position."""
    query_lens = np.array(session.case.batch.query_lens)
    return np.flatnonzero((query_lens == 1) if session.case.spec.causal else (query_lens > 0))


def without_sinks(session: Session) -> Rules:
    """The rules with all sinks -inf, where there are any: the same kernel, and nobody in the denominator but keys."""
    rules: Rules = session.arguments["rules"]
    return rules if rules.sinks is None else replace(rules, sinks=torch.full_like(rules.sinks, -torch.inf))


def _halves(session: Session, requests: Ints) -> dict[str, object]:
    """Caches and batch of all prefixes, followed by all suffixes, in pages of their own; cuts lie anywhere."""
    case, pages, batch = session.case, session.layout.pages, session.arguments["batch"]
    query_lens = np.array(case.batch.query_lens, dtype=np.int64)[requests]
    seq_lens = np.array(case.batch.seq_lens, dtype=np.int64)[requests]
    cuts = host_hashes(case.seed, "cuts", len(requests)).astype(np.int64) % (seq_lens + 1)
    starts = pages.key_starts[requests]
    bounds = [*zip(starts, starts + cuts, strict=True), *zip(starts + cuts, starts + seq_lens, strict=True)]
    packing = packed([pages.slot_of_key[first:end] for first, end in bounds], case.spec.block_size, batch.max_blocks)
    token_starts = np.cumsum(np.concatenate(([0], query_lens, query_lens))).astype(np.int32)
    lengths = np.array([end - first for first, end in bounds], dtype=np.int32)
    return {
        **gathered_slots(session.caches, sent(packing.slots, batch.device), case),
        "batch": Batch(
            sent(token_starts, batch.device),
            sent(lengths, batch.device),
            sent_table(packing.table, batch.block_table),
        ),
    }


def _merge(session: Session, parts: Outputs, expected: Expected, rows: int) -> tuple[Outputs, Outputs]:
    """The merged (out, lse) in float64, and how far they may be from the exact ones.

    With every lse within lambda of the exact one, no weight is off by a factor of more than e^(2 lambda). So
    |out - exact| <= e^(2 lambda) sum w_i delta_i + (e^(2 lambda) - 1) sum w_i |o_i|, and lse is within lambda.
    """
    (out_a, out_b), (lse_a, lse_b) = (parts[name].double().split(rows) for name in ("out", "lse"))
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
