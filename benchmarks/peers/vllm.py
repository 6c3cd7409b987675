"""vLLM's Triton kernels, as of 0.33: unified attention without and with splits, latent decode, the cache's store."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from pageproof.oracle import NumericContract
from pageproof.oracle.building.problem import Problem

from . import Prepared, Unsupported
from .live import Live, live, require, require_one_token

UNIFIED = "vllm.v1.attention.ops.triton_unified_attention"
DECODE = "vllm.v1.attention.ops.triton_decode_attention"
STORE = "vllm.v1.attention.ops.triton_reshape_and_cache_flash"
SEGMENTS = 16  # vLLM's own choice
LONGEST_SPLIT_QUERY = 8  # tokens of a request beyond which the kernel does not split
ALWAYS = 1 << 30  # a threshold under which every grid lies


def unsplit(problem: Problem) -> Prepared:
    """One launch for everything. Padding rows are not given to it, which it would never write."""
    return _unified(problem, {}, split_keys=None)


def split(problem: Problem) -> Prepared:
    """Every request in 16 segments and a merge, also where vLLM would not choose it."""
    found = live(problem)
    if max(found.query_lens) > LONGEST_SPLIT_QUERY:
        raise Unsupported(f"splits requests of at most {LONGEST_SPLIT_QUERY} tokens only")
    spec = found.spec
    shape = (found.rows, spec.num_query_heads, SEGMENTS)
    columns = 1 << (spec.head_size_v - 1).bit_length()
    scratch = {
        "seq_threshold_3D": ALWAYS,
        "num_par_softmax_segments": SEGMENTS,
        "softmax_segm_output": torch.empty(*shape, columns, device=found.batch.device),
        "softmax_segm_max": torch.empty(shape, device=found.batch.device),
        "softmax_segm_expsum": torch.empty(shape, device=found.batch.device),
    }
    return _unified(problem, scratch, split_keys=max(16, min(found.seq_lens) // SEGMENTS))


def _unified(problem: Problem, scratch: dict[str, Any], *, split_keys: int | None) -> Prepared:
    module = importlib.import_module(UNIFIED)
    require(problem, rules=("softcap", "sliding_window", "sinks", "alibi"), float8=True)
    found = live(problem)
    if found.rules.alibi_slopes is not None and found.rules.sinks is not None:
        raise Unsupported("alibi from the context's end on, which beside a sink is another operation")
    spec, rules, scales = found.spec, found.rules, problem.arguments.get("scales")
    if spec.scales == "head":
        raise Unsupported("one scale per tensor only")
    if spec.kv_dtype:
        scratch = {**scratch, "kv_quant_mode": module.KVQuantMode.FP8_PER_TENSOR}
    out, outputs = found.new_out()
    queries = found.argument("q")

    def work() -> None:
        module.unified_attention(
            q=queries,
            k=problem.arguments["k_cache"],
            v=problem.arguments["v_cache"],
            out=out,
            cu_seqlens_q=found.batch.cu_seqlens_q,
            max_seqlen_q=max(found.query_lens),
            seqused_k=found.batch.seq_lens,
            max_seqlen_k=max(found.seq_lens),
            softmax_scale=rules.softmax_scale,
            causal=True,
            window_size=(found.window_left, 0 if found.window_left >= 0 else -1),
            block_table=found.batch.block_table,
            softcap=rules.softcap or 0,
            q_descale=None,
            k_descale=scales and scales.k,
            v_descale=scales and scales.v,
            alibi_slopes=rules.alibi_slopes,
            sinks=rules.sinks,
            **scratch,
        )

    return Prepared(work=work, outputs=outputs, contract=_contract(found, split_keys))


def _contract(found: Live, split_keys: int | None) -> NumericContract:
    """P is cast to the values' format; the exponent is multiplied inside of exp; tiles of 16 keys or more.

    float8 keys and values are dequantised and rounded to the queries' format; the sink is the first maximum.
    """
    spec = found.spec
    rounded = spec.dtype if spec.kv_dtype else ""
    return NumericContract(
        p_dtype=spec.dtype,
        key_dtype=rounded,
        value_dtype=rounded,
        tanh="exp",
        exponent_roundings=3,
        tile_keys=16,
        split_keys=split_keys,
        late_sink=False,
    )


def latent(problem: Problem) -> Prepared:
    """Decode over latent rows; the splits that vLLM takes for the longest request."""
    module = importlib.import_module(DECODE)
    require(problem)
    found = live(problem)
    require_one_token(found)
    spec, device = found.spec, found.batch.device
    wanted = 1 << (max(1, max(found.seq_lens) // 512) - 1).bit_length()
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    splits = min(wanted, 2 * processors)
    queries = torch.cat((found.argument("q_nope"), found.argument("q_pe")), dim=-1)
    keys = problem.arguments["latent_cache"].unsqueeze(2)
    values = keys[..., : spec.head_size]
    partial = torch.empty(found.rows, spec.num_query_heads, splits, spec.head_size + 1, device=device)
    lse = torch.empty(found.rows, spec.num_query_heads, device=device, dtype=queries.dtype)
    one = torch.ones((), device=device)
    out, outputs = found.new_out()

    def work() -> None:
        module.decode_attention_fwd(
            queries,
            keys,
            values,
            out,
            lse,
            found.batch.block_table,
            found.batch.seq_lens,
            partial,
            splits,
            found.rules.softmax_scale,
            page_size=spec.block_size,
            k_scale=one,
            v_scale=one,
            is_mla=True,
        )

    contract = NumericContract(
        p_dtype=spec.dtype, exponent_roundings=3, tile_keys=16, split_keys=max(16, min(found.seq_lens) // splits)
    )
    return Prepared(work=work, outputs=outputs, contract=contract)


def update(problem: Problem) -> Prepared:
    module = importlib.import_module(STORE)
    arguments = problem.arguments
    scales = arguments.get("scales")
    one = torch.ones((), device=arguments["key"].device)

    def work() -> None:
        module.triton_reshape_and_cache_flash(
            arguments["key"],
            arguments["value"],
            arguments["k_cache"],
            arguments["v_cache"],
            arguments["slot_mapping"],
            "fp8" if problem.case.spec.kv_dtype else "auto",
            scales.k if scales else one,
            scales.v if scales else one,
        )

    return Prepared(work=work, outputs=dict(problem.outputs), contract=NumericContract())
