"""Every row looks up one key, and a value spells where it lies: what was found names what was read.

A value row holds the base-8 digits of its slot's offset, its page and its head, each digit plus one, over and
over; each time they are one higher modulo 8, so that neighbouring elements differ. All are integers from 1 to 8,
exact in every format.

Each query is the sign pattern of its target key, and keys are sign patterns of equal strength, so that the target
gets nearly all of the weight. Targets are what its row sees first and last, the keys just outside of that (which
then must get none), what lies on either side of a page's and of a tile's boundary, and any other; neighbouring rows
and heads have different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...case import Case
from ..hashing import host_hashes
from ..pages import Ints, Pages, lay_out
from ..poison import Slots
from .roles import TILES, Arrays, Values, roles, sign_of, strengths, value_size

_LOGIT = 40.0
_CHOICES = 8  # targets of one row; its heads take them in turns
_BITS = 3
_BASE = 2**_BITS
_PAGE, _OFFSET, _HEAD = range(3)  # a tag's fields


class Tag(NamedTuple):
    """Where a value lies; `offset` within its page."""

    page: int
    offset: int
    head: int


def plan(case: Case, pages: Pages, slots: Slots) -> Arrays:
    page, offset = np.divmod(slots.written, case.spec.block_size)
    fields, shifts, turns = np.array(_spelling(case, pages.num_blocks), dtype=np.int32).T
    return {
        "targets": _targets(case, pages, slots),
        "strengths": strengths(case, _LOGIT),
        "places": np.stack((page, offset), axis=1).astype(np.int32),
        "fields": fields,
        "shifts": shifts,
        "turns": turns,
    }


def shape_(case: Case, values: Values, small: Values) -> None:
    q, k, v = (values[name] for name in roles(case.spec))
    if "q_nope" in values:
        values["q_nope"].zero_()  # the latent is a tag, not a key
    k.copy_(sign_of(k))
    if k.shape[0]:
        heads = torch.arange(q.shape[1], device=q.device)
        targets = small["targets"][:, heads % _CHOICES]
        q.copy_(k[targets] if k.dim() == 2 else k[targets, heads // case.spec.group_size])
    k.mul_(small["strengths"] if k.dim() == 2 else small["strengths"][:, None])
    tags = _tags(case, small)
    v.copy_(tags[:, 0] if v.dim() == 2 else tags)


def decode(case: Case, row: Sequence[float]) -> Tag | None:
    """The tag that a whole value row spells, a quarter of a unit of error allowed; None if it spells none.

    row [value_size]: as it lies in the cache, before any scale.
    """
    pages = lay_out(case)
    numbers = [0, 0, 0]
    seen: set[tuple[int, int]] = set()
    spelling = _spelling(case, pages.num_blocks)
    for value, (field, shift, turn) in zip(row, spelling, strict=True):
        if not 0.75 <= value <= _BASE + 0.25:
            return None
        if (field, shift) not in seen:
            seen.add((field, shift))
            numbers[field] |= (round(value) - 1 - turn) % _BASE << shift
    tag = Tag(numbers[_PAGE], numbers[_OFFSET], numbers[_HEAD])
    spelled = [(numbers[field] >> shift) + turn for field, shift, turn in spelling]
    if len(seen) < len(_digits(case, pages.num_blocks)) or any(
        abs(value - digit % _BASE - 1) > 0.25 for value, digit in zip(row, spelled, strict=True)
    ):
        return None
    known = tag.page < pages.num_blocks and tag.offset < case.spec.block_size and tag.head < case.spec.num_kv_heads
    return tag if known else None


def _digits(case: Case, num_blocks: int) -> list[tuple[int, int]]:
    """(field, shift) of every digit, the lowest of each field first; a field of one number has none.

    A pool of one slot of one head has one tag, and one digit for it.
    """
    largest = {_OFFSET: case.spec.block_size - 1, _PAGE: num_blocks - 1, _HEAD: case.spec.num_kv_heads - 1}
    found = [
        (shift, order, field)
        for order, (field, number) in enumerate(largest.items())
        for shift in range(0, number.bit_length(), _BITS)
    ]
    return [(field, shift) for shift, _, field in sorted(found)] or [(_PAGE, 0)]


def _spelling(case: Case, num_blocks: int) -> list[tuple[int, int, int]]:
    """For every element of a value row: the field, the digit's shift, and what is added to the digit."""
    digits = _digits(case, num_blocks)
    return [(*digits[d % len(digits)], d // len(digits)) for d in range(value_size(case.spec))]


def _tags(case: Case, small: Values) -> Tensor:
    """[num_written, num_kv_heads, value_size] float32."""
    heads = torch.arange(case.spec.num_kv_heads, dtype=torch.int32, device=small["places"].device)
    fields, shifts = small["fields"], small["shifts"]
    places = torch.where(fields == _PAGE, small["places"][:, :1], small["places"][:, 1:])
    numbers = torch.where(fields == _HEAD, heads[:, None], places[:, None])
    digits: Tensor = ((numbers >> shifts) + small["turns"]) % _BASE
    return (digits + 1).float()


def _targets(case: Case, pages: Pages, slots: Slots) -> Ints:
    """[num_tokens, 8]: places among the written rows; any place for rows that see nothing."""
    spec, batch = case.spec, case.batch
    targets = np.zeros((batch.num_tokens, _CHOICES), dtype=np.int64)
    query_lens, seq_lens = (np.array(lens, dtype=np.int64) for lens in (batch.query_lens, batch.seq_lens))
    requests = np.repeat(np.arange(batch.num_requests), query_lens)
    rows = np.arange(len(requests)) - (np.cumsum(query_lens) - query_lens)[requests]
    positions = (seq_lens - query_lens)[requests] + rows
    ends = seq_lens[requests] - 1
    first = np.zeros_like(positions) if spec.sliding_window is None else positions - spec.sliding_window + 1
    last = positions if spec.causal else ends if spec.right_window is None else positions + spec.right_window
    first, last = np.maximum(first, 0), np.minimum(last, ends)
    sees = last >= first

    drawn = host_hashes(case.seed, "targets", 3 * len(requests)).reshape(3, -1).astype(np.int64)
    anywhere, other = first + drawn[:2] % np.where(sees, last - first + 1, 1)
    page = anywhere // spec.block_size * spec.block_size
    tile = np.array(TILES)[drawn[2] >> 8 & 3]
    tile = other // tile * tile - (drawn[2] >> 10 & 1)
    inside = np.clip(np.stack((first, last, page, page - 1, tile, anywhere)), first, last)
    outside = np.clip(np.stack((first - 1, last + 1)), 0, ends)
    choices = np.concatenate((inside, outside)).T
    turned = np.take_along_axis(choices, (np.arange(_CHOICES) + drawn[2][:, None]) % _CHOICES, axis=1)
    keys = turned[sees] + pages.key_starts[requests[sees]][:, None]
    targets[: len(requests)][sees] = np.maximum(slots.written_of_key[keys], 0)  # some keys nobody sees
    return targets
