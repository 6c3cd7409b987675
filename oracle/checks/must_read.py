"""A key at an edge matters to every row that sees it, by as much as its weight says, and to no other row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...reference.problem import Rules
from ..bound.evaluate import Expected
from ..building.hashing import host_hashes
from ..building.pages import Ints
from .comparison import within
from .finding import Finding
from .layout import LiveRows
from .memory import bits_of, bits_of_number, copies, sent
from .session import Session

_VALUE = 256.0  # far from any usual value, and exact in every format
_LATENT_VALUE = 16.0  # half of a score as well, which must not get out of hand
_TILES = (32, 64, 128, 256)


def must_read(session: Session) -> Finding | None:
    """One key of each request, at an edge, gets a value of 256.

    Rows that do not see it keep their answer exactly. In the others the answer moves as far as the reference's
    does, to within the bounds of both runs; where the key weighs enough, that is far outside of them.
    """
    keys = edge_keys(session)
    problem = session.changed(**_changed_caches(session, keys))
    again = session.run(problem)
    moved = _moved(session, session.expect(problem), _sees(session, keys))
    return within(session, again, "after a change of the value of an edge key", moved)


def edge_keys(session: Session) -> Ints:
    """[num_requests]: a key at an edge, in a slot that is no other key's; -1 where a request has none.

    Edges: both ends of what the first, the middle and the last row see, and page, tile and split boundaries.
    """
    case, pages = session.case, session.layout.pages
    rows = session.layout.rows
    owners = np.bincount(pages.slot_of_key, minlength=pages.num_blocks * case.spec.block_size)
    usable = session.layout.readable & (owners[pages.slot_of_key] == 1)
    drawn = host_hashes(case.seed, "edge keys", len(case.batch.seq_lens)).tolist()
    starts = np.cumsum((0, *case.batch.query_lens)).tolist()
    chosen = np.full(len(drawn), -1, dtype=np.int64)
    for request, (length, number) in enumerate(zip(case.batch.seq_lens, drawn, strict=True)):
        start = int(pages.key_starts[request])
        keys = [
            key
            for key in _edges(rows, starts[request], starts[request + 1], case.spec.block_size, number % max(length, 1))
            if 0 <= key < length and usable[start + key]
        ]
        if keys:
            chosen[request] = keys[number // 64 % len(keys)]
    return chosen


def _edges(rows: LiveRows, start: int, stop: int, block_size: int, anywhere: int) -> list[int]:
    """Keys that may be out of range, of the request whose rows are start .. stop - 1."""
    keys = []
    for row in (start, (start + stop) // 2, stop - 1) if stop > start else ():
        keys += [int(rows.first[row]), int(rows.end[row]) - 1]
    for size in (block_size, *_TILES):
        keys += [anywhere // size * size, anywhere // size * size - 1]
    return sorted(set(keys))


def _changed_caches(session: Session, keys: Ints) -> dict[str, Tensor]:
    pages, spec = session.layout.pages, session.case.spec
    chosen = np.flatnonzero(keys >= 0)
    slots = pages.slot_of_key[pages.key_starts[chosen] + keys[chosen]]
    changed = copies(session.caches)
    cache = changed["latent_cache" if spec.is_mla else "v_cache"]
    blocks, offsets = sent(np.stack(np.divmod(slots, spec.block_size)), cache.device)
    values = cache[..., : spec.head_size] if spec.is_mla else cache
    bits_of(values)[blocks, offsets] = bits_of_number(_LATENT_VALUE if spec.is_mla else _VALUE, cache)
    return changed


def _sees(session: Session, keys: Ints) -> Tensor:
    """[num_tokens] bool: the row may see its request's chosen key."""
    rows = session.layout.rows
    rules: Rules = session.arguments["rules"]
    num_tokens = session.case.batch.num_tokens
    key = keys[rows.requests]
    visible = np.zeros(num_tokens, dtype=bool)
    visible[: len(key)] = (key >= rows.first) & (key < rows.end)
    sees = sent(visible, session.arguments["out"].device)
    if rules.query_bias is None:
        return sees
    column = np.full(num_tokens, -1, dtype=np.int64)
    column[: len(key)] = key - (rows.positions - rows.index)
    columns = sent(column, sees.device)
    width = rules.query_bias.shape[1]
    entry = rules.query_bias.gather(1, columns.clamp(0, width - 1)[:, None])[:, 0]
    return sees & ~((columns >= 0) & (columns < width) & (entry == -torch.inf))


def _moved(session: Session, after: Expected, sees: Tensor) -> Expected:
    """The first run's outputs moved as the reference's moved; exactly the first run's where the key is not seen."""
    values, bounds = {}, {}
    for name, tensor in session.actual.items():
        seen = sees.view(-1, *[1] * (tensor.dim() - 1))
        found, before = tensor.double(), session.expected.values[name]
        finite = before.isfinite() & after.values[name].isfinite()
        start = torch.where(finite, found - before, 0.0)
        allowed = after.bounds[name] + torch.where(finite, session.expected.bounds[name], 0.0)
        values[name] = torch.where(seen, start + after.values[name], found)
        bounds[name] = torch.where(seen, allowed, 0.0)
    return replace(after, values=values, bounds=bounds)
