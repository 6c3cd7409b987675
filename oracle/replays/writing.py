"""The KV update that comes before attention in a step: which rows it writes to which slots.

A built case has its caches filled. Here the new tokens' part of them is taken out again as rows, to be written by the
candidate's own update in the same step that then reads it. Afterwards every bit of the pool has to be as it was built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...reference.problem import Scales
from ..building.pages import Ints, Pages
from ..building.poison import hides_nan
from ..building.problem import Problem
from ..case import FLOAT8, Case, Spec
from ..checks.memory import bits_of, sent
from ..formats import torch_dtype

_SIGN_BITS = {1: 0x80, 2: -0x8000, 4: -(1 << 31)}


def update_of(case: Case) -> Case:
    """The case of the KV update that belongs to an attention case."""
    spec = case.spec
    operation = "update_mla_cache" if spec.is_mla else "update_kv_cache"
    scales = spec.scales if spec.kv_dtype == FLOAT8 else "none"
    return replace(case, spec=replace(spec, operation=operation, q_dtype="", out_dtype="", scales=scales))


@dataclass(frozen=True)
class Writing:
    """Rows for a bucket's tokens and where they go, and what the slots hold until then."""

    operation: str
    rows: dict[str, Tensor]  # key and value, or latent and k_pe: [bucket's tokens, ...]; NaN where nothing is written
    slot_mapping: Tensor  # [bucket's tokens] int64; -1 for padding and for slots that nobody may read
    scales: Scales | None
    blocks: Tensor  # [written] int64, with offsets the slots on the device
    offsets: Tensor
    finished: dict[str, Tensor]  # cache name -> integers [written, ...]: the slots after the update
    stale: dict[str, Tensor]  # the same before it

    def put(self, caches: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> None:
        """`finished` or `stale` into caches of this layout."""
        for name, bits in slots.items():
            bits_of(caches[name])[self.blocks, self.offsets] = bits


def new_slots(case: Case, pages: Pages) -> Ints:
    """[num_tokens]: the slot of each token's own key; -1 where it has none, or where other keys lie in it as well."""
    slots = np.full(case.batch.num_tokens, -1, dtype=np.int64)
    query_lens, seq_lens = (np.array(lens, dtype=np.int64) for lens in (case.batch.query_lens, case.batch.seq_lens))
    requests = np.repeat(np.arange(len(query_lens)), query_lens)
    starts = seq_lens - query_lens - (np.cumsum(query_lens) - query_lens)
    positions = np.arange(len(requests)) + starts[requests]
    rows = np.flatnonzero(positions >= 0)
    mine = pages.slot_of_key[pages.key_starts[requests[rows]] + positions[rows]]
    slots[rows] = np.where(np.bincount(pages.slot_of_key, minlength=1)[mine] == 1, mine, -1)
    return slots


def writing_of(problem: Problem, caches: Mapping[str, Tensor], *, rewrites: bool) -> Writing:
    """The update that leaves the caches of an attention problem as they were built; needs no answer from the device.

    rewrites: the slots hold other values until then, those of tokens that were rejected; else NaN.
    """
    case, first = problem.case, next(iter(caches.values()))
    numbers = _finite_slots(problem)
    written = np.flatnonzero(numbers >= 0)
    places = numbers, written, *np.divmod(numbers[written], case.spec.block_size)
    mapping, tokens, blocks, offsets = sent(np.concatenate(places), first.device).split([*map(len, places)])
    held = {name: bits_of(cache)[blocks, offsets] for name, cache in caches.items()}
    scales = problem.arguments["scales"]
    rows = {name: bits.view(first.dtype) for name, bits in held.items()}
    return Writing(
        operation=update_of(case).spec.operation,
        rows=_rows(case.spec, rows, tokens, scales, len(numbers)),
        slot_mapping=mapping,
        scales=None if scales is None else Scales(k=scales.k, v=None if case.spec.is_mla else scales.v),
        blocks=blocks,
        offsets=offsets,
        finished=held,
        stale={name: _other_bits(bits, rewrites=rewrites) for name, bits in held.items()},
    )


def _finite_slots(problem: Problem) -> Ints:
    """`new_slots`, but -1 for those of which nobody may see the key, where they hold NaN."""
    case, key_slots = problem.case, problem.key_slots
    assert key_slots is not None
    numbers = new_slots(case, key_slots.pages)
    if not hides_nan(case):
        return numbers
    readable = np.zeros(key_slots.pages.num_blocks * case.spec.block_size + 1, dtype=bool)  # the last one is that of -1
    readable[key_slots.slots.written] = True
    return np.where(readable[numbers], numbers, -1)


def _other_bits(bits: Tensor, *, rewrites: bool) -> Tensor:
    """Others: of the negative values, or NaN."""
    return bits ^ _SIGN_BITS[bits.element_size()] if rewrites else torch.full_like(bits, _all_ones(bits))


def _all_ones(bits: Tensor) -> int:
    """NaN in every format."""
    return 0xFF if bits.dtype == torch.uint8 else -1


def _rows(
    spec: Spec, held: Mapping[str, Tensor], tokens: Tensor, scales: Scales | None, num_tokens: int
) -> dict[str, Tensor]:
    """What the update stores as exactly these rows: a float8 value times its scale, which the store divides by."""
    dtype = torch_dtype(spec.dtype)
    made = {}
    for name, rows in held.items():
        scale = None if scales is None else (scales.v if name == "v_cache" else scales.k)
        wide = rows if scale is None else rows.float() * scale.view(-1, 1)
        whole = torch.full((num_tokens, *rows.shape[1:]), torch.nan, dtype=dtype, device=rows.device)
        whole[tokens] = wide.to(dtype)
        made[name] = whole
    if spec.is_mla:
        latent = made["latent_cache"]
        return {"latent": latent[:, : spec.head_size], "k_pe": latent[:, spec.head_size :]}
    return {"key": made["k_cache"], "value": made["v_cache"]}
