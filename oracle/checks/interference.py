"""What no row may see does not show: other garbage there, and every bit of the answer stays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...reference.problem import FLOAT8
from ..building.pages import poison_table
from .comparison import same_bits
from .finding import Finding
from .memory import bits_of, bits_of_number, copies, sent, sent_table
from .session import Session

_GARBAGE = -1.5e4  # finite: a kernel that drops NaN shows by it; and large enough to be seen in any sum
_FLOAT8_GARBAGE = -448.0
_BIAS_GARBAGE = 7.0


def interference(session: Session) -> Finding | None:
    """Slots that nobody may read, padding rows of q, unused table entries and bias of unseen keys hold other things.

    The answer was computed with NaN in them (or what the case's poison asks for); now they are finite and large.
    """
    batch, rules = session.arguments["batch"], session.arguments["rules"]
    changes = {**_caches(session), **_queries(session)}
    if rules.query_bias is not None:
        changes["rules"] = replace(rules, query_bias=_query_bias(session, rules.query_bias))
    problem = session.changed(**changes, batch=replace(batch, block_table=_block_table(session, batch.block_table)))
    return same_bits(session, session.run(problem), "after a change of what no row may read")


def _garbage(dtype: torch.dtype) -> float:
    return _FLOAT8_GARBAGE if dtype == FLOAT8 else _GARBAGE


def _caches(session: Session) -> dict[str, Tensor]:
    changed = copies(session.caches)
    for cache in changed.values():
        unreadable = sent(session.layout.unreadable_slots(cache.shape[1]), cache.device)
        mask = unreadable.view(*unreadable.shape, *[1] * (cache.dim() - 2))
        bits_of(cache).masked_fill_(mask, bits_of_number(_garbage(cache.dtype), cache))
    return changed


def _queries(session: Session) -> dict[str, Tensor]:
    live = sum(session.case.batch.query_lens)
    changed = copies(session.queries)
    for tensor in changed.values():
        bits_of(tensor)[live:] = bits_of_number(_garbage(tensor.dtype), tensor)
    return changed


def _block_table(session: Session, table: Tensor) -> Tensor:
    """Other garbage in the unused entries; without tier a, where they are 0, another page that exists."""
    case, layout = session.case, session.layout
    garbage = poison_table(replace(case, seed=case.seed + 1), layout.pages, layout.readable)
    if "a" not in case.poison:
        garbage = np.where((garbage < 0) | (garbage >= layout.pages.num_blocks), 1, garbage)
    return sent_table(garbage, table)


def _query_bias(session: Session, query_bias: Tensor) -> Tensor:
    """Every entry that no row adds to a score: of keys that do not exist, or that causality or a window hides."""
    rows = session.layout.rows
    contexts = rows.positions - rows.index
    limits = np.zeros((2, query_bias.shape[0]), dtype=np.int64)  # of padding rows: nothing
    limits[:, : len(contexts)] = rows.first - contexts, rows.end - contexts
    first, end = sent(limits, query_bias.device)[:, :, None]
    columns = torch.arange(query_bias.shape[1], device=query_bias.device)
    changed = copies({"": query_bias})[""]
    changed.masked_fill_((columns < first) | (columns >= end), _BIAS_GARBAGE)
    return changed
