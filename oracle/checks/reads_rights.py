"""What the contract lets a call touch, element by element.

Where the contract leaves room, docs/read_set.md says what was decided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..building.problem import Problem
from ..case import ATTENTION_OPERATIONS
from ..execution.tracing import Bools
from .reads_sight import Sight, as_numpy


@dataclass(frozen=True)
class Rights:
    """Of one tensor: which elements may be read, have to be read, and are to be stored, once each and no others.

    Each broadcasts to the tensor's shape. `forbidden` and `needed` say, of an element that was or was not, why.
    """

    may_read: Bools | bool = True
    must_read: Bools | bool = False
    stores: Bools | bool = False
    forbidden: str = ""
    needed: str = ""


OUTPUT = Rights(may_read=False, stores=True, forbidden="which is only to be written")


def rights_of(problem: Problem, sight: Sight | None) -> dict[str, Rights]:
    """By the names of `reads_memory.regions`; a tensor that is not in here may be read and need not be."""
    operation = problem.case.spec.operation
    if operation == "merge_states":
        return _of_merge(problem)
    if operation not in ATTENTION_OPERATIONS:
        return _of_update(problem)
    assert sight is not None
    return _of_attention(problem, sight)


def _of_attention(problem: Problem, sight: Sight) -> dict[str, Rights]:
    spec = problem.case.spec
    open_heads = ~sight.decided
    matters = bool(open_heads.any())
    live = sight.request_of_token >= 0
    needed_rows = np.any(sight.sees, axis=1, keepdims=True) & open_heads
    query = Rights(
        live[:, None, None], needed_rows[:, :, None], forbidden="which no request has", needed="which sees keys"
    )
    found = {name: query for name in ("q", "q_nope", "q_pe")}
    block_size = spec.block_size
    visible: Bools = np.asarray(sight.sees.any(axis=0)).reshape(-1, block_size)
    if spec.is_mla:
        names, may, must = ["latent_cache"], visible[..., None], visible[..., None] & matters
    else:
        heads = np.asarray(open_heads.reshape(spec.num_kv_heads, spec.group_size).any(axis=1))
        names, may = ["k_cache", "v_cache"], visible[..., None, None]
        must = may & heads[None, None, :, None]
    found |= {name: Rights(may, must, forbidden="which no row may see", needed="which a row sees") for name in names}
    found["batch.block_table"] = Rights(must_read=sight.entries & matters, needed="whose page holds a visible key")
    found["rules.query_bias"] = Rights(
        sight.bias, sight.bias_used & matters, forbidden="of a key or a token that does not exist",
        needed="whose key no other rule hides",
    )  # fmt: skip
    return found | {"out": OUTPUT, "lse": OUTPUT}


def _of_update(problem: Problem) -> dict[str, Rights]:
    slots = as_numpy(problem.arguments["slot_mapping"])
    found = {"slot_mapping": Rights(must_read=True, needed="which says where a row goes")}
    for name in ("key", "value", "latent", "k_pe"):
        if name in problem.arguments:
            rows = np.arange(problem.arguments[name].shape[0])
            real = rows < len(slots)
            stored = np.zeros(len(rows), dtype=bool)
            stored[: len(slots)] = slots >= 0
            shape = (-1, *[1] * (problem.arguments[name].dim() - 1))
            found[name] = Rights(
                real.reshape(shape), stored.reshape(shape), forbidden="a row that has no slot",
                needed="a row that is to be stored",
            )  # fmt: skip
    for name, cache in problem.outputs.items():
        mapped = np.zeros(cache.shape[0] * cache.shape[1], dtype=bool)
        mapped[slots[slots >= 0]] = True
        mapped = mapped.reshape(*cache.shape[:2], *[1] * (cache.dim() - 2))
        found[name] = Rights(may_read=False, stores=mapped, forbidden="which is only to be written")
    return found


def _of_merge(problem: Problem) -> dict[str, Rights]:
    """The part that has the larger lse decides; of two equal ones both do, unless they are empty."""
    lse_a, lse_b = (as_numpy(problem.arguments[name]) for name in ("lse_a", "lse_b"))
    found = {"out": OUTPUT, "lse": OUTPUT}
    for part, own, other in (("a", lse_a, lse_b), ("b", lse_b, lse_a)):
        decides = (own >= other) & (own > -np.inf)
        found[f"lse_{part}"] = Rights(must_read=True, needed="which says what its part weighs")
        found[f"out_{part}"] = Rights(must_read=decides[..., None], needed="whose part weighs the most")
    return found
