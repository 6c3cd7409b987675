"""The query bias of a case: masks of chains and random trees, or numbers with holes, made on the device.

A token's row in the matrix may be as wide as its request is long, so the host works out only what it needs for
the poison: which new keys no row sees. Both designs make that cheap. A tree is held as nested intervals, in
which an ancestor's contains its descendants'; in a dense bias a token sees itself, unless its key is hidden from
every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..case import Case
from .hashing import host_hashes
from .pages import Bools

_HOLE = 0.16  # one normal value in eight is nearer to 0 than this


@dataclass(frozen=True)
class BiasPlan:
    """What the host knows of a query bias, token by token of the requests."""

    hidden: Bools  # [num_live_tokens]: no row of the token's request sees the token's own key
    arrays: dict[str, NDArray[np.generic]]  # [num_tokens] each but for the columns, for `make_bias`


def plan_bias(case: Case) -> BiasPlan | None:
    """None if the case has no query bias."""
    if case.spec.query_bias == "none":
        return None
    live = sum(case.batch.query_lens)
    lengths = np.zeros(case.batch.num_tokens, dtype=np.int32)
    rows = np.zeros_like(lengths)
    query_lens = np.array(case.batch.query_lens, dtype=np.int64)
    lengths[:live] = np.repeat(query_lens, query_lens)
    rows[:live] = np.arange(live) - np.repeat(np.cumsum(query_lens) - query_lens, query_lens)
    drawn = host_hashes(case.seed, "query bias", live)
    arrays: dict[str, NDArray[np.generic]] = {
        "bias/rows": rows,
        "bias/lengths": lengths,
        "bias/firsts": np.arange(len(rows)) - rows,
        "bias/columns": np.arange(case.spec.bias_width, dtype=np.int32),
    }
    if case.spec.query_bias == "dense":
        hidden = (drawn % np.uint32(16) == 0) & (rows[:live] < case.spec.bias_width)
        arrays["bias/hidden"] = np.append(hidden, np.zeros(len(rows) - live, dtype=bool)).astype(np.int32)
        return BiasPlan(hidden, arrays)
    return _plan_tree(case, drawn, arrays)


def _plan_tree(case: Case, drawn: NDArray[np.uint32], arrays: dict[str, NDArray[np.generic]]) -> BiasPlan:
    """One token in sixteen sees no new key at all, but in a chain every one sees its own."""
    live = len(drawn)
    blind = (drawn % np.uint32(16) == 0) & (case.spec.query_bias != "chain")
    enters, exits = np.zeros(case.batch.num_tokens, dtype=np.int32), np.zeros(case.batch.num_tokens, dtype=np.int32)
    hidden = np.zeros(live, dtype=bool)
    start = 0
    for query_len in case.batch.query_lens:
        own = slice(start, start + query_len)
        enters[own], exits[own] = _intervals(_parents(case, drawn[own].tolist()))
        hidden[own] = _hidden_in_tree(case, blind[own], enters[own], exits[own])
        start += query_len
    arrays |= {"bias/enters": enters, "bias/exits": exits}
    blind = np.append(blind, np.zeros(len(enters) - live, dtype=bool))  # and no interval begins at -1 or before
    arrays |= {"bias/blind": blind.astype(np.int32), "bias/looks_from": np.where(blind, -1, enters).astype(np.int32)}
    return BiasPlan(hidden, arrays)


def _parents(case: Case, drawn: Sequence[int]) -> list[int]:
    """Every token's parent, an earlier one; -1 for a root. Only the first `bias_width` tokens have children.

    A chain has one root. One token in eight is a root of a "tree", which is as broad as it is deep, and one in 64 of
    a "deep" one, where most tokens follow the last one and the others its parent.
    """
    kind, width = case.spec.query_bias, case.spec.bias_width
    if kind == "chain":
        return [min(token, width) - 1 for token in range(len(drawn))]
    parents = []
    for token, number in enumerate(drawn):
        candidates = min(token, width)
        root = number >> 4 & (7 if kind == "tree" else 63) == 0
        chosen = (number >> 8) % max(candidates, 1) if kind == "tree" else candidates - 1 - (number >> 10 & 3 == 0)
        parents.append(-1 if root or candidates == 0 else chosen)
    return parents


def _intervals(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """Half-open intervals of a forest, an ancestor's around its descendants'."""
    sizes = [1] * len(parents)
    for token in range(len(parents) - 1, -1, -1):
        if parents[token] >= 0:
            sizes[parents[token]] += sizes[token]
    free = [0] * (len(parents) + 1)  # where the next child of a token begins; the last entry is for roots
    enters = []
    for token, parent in enumerate(parents):
        enters.append(free[parent])
        free[parent] += sizes[token]
        free[token] = enters[token] + 1
    return enters, [enter + size for enter, size in zip(enters, sizes, strict=True)]


def _hidden_in_tree(case: Case, blind: Bools, enters: NDArray[np.int32], exits: NDArray[np.int32]) -> Bools:
    """A blind token's key is seen by its descendants only, as far as a window lets them look back."""
    hidden = np.zeros(len(blind), dtype=bool)
    reach = case.spec.sliding_window or len(blind)
    for token in np.flatnonzero(blind[: case.spec.bias_width]).tolist():
        later = slice(token + 1, token + reach)
        descends = (enters[later] >= enters[token]) & (enters[later] < exits[token])
        hidden[token] = not (descends & ~blind[later]).any()
    return hidden


def make_bias(case: Case, values: Tensor | None, small: Mapping[str, Tensor]) -> Tensor:
    """[num_tokens, bias_width] float32; NaN where there is no such token or key. `values`: normal, for a dense one."""
    rows, lengths, firsts = (small[f"bias/{name}"][:, None] for name in ("rows", "lengths", "firsts"))
    columns = small["bias/columns"][None, :]
    tokens = (firsts + columns).clamp_(max=max(len(rows) - 1, 0))  # of each column's key; anything where there is none
    if values is None:
        looks_from = small["bias/looks_from"][:, None]
        visible = (small["bias/enters"][tokens] <= looks_from) & (looks_from < small["bias/exits"][tokens])
        bias = torch.where(visible, 0.0, -torch.inf)
    else:
        hole = (values.abs() < _HOLE) & (columns != rows) | (small["bias/hidden"][tokens] != 0)
        bias = values * 2.0
        if case.recipe == "extreme":
            bias = bias * torch.where(values.abs() > 2.25, 64.0, 1.0)
        bias.masked_fill_(hole, -torch.inf)
    return bias.masked_fill_(columns >= lengths, torch.nan if "d" in case.poison else 0.0)
