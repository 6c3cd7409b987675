"""The faults, as one replacement each in a source file of `pageproof.optimized`.

Every one stands for a bug that a released kernel or engine has had.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # inside the optimized package
    old: str  # occurs exactly once in the file
    new: str
    story: str  # what went wrong, and where it has been seen


MUTANTS = (
    Mutant(
        "window_off_by_one",
        "kernels/tiles.py",
        "visible = visible & (distance > -numbers.sliding_window)",
        "visible = visible & (distance >= -numbers.sliding_window)",
        "a window of W shows W + 1 keys: the window's two conventions confused, as in many engines",
    ),
    Mutant(
        "window_edge_skipped",
        "kernels/tiles.py",
        "start = tl.maximum(tile.first_position - numbers.sliding_window + 1, 0)",
        "start = tl.maximum(tile.first_position - numbers.sliding_window + 2, 0)",
        "the loop starts one key after the first row's window: one key short in decode (SGLang #32087)",
    ),
    Mutant(
        "last_partial_page_dropped",
        "kernels/tiles.py",
        "    end = span.seq_len\n",
        "    end = span.seq_len // 16 * 16\n",
        "a length rounded down to whole pages of 16",
    ),
    Mutant(
        "sink_in_every_split",
        "kernels/merge.py",
        "join_sink(maximum, total, tl.load(rules.sinks + head))",
        "join_sink(\n"
        "                maximum,\n"
        "                total,\n"
        "                tl.load(rules.sinks + head) + tl.log(splits.to(tl.float32)),\n"
        "            )",
        "the sink is counted once per split instead of once (ROCm CK #12229)",
    ),
    Mutant(
        "stale_plan",
        "plan.py",
        '    operators.call("make_plan", batch.cu_seqlens_q, batch.seq_lens, request_programs, batch_invariant, '
        "*plan.tensors)\n"
        "    return plan\n",
        "    global _first\n"
        "    if _first is None or _first.num_requests != plan.num_requests:\n"
        '        operators.call("make_plan", batch.cu_seqlens_q, batch.seq_lens, request_programs, batch_invariant, '
        "*plan.tensors)\n"
        "        _first = plan\n"
        "    return _first\n\n\n"
        "_first = None\n",
        "the plan of an earlier step with as many requests serves a later one (vLLM #42444)",
    ),
    Mutant(
        "rescale_forgotten",
        "kernels/attend.py",
        "        weighted = weighted * rescale[:, None]\n",
        "",
        "the sum so far is not rescaled when a later tile raises the running maximum",
    ),
    Mutant(
        "heads_interleaved",
        "kernels/tiles.py",
        "heads = kv_head * SIZES.group + flat % SIZES.group",
        "heads = flat % SIZES.group * SIZES.num_kv_heads + kv_head",
        "query heads dealt out to kv heads in turns instead of in groups",
    ),
    Mutant(
        "alibi_from_the_context",
        "kernels/tiles.py",
        "scores += slopes[:, None] * distance.to(tl.float32)",
        "scores += slopes[:, None] * (keys - tl.min(tile.positions, 0))[None, :].to(tl.float32)",
        "ALiBi measured from the first new token: wrong beside a sink (vLLM 0.33's linear ALiBi)",
    ),
    Mutant(
        "value_scale_dropped",
        "kernels/tiles.py",
        "        out = out * scale_of(scales.v, kv_head)\n",
        "        out = out\n",
        "the value cache's scale is forgotten on one route (vLLM #42580, FlashInfer f15336938)",
    ),
    Mutant(
        "padding_rows_left",
        "kernels/padding.py",
        "num_items = tl.maximum(num_tokens - first_row, 0) * SIZES.num_query_heads",
        "num_items = tl.maximum(num_tokens - first_row - 1, 0) * SIZES.num_query_heads",
        "the bucket's last row keeps what the last step left there (vLLM #37442)",
    ),
    Mutant(
        "hidden_key_poisons",
        "kernels/attend.py",
        "            readable = readable & (tl.max(visible.to(tl.int32), 0) > 0)\n",
        "",
        "a masked key's NaN value meets a weight of 0: 0 * NaN (vLLM #30887)",
    ),
    Mutant(
        "negative_slot_written",
        "kernels/kv_update.py",
        "mask = rows.mask & (place >= 0)",
        "mask = rows.mask & (place != -1)",
        "only -1 is taken for padding; another negative slot is written before the pool (vLLM #43869)",
    ),
    Mutant(
        "splits_averaged",
        "kernels/merge.py",
        "        weights = tl.exp2(maxima - stand_in)\n",
        "        weights = tl.where(mask, 1.0, 0.0)\n",
        "splits are summed without their weights: right only while all maxima are equal",
    ),
)


def find(name: str) -> Mutant:
    for mutant in MUTANTS:
        if mutant.name == name:
            return mutant
    known = ", ".join(mutant.name for mutant in MUTANTS)
    raise ValueError(f"mutant: found {name!r}, expected one of {known}")
