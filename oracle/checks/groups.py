"""Heads that change places, with everything that is theirs, take their answers with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...reference.problem import Scales
from ..building.hashing import host_choice, host_hashes
from ..building.pages import Ints
from .comparison import same_bits, twice_bounded, within
from .finding import Finding
from .memory import bits_of, copies, sent
from .session import Session


def groups(session: Session) -> Finding | None:
    """Kv heads in another order, each with its query heads, scales, slopes and sinks: bit for bit the same answers.

    With one kv head, MLA's too, its query heads change places, within the bounds of both orders: rows of a tile may
    be multiplied by other instructions.
    """
    heads = session.case.spec.num_kv_heads
    order = another_order(session, heads if heads > 1 else session.case.spec.num_query_heads)
    grouped = np.arange(session.case.spec.num_query_heads).reshape(len(order), -1)[order].reshape(-1)
    device = session.arguments["out"].device
    index = sent(grouped, device)
    changes = _by_query_head(session, index)
    if heads > 1:
        changes |= _by_kv_head(session, sent(order, device))
    again = session.run(session.changed(**changes))
    # Head i now has what was head index[i]'s.
    inverse = sent(np.argsort(grouped), device)
    back = {name: bits_of(tensor)[:, inverse].view(tensor.dtype) for name, tensor in again.items()}
    if heads > 1:
        return same_bits(session, back, "when kv heads change places")
    return within(session, back, "when query heads change places", twice_bounded(session))


def another_order(session: Session, count: int) -> Ints:
    """A random order of 0 .. count - 1 that is not this one."""
    order = np.argsort(host_hashes(session.case.seed, "head order", count), kind="stable")
    if (order == np.arange(count)).all():
        order = np.roll(order, 1 + host_choice(session.case.seed, "head turn", count - 1))
    return order


def _by_query_head(session: Session, index: Tensor) -> dict[str, Any]:
    rules = session.arguments["rules"]
    own = {name: getattr(rules, name) for name in ("alibi_slopes", "sinks") if getattr(rules, name) is not None}
    changes: dict[str, Any] = _reordered(session.queries, 1, index)
    weights: dict[str, Tensor] = {
        name: session.arguments[name] for name in ("w_uk", "w_uv") if name in session.arguments
    }
    changes |= _reordered(weights, 0, index)
    changes["rules"] = replace(rules, **{name: tensor[index] for name, tensor in own.items()})
    return changes


def _by_kv_head(session: Session, index: Tensor) -> dict[str, Any]:
    changes: dict[str, Any] = _reordered(session.caches, 2, index)
    scales = session.arguments.get("scales")
    if scales is not None:
        own = {name: getattr(scales, name) for name in ("q", "k", "v", "out")}
        changes["scales"] = Scales(
            **{name: scale[index] if scale is not None and scale.numel() > 1 else scale for name, scale in own.items()}
        )
    return changes


def _reordered(tensors: Mapping[str, Tensor], dimension: int, index: Tensor) -> dict[str, Tensor]:
    changed = copies(tensors)
    for name, tensor in changed.items():
        bits_of(tensor).copy_(torch.index_select(bits_of(tensors[name]), dimension, index))
    return changed
