"""What a finished case really has: its feature values, its compile key, how many keys its rows see.

The values are read from the case, not from the row it was made from. One number can be several values at once (a
window of 2 beside pages of one slot is "2" and "page+1"), so a case has a set of traits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..case import ATTENTION_OPERATIONS, FLOAT8, BatchShape, Case, Spec
from .parameters import BY_NAME, NONE, SAME, Value

TILES = (16, 32, 64, 128)
NEAR_TILES = frozenset(tile + delta for tile in TILES for delta in (-1, 0, 1))
SPECULATIVE = 16  # at most so many new tokens count as a speculative step
TIGHT_SOFTCAP = 5.0  # below, ordinary scores are bent
LONG = 1024  # keys of a case that counts as long


def traits(case: Case) -> frozenset[tuple[str, Value]]:
    """(parameter, value) for everything that applies to this case."""
    spec = case.spec
    found: set[tuple[str, Value]] = {("operation", spec.operation), ("recipe", case.recipe), ("mode", case.mode)}
    found.update((name, value) for name, value in _plain(spec))
    found.update(("batch", kind) for kind in batch_kinds(case.batch))
    found.add(("padding", _padding(case.batch)))
    found.add(("spare_blocks", case.batch.spare_blocks))
    if spec.operation in ATTENTION_OPERATIONS:
        found.update(_rules(spec, case.batch))
    return frozenset(
        (name, value)
        for name, value in found
        if spec.operation in BY_NAME[name].operations and value in BY_NAME[name].values
    )


def _plain(spec: Spec) -> Iterator[tuple[str, Value]]:
    for name in ("dtype", "num_kv_heads", "group_size", "rope_head_size", "nope_head_size"):
        yield name, getattr(spec, name)
    for name in ("block_size", "cache_layout", "odd_strides"):
        yield name, getattr(spec, name)
    for name in ("kv_dtype", "q_dtype", "out_dtype"):
        yield name, getattr(spec, name) or SAME
    if FLOAT8 in (spec.kv_dtype, spec.q_dtype, spec.out_dtype):
        yield "scales", spec.scales
    yield "kv_lora_rank" if spec.is_mla else "head_size", spec.head_size
    yield "v_head_dim", spec.head_size_v
    if not spec.is_mla:
        smaller = spec.head_size_v < spec.head_size
        yield "head_size_v", SAME if spec.head_size_v == spec.head_size else "smaller" if smaller else "larger"


def _rules(spec: Spec, batch: BatchShape) -> Iterator[tuple[str, Value]]:
    for name in ("causal", "alibi", "sinks", "query_bias"):
        yield name, getattr(spec, name)
    yield "table_slack", batch.table_slack > 0
    yield "shared_blocks", shares_pages(spec, batch)
    yield "repeated_blocks", repeats_pages(spec, batch)
    yield "softcap", NONE if spec.softcap is None else "tight" if spec.softcap < TIGHT_SOFTCAP else "usual"
    longest, widest = max(batch.seq_lens, default=0), max(batch.query_lens, default=0)
    yield from (("sliding_window", kind) for kind in window_kinds(spec.sliding_window, spec.block_size, longest))
    yield from (("right_window", kind) for kind in right_window_kinds(spec.right_window, spec.block_size, longest))
    if spec.query_bias != NONE:
        width = spec.bias_width
        yield "bias_width", "exact" if width == widest else "narrow" if width < widest else "wide"


def window_kinds(window: int | None, page: int, longest: int) -> list[str]:
    """Every name that fits a sliding window."""
    if window is None:
        return [NONE]
    named = {"1": 1, "2": 2, "page-1": page - 1, "page+1": page + 1, "longest": longest, "longest+1": longest + 1}
    kinds = [kind for kind, width in named.items() if width == window]
    return kinds + ["tile"] * (window in NEAR_TILES) + ["large"] * (window > longest + 1)


def right_window_kinds(window: int | None, page: int, longest: int) -> list[str]:
    """Every name that fits a right window."""
    if window is None:
        return [NONE]
    named = {"0": 0, "1": 1, "page": page}
    return [kind for kind, width in named.items() if width == window] + ["large"] * (window > longest)


def batch_kinds(batch: BatchShape) -> list[str]:
    """Every name that fits a batch; what is empty or hangs over goes by that alone."""
    live = [(n, length) for n, length in zip(batch.query_lens, batch.seq_lens, strict=True) if n]
    idle = any(length and not n for n, length in zip(batch.query_lens, batch.seq_lens, strict=True))
    over = any(n > length for n, length in live)
    if not live and not idle:
        return ["nothing"]
    if idle or over:
        return ["idle"] * idle + ["overhang"] * over
    decodes = [n == 1 for n, _ in live]
    kinds = {
        "decode": all(decodes),
        "prefill": all(1 < n == length for n, length in live),
        "chunked": all(1 < n < length for n, length in live),
        "speculative": all(1 < n <= SPECULATIVE and n < length for n, length in live),
        "mixed": any(decodes) and not all(decodes),
    }
    return [kind for kind, fits in kinds.items() if fits]


def shares_pages(spec: Spec, batch: BatchShape) -> bool:
    """Whether two requests read the same page."""
    shared = batch.shared_blocks
    return shared > 0 and sum(length >= shared * spec.block_size for length in batch.seq_lens) >= 2


def repeats_pages(spec: Spec, batch: BatchShape) -> bool:
    """Whether the campaign's own rule has put a page into one request's table twice."""
    return batch.repeated_blocks and max(batch.seq_lens, default=0) > spec.block_size


def _padding(batch: BatchShape) -> str:
    requests = any(not n and not length for n, length in zip(batch.query_lens, batch.seq_lens, strict=True))
    if batch.padding_tokens:
        return "both" if requests else "tokens"
    return "requests" if requests else NONE


def visible_keys(case: Case) -> int:
    """The most keys that the rules let one token see, masks aside; 0 for updates and merges, which read none."""
    spec, batch = case.spec, case.batch
    if spec.operation not in ATTENTION_OPERATIONS:
        return 0
    most = 0
    for n, length in set(zip(batch.query_lens, batch.seq_lens, strict=True)):
        # The number of visible keys rises, stays and falls with the position: its bends and ends hold the maximum.
        bends = (0, length - 1, (spec.sliding_window or 0) - 1, length - 1 - (spec.right_window or 0))
        for position in {min(max(bend, length - n), length - 1) for bend in bends} if n else ():
            first = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
            end = length if spec.right_window is None else min(length, position + spec.right_window + 1)
            most = max(most, (min(end, position + 1) if spec.causal else end) - first)
    return most


def compile_key(spec: Spec) -> Spec:
    """The spec without the numbers that a kernel takes as data: windows, softcap and bias stay on or off."""
    return replace(
        spec,
        sliding_window=None if spec.sliding_window is None else 1,
        right_window=None if spec.right_window is None else 0,
        softcap=None if spec.softcap is None else 1.0,
        query_bias=NONE if spec.query_bias == NONE else "dense",
        bias_width=0,
    )
