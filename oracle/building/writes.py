"""The tensors of the operations that attend to nothing: cache updates and merge_states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..case import Case
from ..formats import torch_dtype
from .guards import SMALL_INPUTS, Guards, Watch
from .hashing import hashed, host_hashes, index_terms, normals
from .layouts import row_layout
from .memory import Pack, place, place_pools
from .pages import Pages, lay_out
from .problem import Draws, Problem, add_scales, scales_of, store_

_SKIPS = np.array([-1, -1, -2, -(2**31), -(2**40)], dtype=np.int64)


def build_update(case: Case, device: torch.device) -> Problem:
    """Rows for the slots of every request's new tokens, some of them skipped; pools of random bytes."""
    spec = case.spec
    pack = Pack(case)
    pack.add("slot_mapping", slot_mapping(case))
    pack.add("midpoints", _midpoints())
    pack.add("powers", np.array([2.0**power for power in range(-17, 15)], dtype=np.float32))
    add_scales(case, pack)
    draws = Draws(case, pack)
    for name, shape in _row_shapes(case).items():
        draws.add(name, case.batch.num_tokens, *shape)
    memory, small = pack.send(device)
    rows = {name: _shape(case, name, hashes, small) for name, hashes in draws.hashes(small).items()}
    inputs, watches = _place_rows(case, rows, sum(case.batch.query_lens), device)
    watches.append(Watch(SMALL_INPUTS, memory, small))
    pools = place_pools(
        case, _unshared(case).num_blocks, torch_dtype(spec.kv_dtype or spec.dtype), device, writable=True
    )
    for number, pool in enumerate(pools.memories):
        _scramble_(pool, case.seed, f"pool/{number}")
    arguments: dict[str, Any] = {
        **inputs,
        **pools.caches,
        "slot_mapping": small["slot_mapping"],
        "scales": scales_of(small),
    }
    pristine = {name: cache.clone() for name, cache in pools.caches.items()}
    return Problem(case, arguments, pools.caches, Guards.over([*watches, *pools.watches]), pristine)


def _unshared(case: Case) -> Pages:
    """A slot that is written belongs to one request."""
    return lay_out(case.with_batch(shared_blocks=0, repeated_blocks=False))


def slot_mapping(case: Case) -> NDArray[np.int64]:
    """[sum of query_lens]: the slot of every new token; negative where it has none, and now and then anyway."""
    pages = _unshared(case)
    requests = np.repeat(np.arange(case.batch.num_requests), case.batch.query_lens)
    query_lens = np.array(case.batch.query_lens, dtype=np.int64)
    seq_lens = np.array(case.batch.seq_lens, dtype=np.int64)
    first_rows = np.cumsum(query_lens) - query_lens
    positions = np.arange(len(requests)) - (first_rows - seq_lens + query_lens)[requests]
    drawn = host_hashes(case.seed, "slots", len(requests))
    skipped = (positions < 0) | (drawn % np.uint32(8) == 0)
    real = np.where(skipped, 0, positions + pages.key_starts[requests])
    slots = pages.slot_of_key[real] if len(pages.slot_of_key) else np.zeros_like(real)
    return np.where(skipped, _SKIPS[(drawn >> np.uint32(8)) % np.uint32(len(_SKIPS))], slots)


def build_merge(case: Case, device: torch.device) -> Problem:
    """Two parts of every row: most with an lse each, some empty, under `extreme` some infinite or far apart."""
    shape = (case.batch.num_tokens, case.spec.num_query_heads)
    pack = Pack(case)
    draws = Draws(case, pack)
    for name, width in (("out_a", case.spec.head_size), ("out_b", case.spec.head_size), ("lse_a", 0), ("lse_b", 0)):
        draws.add(name, *shape, *([width] if width else []))
    draws.add("kind", *shape)
    _, small = pack.send(device)
    drawn = draws.hashes(small)
    kind = drawn.pop("kind") & 31
    values = {name: normals(hashes) for name, hashes in drawn.items()}
    _relate(case, values["lse_a"], values["lse_b"], kind)
    if case.recipe == "cancel":
        values["out_a"].add_(100.0)
        values["out_b"].sub_(100.0)
    blank = torch.nan if "c" in case.poison else 3e4  # what an empty part holds does not matter
    for part in ("a", "b"):
        # In the format it keeps: the bits of a NaN that is cast differ between a CPU and a GPU.
        rows = values[f"out_{part}"].to(torch_dtype(case.spec.dtype))
        values[f"out_{part}"] = rows.masked_fill_((values[f"lse_{part}"] == -torch.inf)[..., None], blank)
    arguments, watches = _place_rows(case, values, shape[0], device)
    return Problem(case, arguments, {}, Guards.over(watches))


def _relate(case: Case, lse_a: Tensor, lse_b: Tensor, kind: Tensor) -> None:
    """How the parts weigh against each other, by `kind` 0..31 of each row and head."""
    if case.recipe in ("needle", "cancel"):
        lse_b.mul_(0.125).add_(lse_a)  # nearly equal
    elif case.recipe == "census":
        lse_b.copy_(lse_a)
    else:
        for lse in (lse_a, lse_b):
            lse.mul_(32.0 if case.recipe == "one_hot" else 4.0)
    if case.recipe == "extreme":
        lse_a.masked_fill_(kind == 5, torch.inf).add_(torch.where(kind == 7, 300.0, 0.0))
        lse_b.masked_fill_(kind == 6, torch.inf).add_(torch.where(kind == 8, -300.0, 0.0))
        for lse in (lse_a, lse_b):
            lse.add_(torch.where(kind == 9, 1e4, torch.where(kind == 10, -1e4, 0.0)))
    lse_a.masked_fill_((kind < 2) | (kind == 4), -torch.inf)
    lse_b.masked_fill_((kind >= 2) & (kind <= 4), -torch.inf)


def _place_rows(
    case: Case, rows: Mapping[str, Tensor], live: int, device: torch.device
) -> tuple[dict[str, Tensor], list[Watch]]:
    """Rows in the case's dtype (an lse in float32), those from `live` on left as guard bytes."""
    placed, watches = {}, []
    for name, values in rows.items():
        dtype = torch.float32 if name.startswith("lse") else torch_dtype(case.spec.dtype)
        layout = row_layout(case, tuple(values.shape), misaligned=name in ("value", "out_b", "lse_b"))
        memory, (tensor,) = place(case, [layout], dtype, device)
        written = slice(live) if "d" in case.poison else slice(None)
        store_(tensor[written], values[written])
        placed[name] = tensor
        watches.append(Watch(name, memory, {name: tensor}))
    return placed, watches


def _scramble_(memory: Tensor, seed: int, name: str) -> None:
    """Random bits into a pool's integers, guard bands included: whatever changes is seen."""
    words = -(-memory.numel() * memory.element_size() // 4)
    terms = index_terms(seed, name, np.arange(-(-words // 1024), dtype=np.int64), 1024)
    rows, columns = (torch.from_numpy(term).to(memory.device, non_blocking=True) for term in terms)
    bits = hashed([(rows, columns)]).view(memory.dtype)
    memory.copy_(bits[: memory.numel()].view(memory.shape))


def _row_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    spec = case.spec
    if spec.is_mla:
        return {"latent": (spec.head_size,), "k_pe": (spec.rope_head_size,)}
    return {"key": (spec.num_kv_heads, spec.head_size), "value": (spec.num_kv_heads, spec.head_size_v)}


def _shape(case: Case, name: str, hashes: Tensor, small: Mapping[str, Tensor]) -> Tensor:
    """The recipes as a store sees them: needle halfway between float8 numbers, extreme over all magnitudes.

    Recipes that are made for attention mean nothing to a store, and leave the values independent.
    """
    if case.recipe == "one_hot":  # the row's number
        rows = torch.arange(hashes.shape[0], dtype=torch.float32, device=hashes.device) % 251
        return rows.view(-1, *[1] * (hashes.dim() - 1)).expand(hashes.shape)
    if case.recipe == "extreme":
        return normals(hashes) * small["powers"][(hashes & 31).long()]
    if case.recipe != "needle":
        return normals(hashes)
    midpoints = small["midpoints"][(hashes & 255).long()]
    scale = small.get("scales/v" if name == "value" else "scales/k")
    return midpoints if scale is None else midpoints * scale.view(-1, 1)


def _midpoints() -> NDArray[np.float32]:
    """[256]: numbers halfway between two neighbours of float8_e4m3fn, where round-half-even has to decide."""
    significands = np.arange(17, 32, 2)  # odd in sixteenths
    powers = np.arange(-8, 8)
    positive = np.multiply.outer(2.0**powers, significands / 16.0).reshape(-1)
    return np.concatenate((positive, -positive)).astype(np.float32)
