"""The order in which keys, pages and requests come is nobody's concern."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ...reference.problem import Batch
from ..building.hashing import host_hashes
from ..building.pages import Ints
from .comparison import put_back, same_bits, twice_bounded, within
from .finding import Finding
from .memory import copies, gathered_rows, gathered_slots, sent
from .session import Session


def key_order(session: Session) -> Finding | None:
    """Keys that all rows of their request see change places: within the bounds of both orders.

    A key that is dropped, doubled or weighed wrongly because of where it lies is then another one.
    """
    slots: Ints = np.arange(session.layout.pages.num_blocks * session.case.spec.block_size)
    for group in _exchangeable_slots(session):
        slots[group] = group[_shuffled(session, f"key order {group[0]}", len(group))]
    slots = slots.reshape(-1, session.case.spec.block_size)
    device = session.arguments["out"].device
    problem = session.changed(**gathered_slots(session.caches, sent(slots, device), session.case))
    what = "when keys that all rows see change places"
    return within(session, session.run(problem), what, twice_bounded(session))


def page_order(session: Session) -> Finding | None:
    """The same keys in other pages, and a block table that says so: every bit stays."""
    pages, batch = session.layout.pages, session.arguments["batch"]
    old_of_new = _shuffled(session, "page order", pages.num_blocks)
    new_of_old = np.argsort(old_of_new)
    block_size = session.case.spec.block_size
    slots = old_of_new[:, None] * block_size + np.arange(block_size)
    caches = gathered_slots(session.caches, sent(slots, batch.device), session.case)
    table = copies({"": batch.block_table})[""]
    moved = sent(new_of_old.astype(np.int32), batch.device)[table.clamp(0, pages.num_blocks - 1).long()]
    table.copy_(torch.where((table >= 0) & (table < pages.num_blocks), moved, table))
    problem = session.changed(**caches, batch=replace(batch, block_table=table))
    return same_bits(session, session.run(problem), "when the keys lie in other pages")


def request_order(session: Session) -> Finding | None:
    """Requests in another order, a quarter of them left out: within the bounds of both batches.

    Not bit for bit: how keys are split among programs may depend on who else is in the batch.
    """
    case, rules = session.case, session.arguments["rules"]
    requests = _fewer_requests(session)
    rows = _rows_of(session, requests)
    index = sent(rows, session.arguments["out"].device)
    changes = gathered_rows(session.queries, index, case)
    if rules.query_bias is not None:
        bias = gathered_rows({"": rules.query_bias}, index, case)[""]
        changes |= {"rules": replace(rules, query_bias=bias)}
    problem = session.changed(**changes, batch=batch_of(session, requests))
    again = put_back(session, session.run(problem), index)
    return within(session, again, "in another order of requests, with some left out", twice_bounded(session))


def batch_of(session: Session, requests: Ints) -> Batch:
    """A batch of these requests of the case, in this order; one may come twice."""
    case, batch = session.case, session.arguments["batch"]
    query_lens, seq_lens = (
        np.array(lens, dtype=np.int32)[requests] for lens in (case.batch.query_lens, case.batch.seq_lens)
    )
    starts = np.concatenate((np.zeros(1, dtype=np.int32), np.cumsum(query_lens, dtype=np.int32)))
    table = gathered_rows({"": batch.block_table}, sent(requests, batch.device), case)[""]
    return Batch(sent(starts, batch.device), sent(seq_lens, batch.device), table)


def _exchangeable_slots(session: Session) -> list[Ints]:
    """For each request the slots of the keys that all of its rows see and that are no other key's."""
    case, pages, rows = session.case, session.layout.pages, session.layout.rows
    owners = np.bincount(pages.slot_of_key, minlength=pages.num_blocks * case.spec.block_size)
    starts = np.cumsum((0, *case.batch.query_lens))
    groups = []
    for request, (n, length) in enumerate(zip(case.batch.query_lens, case.batch.seq_lens, strict=True)):
        if n == 0:
            continue
        own = slice(int(starts[request]), int(starts[request + 1]))
        end = int(rows.end[own].min())
        if case.spec.query_bias != "none":
            end = min(end, length - n)  # an entry belongs to the place of its key
        keys = np.arange(int(rows.first[own].max()), max(end, 0)) + pages.key_starts[request]
        slots = pages.slot_of_key[keys]
        groups.append(slots[owners[slots] == 1])
    return [group for group in groups if len(group) > 1]


def _fewer_requests(session: Session) -> Ints:
    """A random order of three quarters of the requests, at least one of those with new tokens among them."""
    query_lens = np.array(session.case.batch.query_lens)
    order = _shuffled(session, "request order", len(query_lens))
    kept = order[: -(-3 * len(order) // 4)]
    return kept if query_lens[kept].any() else order


def _rows_of(session: Session, requests: Ints) -> Ints:
    """The buffers' rows of these requests, in this order."""
    query_lens = np.array(session.case.batch.query_lens, dtype=np.int64)
    starts = np.cumsum(query_lens) - query_lens
    return np.concatenate([starts[r] + np.arange(query_lens[r]) for r in requests.tolist()])


def _shuffled(session: Session, name: str, count: int) -> Ints:
    return np.argsort(host_hashes(session.case.seed, name, count), kind="stable")
