"""Several new tokens at once are as many single ones, each at its own length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from ...reference.problem import Batch
from ..building.hashing import host_hashes
from ..building.pages import Ints
from ..building.query_bias import plan_bias
from ..case import TREES
from .comparison import put_back, twice_bounded, within
from .finding import Finding
from .layout import packed
from .memory import gathered_rows, gathered_slots, sent, sent_table
from .session import Session

# Tiles of 32 keys, by kv head, that the single tokens may see together.
_BUDGET = {"cpu": 32, "cuda": 2**13}
_MOST_ROWS = 256  # a row's keys are looked up one row at a time


def sequential(session: Session) -> Finding | None:
    """Row t of a request of several is what a single token decodes at that length, within the bounds of both.

    Under a tree mask the single token's keys are those that the tree shows it, put into pages of their own. Of many
    rows some are asked: the first and the last of every request before others.
    """
    rows = chosen_rows(session)
    changes = _of_trees(session, rows) if session.case.spec.query_bias in TREES else _of_chains(session, rows)
    index = sent(rows, session.arguments["out"].device)
    problem = session.changed(**gathered_rows(session.queries, index, session.case), **changes)
    again = put_back(session, session.run(problem), index)
    return within(session, again, "when the tokens are decoded one by one", twice_bounded(session))


def chosen_rows(session: Session) -> Ints:
    """Rows of requests with several, ascending, as many as may be asked."""
    live, query_lens = session.layout.rows, np.array(session.case.batch.query_lens)
    several = np.flatnonzero(query_lens[live.requests] > 1)
    at_end = (live.index == 0) | (live.index == query_lens[live.requests] - 1)
    drawn = host_hashes(session.case.seed, "sequential", len(live.requests))
    order = several[np.lexsort((drawn[several], ~at_end[several]))][:_MOST_ROWS]
    costs = np.cumsum((live.end[order] // 32 + 1) * session.case.spec.num_kv_heads)
    device = session.arguments["out"].device.type
    return np.sort(order[: max(1, int((costs <= _BUDGET.get(device, _BUDGET["cpu"])).sum()))])


def _of_chains(session: Session, rows: Ints) -> dict[str, object]:
    """The same pages, and every token a request that ends with what it sees."""
    live, batch = session.layout.rows, session.arguments["batch"]
    requests = sent(live.requests[rows], batch.device)
    table = gathered_rows({"": batch.block_table}, requests, session.case)[""]
    return {"batch": replace(_single_tokens(session, live.end[rows]), block_table=table)}


def _of_trees(session: Session, rows: Ints) -> dict[str, object]:
    batch, rules = session.arguments["batch"], session.arguments["rules"]
    case, pages = session.case, session.layout.pages
    seen = list(_seen_in_trees(session, rows))
    packing = packed([pages.slot_of_key[keys] for keys in seen], case.spec.block_size, batch.max_blocks)
    single = _single_tokens(session, np.array([len(keys) for keys in seen]))
    bias = gathered_rows({"": rules.query_bias}, sent(rows, batch.device), case)[""].zero_()
    return {
        **gathered_slots(session.caches, sent(packing.slots, batch.device), case),
        "batch": replace(single, block_table=sent_table(packing.table, batch.block_table)),
        "rules": replace(rules, query_bias=bias),
    }


def _seen_in_trees(session: Session, rows: Ints) -> Iterable[Ints]:
    """The keys that each row sees, as numbers through all requests."""
    case, pages, live = session.case, session.layout.pages, session.layout.rows
    plan = plan_bias(case)
    assert plan is not None
    enters, exits, blind = (plan.arrays[f"bias/{name}"] for name in ("enters", "exits", "blind"))
    for row in rows.tolist():
        start = row - int(live.index[row])  # of the request's rows, whose keys are the last ones
        context = int(live.positions[row] - live.index[row])
        keys = np.arange(live.first[row], live.end[row])
        columns = keys - context
        has_entry = (columns >= 0) & (columns < case.spec.bias_width)
        tokens = start + np.where(has_entry, columns, 0)
        shown = (enters[tokens] <= enters[row]) & (enters[row] < exits[tokens]) & (blind[row] == 0)
        yield keys[~has_entry | shown] + pages.key_starts[live.requests[row]]


def _single_tokens(session: Session, seq_lens: Ints) -> Batch:
    """Requests of one token each; the block table is still to be made."""
    device = session.arguments["out"].device
    starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32, device=device)
    table = torch.zeros(len(seq_lens), 0, dtype=torch.int32, device=device)
    return Batch(starts, sent(seq_lens.astype(np.int32), device), table)
