"""The same amount added to every score of a row moves its lse by that amount, and its output not at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..building.hashing import host_choice
from ..building.rule_values import scales
from .comparison import expected_rows, put_back, within
from .finding import Finding
from .memory import bits_of, bits_of_number, copies, gathered_rows, sent
from .orders import batch_of
from .session import Session
from .split import without_sinks

Floats = NDArray[np.float64]

_SHIFT = 4.0  # roughly; what is added is a power of two times the scales
_LARGEST = 256.0  # which float8 holds too


def shift(session: Session) -> Finding | None:
    """Every request twice in one batch: one dimension of all keys is 1, and of the queries first 0, then a number.

    That adds softmax_scale times the number (times the scales of q and k) to every score of the second half, exactly.
    Sinks, which would not move along, are off. The halves may be apart by the bounds of both.
    """
    case, rules = session.case, without_sinks(session)
    live = sum(case.batch.query_lens)
    index = torch.arange(live, device=session.arguments["out"].device)
    twice = index.repeat(2)
    if rules.query_bias is not None:
        rules = replace(rules, query_bias=gathered_rows({"": rules.query_bias}, twice, case)[""])
    numbers = _numbers(session)
    requests = np.tile(np.arange(case.batch.num_requests), 2)
    problem = session.changed(
        **_queries(session, twice, numbers), **_caches(session), batch=batch_of(session, requests), rules=rules
    )
    again = session.run(problem)
    bounds = {name: bound[:live] + bound[live:] for name, bound in session.expect(problem).bounds.items()}
    moved_by = sent(_score_units(session) * numbers, index.device).repeat_interleave(case.spec.group_size)
    values = {"out": again["out"][:live].double(), "lse": again["lse"][:live].double() + moved_by}
    moved = put_back(session, {name: tensor[live:] for name, tensor in again.items()}, index)
    return within(session, moved, "after a shift of all scores", expected_rows(session, index, values, bounds))


def _score_units(session: Session) -> Floats:
    """[num_kv_heads] float64: what a product of 1 adds to a score."""
    factors = scales(session.case)
    unit = np.full(session.case.spec.num_kv_heads, session.arguments["rules"].softmax_scale)
    for name in factors.keys() & {"q", "k"}:
        unit = unit * factors[name].astype(np.float64)
    return unit


def _numbers(session: Session) -> Floats:
    """[num_kv_heads] float64: powers of two, so that every format of a query holds them."""
    powers: Floats = np.exp2(np.round(np.log2(_SHIFT / _score_units(session))))
    return np.minimum(powers, _LARGEST)


def _dimension(session: Session) -> int:
    """Of q and k, or of the rotated part that MLA's queries and keys have."""
    spec = session.case.spec
    return host_choice(session.case.seed, "shifted dimension", spec.rope_head_size if spec.is_mla else spec.head_size)


def _queries(session: Session, twice: Tensor, numbers: Floats) -> dict[str, Tensor]:
    made = gathered_rows(session.queries, twice, session.case)
    q = made["q_pe" if session.case.spec.is_mla else "q"]
    column = bits_of(q)[..., _dimension(session)]
    live = twice.shape[0] // 2
    column[:live] = 0
    added = torch.from_numpy(np.repeat(numbers, session.case.spec.group_size)).to(q.dtype)
    column[live:] = bits_of(added).to(q.device)
    return made


def _caches(session: Session) -> dict[str, Tensor]:
    spec = session.case.spec
    changed = copies(session.caches)
    cache = changed["latent_cache" if spec.is_mla else "k_cache"]
    blocks, offsets = (sent(part, cache.device) for part in session.layout.written_places(spec.block_size))
    dimension = _dimension(session) + (spec.head_size if spec.is_mla else 0)
    bits_of(cache)[..., dimension][blocks, offsets] = bits_of_number(1.0, cache)
    return changed
