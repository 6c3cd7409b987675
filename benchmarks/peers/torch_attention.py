"""torch's own attention on contiguous tensors, gathered beforehand: cuDNN, flash, and FlexAttention; and index_copy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pageproof.oracle import NumericContract
from pageproof.oracle.building.problem import Problem

from . import Prepared, Unsupported
from .live import Live, live, require

SPLIT_KEYS = 64  # no kernel here splits finer


def cudnn(problem: Problem) -> Prepared:
    return _sdpa(problem, SDPBackend.CUDNN_ATTENTION)


def flash(problem: Problem) -> Prepared:
    return _sdpa(problem, SDPBackend.FLASH_ATTENTION)


def _sdpa(problem: Problem, backend: SDPBackend) -> Prepared:
    require(problem)
    found = live(problem)
    new = _uniform(found)
    if 1 < new < found.seq_lens[0]:
        raise Unsupported("causal from the first key on only: one token, or all of a request")
    queries, *pair = _contiguous(found)

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                queries, keys, values, is_causal=new > 1, scale=found.rules.softmax_scale, enable_gqa=True
            )

    note = ""
    try:
        attend(*pair)
    except RuntimeError:  # there is no kernel of this kind for heads that share their keys
        note = "keys repeated for every query head"
        pair = [rows.repeat_interleave(found.spec.group_size, dim=1) for rows in pair]
    return _prepared(found, functools.partial(attend, *pair), note)


def flex(problem: Problem) -> Prepared:
    """Compiled for this shape. Its mask is made beforehand, as once per step."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    require(problem, rules=("softcap", "sliding_window"))
    found = live(problem)
    new = _uniform(found)
    queries, keys, values = _contiguous(found)
    rules, before = found.rules, found.seq_lens[0] - new

    def is_visible(batch: Tensor, head: Tensor, token: Tensor, key: Tensor) -> Tensor:
        position = token + before
        seen = key <= position
        return seen if rules.sliding_window is None else seen & (position - key < rules.sliding_window)

    def capped(score: Tensor, batch: Tensor, head: Tensor, token: Tensor, key: Tensor) -> Tensor:
        return rules.softcap * torch.tanh(score / rules.softcap)

    torch._dynamo.reset()  # or it takes a new shape for a reason to compile for all
    mask = create_block_mask(is_visible, None, None, new, found.seq_lens[0], device=queries.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    attend = functools.partial(
        compiled,
        queries,
        keys,
        values,
        score_mod=capped if rules.softcap else None,
        block_mask=mask,
        scale=rules.softmax_scale,
        enable_gqa=True,
    )
    return _prepared(found, attend)


def _uniform(found: Live) -> int:
    if len(set(found.query_lens)) > 1 or len(set(found.seq_lens)) > 1:
        raise Unsupported("requests of one length only")
    return found.query_lens[0]


def _contiguous(found: Live) -> tuple[Tensor, Tensor, Tensor]:
    """[requests, heads, length, size], as the kernels like it best."""
    requests, slots = len(found.query_lens), found.all_slots()

    def by_head(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (requests, -1)).transpose(1, 2).contiguous()

    caches = (found.problem.arguments[name].flatten(0, 1) for name in ("k_cache", "v_cache"))
    keys, values = (by_head(cache[slots]) for cache in caches)
    return by_head(found.argument("q")), keys, values


def _prepared(found: Live, attend: Callable[[], Any], note: str = "") -> Prepared:
    """What comes out stays in the capture's memory, by head; `whole` is filled from it when it is looked at."""
    whole = torch.zeros_like(found.problem.outputs["out"])
    answers: list[Tensor] = []

    def work() -> None:
        answers[:] = [attend()]

    def collect() -> None:
        whole[: found.rows] = answers[0].transpose(1, 2).flatten(0, 1)

    contract = NumericContract(
        p_dtype=found.spec.dtype, tanh="libm", exponent_roundings=3, tile_keys=16, split_keys=SPLIT_KEYS
    )
    return Prepared(work=work, outputs={"out": whole}, contract=contract, collect=collect, note=note)


def update(problem: Problem) -> Prepared:
    """Rows copied by their number, where that is all that an update is: no scale, no skipped slot."""
    arguments = problem.arguments
    if problem.case.spec.kv_dtype:
        raise Unsupported("no float8 caches")
    slots = arguments["slot_mapping"]
    latent = problem.case.spec.is_mla
    pairs = (("latent", "k_pe", "latent_cache"),) if latent else (("key", "k_cache"), ("value", "v_cache"))

    def work() -> None:
        for *sources, cache in pairs:
            rows = [arguments[name] for name in sources]
            joined = torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0]
            arguments[cache].view(-1, *arguments[cache].shape[2:]).index_copy_(0, slots, joined[: slots.shape[0]])

    return Prepared(work=work, outputs=dict(problem.outputs), contract=NumericContract())
