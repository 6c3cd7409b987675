"""Our kernels touch exactly what the contract lets each request touch, and a kernel that does not is found."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pageproof.optimized.interpreter import INTERPRETED
from pageproof.oracle import Case
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.building.tensors import build
from pageproof.oracle.checks.reads import wrong_accesses
from pageproof.oracle.mutants.catalogue import Mutant
from pageproof.oracle.mutants.loading import load

from .read_set_cases import FIXED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, not interpreted")


@pytest.mark.parametrize("case", FIXED.values(), ids=FIXED)
def test_ours_touches_what_it_may_and_all_of_it(case: Case) -> None:
    assert wrong_accesses(Ours(), build(case)) == []


TILES, ATTEND = "kernels/tiles.py", "kernels/attend.py"
WINDOW_START = "start = tl.maximum(tile.first_position - numbers.sliding_window + 1, 0)"
TABLE_LOAD = "tl.load(row + keys // SIZES.block_size, mask"
BLOCK = "block = next_blocks.to(tl.int64)"

ROW_MASK = "mask = rows.mask[:, None] & (dims < SIZE)[None, :]"

# Name -> (the case it shows in, file, what stands there, what is planted, how what is said begins).
PLANTED = {
    "one key left of the window": (
        "window", TILES, WINDOW_START, WINDOW_START.replace(" + 1", ""),
        r"k_cache: reads slot 15 of page \d+ \(key 31 of request 0\), which no row may see \(2 such slots\); v",
    ),
    "one key short of the window": (
        "window", TILES, WINDOW_START, WINDOW_START.replace(" + 1", " + 2"),
        r"k_cache: never reads slot 1 of page \d+ \(key 1 of request 1\), which a row sees \(2 such slots\)",
    ),
    "one key past the length": (
        "right window", TILES, "    end = span.seq_len\n", "    end = span.seq_len + 1\n",
        r"k_cache: reads slot 9 of page \d+ \(past the 9 keys of request 1\), which no row may see",
    ),
    "the last key left out of one tile": (
        "prefill", TILES, "end = tl.minimum(end, tile.last_position + 1)",
        "end = tl.where(tile.last_position + 1 < end, tl.minimum(end, tile.last_position), end)",
        r"k_cache: never reads slot \d+ of page \d+ \(key 17 of request 0\) for request 0, token 10 of 33 at "
        r"position 17 .*, query head 0 \(kv head 0\), which sees it \(\d+ such pairs of row and key\)",
    ),
    "a stale page": (
        "mixed", ATTEND, TABLE_LOAD,
        TABLE_LOAD.replace("keys // SIZES.block_size", "tl.maximum(keys // SIZES.block_size - 1, 0)"),
        r"k_cache: never reads slot 5 of page \d+ \(key 21 of request 0\), which a row sees \(16 such slots\); .*"
        r"batch.block_table: never reads element \[0, 2\], whose page holds a visible key",
    ),
    "the page after": (
        "mixed", ATTEND, BLOCK, f"{BLOCK} + 1",
        r"loads from 0 bytes after the end of k_cache \(\d+ such places\); "
        r"k_cache: reads slot 0 of page \d+ \(a page that no request has\), which no row may see",
    ),
    "a page that is not there": (
        "mixed", ATTEND, BLOCK, f"{BLOCK} + (1 << 34)",
        r"would load from memory that the call was not given, \d+ bytes after the end of ",
    ),
    "pages of the first request": (
        "equal lengths", ATTEND, "request.to(tl.int64) * numbers.table_stride", "request.to(tl.int64) * 0",
        r"k_cache: reads slot 0 of page \d+ \(key 0 of request 0\) for request 1, which may not \(20 such slots\)",
    ),
    "the table past its columns": (
        "mixed", ATTEND, TABLE_LOAD, TABLE_LOAD.replace("// SIZES.block_size", "// 2"),
        r"loads from 0 bytes after the end of batch.block_table \(\d+ such places\)",
    ),
    "a hidden key": (
        "tree", ATTEND, "            readable = readable & (tl.max(visible.to(tl.int32), 0) > 0)\n", "",
        r"k_cache: reads slot 3 of page \d+ \(key 11 of request 0\), which no row may see; v_cache: ",
    ),
    "bias past its width": (
        "tree", TILES, "(new_keys < numbers.bias_width)", "(new_keys < numbers.bias_width + 1)",
        r"loads from 0 bytes after the end of rules.query_bias \(\d+ such places\)",
    ),
    "padding rows of q": (
        "mixed", TILES, ROW_MASK, ROW_MASK.replace("rows.mask[:, None] & ", ""),
        r"loads from .*; q: reads element \[5, 0, 0\], padding row 0 after the batch's 5 tokens, .* no request has",
    ),
    "a row written twice": (
        "mixed", "kernels/padding.py", "first_row = tl.load(", "first_row = -1 + tl.load(",
        r"out: stores more than once to element \[4, 0, 0\], request 1, token 3 of 4 .*; lse: stores more than once ",
    ),
    "a row not written": (
        "mixed", "kernels/padding.py", "num_tokens - first_row, 0", "num_tokens - first_row - 1, 0",
        r"out: never stores to element \[6, 0, 0\], padding row 1 after the batch's 5 tokens",
    ),
    "a row past the slots": (
        "update", "kv_cache.py", "num_tokens = slot_mapping.shape[0]", "num_tokens = key.shape[0]",
        r"loads from 0 bytes after the end of slot_mapping \(4 such places\)",
    ),
    "a negative slot": (
        "update", "kernels/kv_update.py", "(place >= 0)", "(place != -1)",
        r"stores to \d+ bytes before k_cache \(\d+ such places\)",
    ),
    "the slot after": (
        "latent update", "kernels/kv_update.py", "slot = place % SIZES.block_size",
        "slot = (place + 1) % SIZES.block_size",
        r"latent_cache: stores to element \[6, 9, 0\], block 6, offset 9 .*, which is not to be written; "
        r"latent_cache: never stores to element .*, which is to be written once",
    ),
    "a part left out": (
        "merge", "kernels/merge.py", "(weight_b > 0.0)", "(weight_b > 1.0)",
        r"out_b: never reads element \[0, 0, 0\], whose part weighs the most",
    ),
}  # fmt: skip


def with_fault(name: str) -> Ours:
    _, file, old, new, _ = PLANTED[name]
    return Ours(load(Mutant(f"reads_{name.replace(' ', '_')}", file, old, new, "")))


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_named(name: str) -> None:
    """Also where nothing is poisoned, so that the answer would hardly show it."""
    case, *_, said = PLANTED[name]
    found = wrong_accesses(with_fault(name), build(replace(FIXED[case], poison="")))
    assert found is not None
    assert re.match(said, "; ".join(found)), found
