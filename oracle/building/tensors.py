"""From a case to its tensors: the same bits on every device, poisoned, guarded, and never waiting for a device.

Lengths, pages and everything else that is small is worked out on the host and sent in one transfer; the large
tensors are hashed on the device itself. Nothing here knows what the answer will be.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...reference.problem import Batch, Rules
from ..case import ATTENTION_OPERATIONS, Case, Spec
from ..formats import INTEGERS, torch_dtype
from . import recipes
from .guards import SMALL_INPUTS, Guards, Watch
from .layouts import Layout, row_layout
from .memory import Pack, Pools, place, place_pools
from .pages import HUGE_PAGE, Ints, Pages, lay_out, poison_table, readable_keys
from .poison import READABLE, Slots, classify, sentinel_bits, slot_bits
from .problem import Draws, KeySlots, Problem, add_scales, narrowed, scales_of, store_
from .query_bias import BiasPlan, make_bias, plan_bias
from .rule_values import alibi_slopes, sinks, softmax_scale
from .writes import build_merge, build_update

__all__ = ["Problem", "build"]


@torch.no_grad()
def build(case: Case, device: torch.device | str = "cpu") -> Problem:
    """The call that a valid case describes (see `case_rules.why_invalid`), on `device`."""
    device = torch.device(device)
    if case.spec.operation == "merge_states":
        return build_merge(case, device)
    if case.spec.operation not in ATTENTION_OPERATIONS:
        return build_update(case, device)
    return _build_attention(case, device)


def _build_attention(case: Case, device: torch.device) -> Problem:
    pages, bias = lay_out(case), plan_bias(case)
    readable = readable_keys(case, pages, bias.hidden if bias else None)
    slots = classify(case, pages, readable)
    pack = Pack(case)
    draws = Draws(case, pack)
    _pack_batch(case, slots, pack)
    table = poison_table(case, pages, readable) if "a" in case.poison else pages.block_table
    pack.add("block_table", _with_row_pitch(case, table))
    _pack_rules(case, bias, pack)
    add_scales(case, pack)
    for name, (rows, shape) in _drawn_tensors(case, slots).items():
        draws.add(name, rows, *shape)
    for name, array in recipes.plan(case, pages, slots).items():
        pack.add(f"recipe/{name}", array)

    memory, small = pack.send(device)
    values = draws.values(small)
    recipes.shape_(case, values, {name.removeprefix("recipe/"): tensor for name, tensor in small.items()})
    query_bias, bias_watches = _place_bias(case, values, small) if bias else (None, [])
    inputs, input_watches = _place_inputs(case, values, device)
    pools = _place_caches(case, pages, slots, values, small)
    outputs, output_watches = _place_outputs(case, device)
    arguments = {
        **inputs,
        **pools.caches,
        **outputs,
        "batch": Batch(small["cu_seqlens_q"], small["seq_lens"], _table_of(case, small["block_table"], table)),
        "rules": _rules(case.spec, small, query_bias),
        "scales": scales_of(small),
    }
    watches = [Watch(SMALL_INPUTS, memory, small), *bias_watches, *input_watches, *pools.watches, *output_watches]
    return Problem(case, arguments, outputs, Guards.over(watches), key_slots=KeySlots(pages, slots))


def _with_row_pitch(case: Case, table: NDArray[np.int32]) -> NDArray[np.int32]:
    """With odd strides the table is cut out of a wider one, whose further columns are nobody's."""
    if not case.spec.odd_strides:
        return table
    return np.pad(table, ((0, 0), (0, 3)), constant_values=HUGE_PAGE)


def _table_of(case: Case, wide: Tensor, table: NDArray[np.int32]) -> Tensor:
    layout = Layout(table.shape, wide.stride())
    return (layout.with_odd_singles() if case.spec.odd_strides else layout).view(wide, int(wide.storage_offset()))


def _pack_batch(case: Case, slots: Slots, pack: Pack) -> None:
    starts = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(case.batch.query_lens, dtype=np.int64)))
    pack.add("cu_seqlens_q", starts.astype(np.int32))
    pack.add("seq_lens", np.array(case.batch.seq_lens, dtype=np.int32))
    for slot_class, numbers in {READABLE: slots.written, **slots.repoisoned}.items():
        blocks, offsets = np.divmod(numbers, case.spec.block_size)
        pack.add(f"blocks/{slot_class}", blocks)
        pack.add(f"offsets/{slot_class}", offsets)


def _pack_rules(case: Case, bias: BiasPlan | None, pack: Pack) -> None:
    if case.spec.alibi:
        pack.add("alibi_slopes", alibi_slopes(case))
    if case.spec.sinks:
        pack.add("sinks", sinks(case))
    for name, array in bias.arrays.items() if bias else ():
        pack.add(name, array)


def _rules(spec: Spec, small: Mapping[str, Tensor], query_bias: Tensor | None) -> Rules:
    return Rules(
        softmax_scale=softmax_scale(spec),
        causal=spec.causal,
        sliding_window=spec.sliding_window,
        right_window=spec.right_window,
        softcap=spec.softcap,
        alibi_slopes=small.get("alibi_slopes"),
        sinks=small.get("sinks"),
        query_bias=query_bias,
    )


def _drawn_tensors(case: Case, slots: Slots) -> dict[str, tuple[int | Ints, tuple[int, ...]]]:
    """Name -> (rows, what one row is); of K and V only the rows that are written."""
    spec = case.spec
    tokens, keys, heads = case.batch.num_tokens, slots.key_of_written, spec.num_query_heads
    drawn: dict[str, tuple[int | Ints, tuple[int, ...]]] = {}
    if spec.query_bias == "dense":
        drawn["query_bias"] = (tokens, (spec.bias_width,))
    if not spec.is_mla:
        drawn["q"] = (tokens, (heads, spec.head_size))
        drawn["k"] = (keys, (spec.num_kv_heads, spec.head_size))
        drawn["v"] = (keys, (spec.num_kv_heads, spec.head_size_v))
        return drawn
    decompressed = spec.operation == "mla_attention_decompressed"
    drawn["q_nope"] = (tokens, (heads, spec.nope_head_size if decompressed else spec.head_size))
    drawn["q_pe"] = (tokens, (heads, spec.rope_head_size))
    drawn["latent"] = (keys, (spec.head_size,))
    drawn["k_pe"] = (keys, (spec.rope_head_size,))
    if decompressed:
        drawn["w_uk"] = (heads, (spec.nope_head_size, spec.head_size))
        drawn["w_uv"] = (heads, (spec.head_size_v, spec.head_size))
    return drawn


def _place_bias(case: Case, values: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> tuple[Tensor, list[Watch]]:
    bias = make_bias(case, values.get("query_bias"), small)
    memory, (tensor,) = place(case, [row_layout(case, tuple(bias.shape))], torch.float32, bias.device)
    tensor.copy_(bias)
    return tensor, [Watch("query_bias", memory, {"query_bias": tensor})]


def _place_inputs(
    case: Case, values: Mapping[str, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], list[Watch]]:
    """q (MLA: q_nope, q_pe and the projections), padding rows left as the guard bytes they were."""
    spec, live = case.spec, sum(case.batch.query_lens)
    placed, watches = {}, []
    for name in [name for name in ("q", "q_nope", "q_pe", "w_uk", "w_uv") if name in values]:
        weight = name.startswith("w_")
        dtype = torch_dtype(spec.dtype if weight else spec.q_dtype or spec.dtype)
        memory, (tensor,) = place(case, [row_layout(case, tuple(values[name].shape))], dtype, device)
        rows = slice(None) if weight or "d" not in case.poison else slice(live)
        wanted = values[name][rows] * _weight_unit(spec) if weight else values[name][rows]
        store_(tensor[rows], wanted)
        placed[name] = tensor
        watches.append(Watch(name, memory, {name: tensor}))
    return placed, watches


def _weight_unit(spec: Spec) -> float:
    """A power of two near one over the root of kv_lora_rank: projected rows are as large as latent ones."""
    return float(2.0 ** -(spec.head_size.bit_length() // 2))


def _place_caches(
    case: Case, pages: Pages, slots: Slots, values: Mapping[str, Tensor], small: Mapping[str, Tensor]
) -> Pools:
    """Values into the slots that may be read, and into some others poison that is not the pool's."""
    spec = case.spec
    if spec.is_mla:
        stored = {"latent_cache": torch.cat((values["latent"], values["k_pe"]), dim=1)}
    else:
        stored = {"k_cache": values["k"], "v_cache": values["v"]}
    dtype = torch_dtype(spec.kv_dtype or spec.dtype)
    integers = INTEGERS[dtype.itemsize]
    pools = place_pools(case, pages.num_blocks, dtype, small["seq_lens"].device, writable=False)
    for name, cache in pools.caches.items():
        bits = cache.view(integers)
        for slot_class in slots.repoisoned:
            bits[small[f"blocks/{slot_class}"], small[f"offsets/{slot_class}"]] = slot_bits(case, slot_class, dtype)
        places = small[f"blocks/{READABLE}"], small[f"offsets/{READABLE}"]
        bits[places] = narrowed(stored[name], dtype).view(integers)
    return pools


def _place_outputs(case: Case, device: torch.device) -> tuple[dict[str, Tensor], list[Watch]]:
    """out and lse, born unwritten (or 0 without tier d)."""
    spec, rows = case.spec, (case.batch.num_tokens, case.spec.num_query_heads)
    head_size_v = spec.head_size if spec.operation == "mla_attention" else spec.head_size_v
    out_layout = row_layout(case, (*rows, head_size_v), misaligned=True)
    lse_layout = row_layout(case, rows)
    placed = {}
    watches = []
    for name, layout, dtype_name in (("out", out_layout, spec.out_dtype or spec.dtype), ("lse", lse_layout, "float32")):
        dtype = torch_dtype(dtype_name)
        memory, (tensor,) = place(case, [layout], dtype, device)
        tensor.view(INTEGERS[dtype.itemsize]).fill_(sentinel_bits(dtype) if "d" in case.poison else 0)
        placed[name] = tensor
        watches.append(Watch(name, memory, {name: tensor}, writable=True))
    return placed, watches
