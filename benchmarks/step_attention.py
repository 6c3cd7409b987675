"""Attention alone on a mixed batch, replayed from a graph: ours, and vLLM's one launch for everything.

Both answers are held to the bound of their own arithmetic before either is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from step_timing import Clock

from pageproof import optimized
from pageproof.oracle import BatchShape, Case, NumericContract, Spec
from pageproof.oracle.adapters import find
from pageproof.oracle.bound.evaluate import evaluate
from pageproof.oracle.building.problem import Problem
from pageproof.oracle.building.tensors import build
from pageproof.oracle.compare import compare
from pageproof.oracle.execution.graphs.interface import Backend, Graph, capture

PEER = "vllm.v1.attention.ops.triton_unified_attention"
GOAL = 10.0  # times as fast as the peer

Prepared = tuple[Callable[[], None], dict[str, torch.Tensor], NumericContract]  # the work, what it writes, how exactly


def mixed_case(*, tiny: bool) -> Case:
    """Llama-3-8B's heads, one decode beside one prefill; rows up to the bucket are padding."""
    keys, prefill = (70, 8) if tiny else (65536, 512)
    padding = (1 << prefill.bit_length()) - prefill - 1
    heads = (
        {"num_kv_heads": 1, "group_size": 2, "head_size": 16, "head_size_v": 16}
        if tiny
        else {"num_kv_heads": 8, "group_size": 4, "head_size": 128, "head_size_v": 128}
    )
    spec = Spec(dtype="float16" if tiny else "bfloat16", block_size=16, **heads)
    shape = BatchShape(query_lens=(1, prefill), seq_lens=(keys, prefill), padding_tokens=padding)
    return Case(spec=spec, batch=shape)


def attention_rows(backend: Backend, *, tiny: bool, rounds: int) -> list[dict[str, Any]]:
    """A row for each implementation, with a `gap` where it cannot be measured here."""
    case = mixed_case(tiny=tiny)
    problem = build(case, backend.device)
    works: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, Any]] = {}
    held = []  # a graph keeps addresses only
    for name, prepare in (("ours", _ours), ("ours with plan", _ours_with_plan), ("vllm", _vllm)):
        rows[name] = {"attention": f"1 x {case.batch.seq_lens[0]} + {case.batch.query_lens[1]}", "of": name}
        try:
            work, outputs, contract = prepare(problem)
        except ImportError as error:
            rows[name]["gap"] = f"{type(error).__name__}: {error}"
            continue
        graph = _captured(backend, work)
        for tensor in outputs.values():  # what the warm-up wrote is no answer of the graph's
            tensor[: sum(case.batch.query_lens)] = torch.nan
        graph.replay()
        backend.synchronize()
        rows[name] |= _judged(problem, outputs, contract)
        if rows[name]["agrees"]:
            works[name] = graph.replay
        held.append(work)
    times = Clock(backend.device).interleaved(works, rounds)
    for name, taken in times.items():
        rows[name] |= taken.figures()
    if "vllm" in times:
        for name in times.keys() - {"vllm"}:
            rows[name]["times_as_fast"] = rows["vllm"]["step_us"] / rows[name]["step_us"]
            rows[name]["goal"] = GOAL
    return list(rows.values())


def _captured(backend: Backend, work: Callable[[], None]) -> Graph:
    backend.warm_up(work)
    with capture(backend, backend.new_pool()) as graph:
        work()
    return graph


def _judged(problem: Problem, outputs: dict[str, torch.Tensor], contract: NumericContract) -> dict[str, Any]:
    """Whether these outputs are right; those that are not among them are not looked at."""
    expected = evaluate(problem, contract)
    parts = {name: {key: getattr(expected, name)[key] for key in outputs} for name in ("values", "bounds", "dtypes")}
    mismatches, ratios = compare(outputs, replace(expected, statistics=None, **parts), problem)
    return {"agrees": not mismatches, "error_over_bound": max(ratio for _, ratio in ratios)}


def _ours(problem: Problem) -> Prepared:
    """The attention of one layer: its plan was made before, once for all layers."""
    plan = _planned(problem)

    def work() -> None:
        optimized.attention(**problem.arguments, plan=plan)

    return work, dict(problem.outputs), find("ours").contract(problem.case)


def _planned(problem: Problem) -> optimized.Plan:
    shape = problem.case.batch
    return optimized.make_plan(problem.arguments["batch"], (shape.num_tokens, shape.num_requests, max(shape.seq_lens)))


def _ours_with_plan(problem: Problem) -> Prepared:
    """The attention of a step's first layer, which its plan comes before."""

    def work() -> None:
        optimized.attention(**problem.arguments, plan=_planned(problem))

    return work, dict(problem.outputs), find("ours").contract(problem.case)


def _vllm(problem: Problem) -> Prepared:
    """Without rows of padding, which it never writes, and without an lse, which it does not return."""
    unified_attention = importlib.import_module(PEER).unified_attention
    arguments, shape = problem.arguments, problem.case.batch
    rows = sum(shape.query_lens)
    whole = torch.zeros_like(problem.outputs["out"])
    batch = arguments["batch"]

    def work() -> None:
        unified_attention(
            q=arguments["q"][:rows],
            k=arguments["k_cache"],
            v=arguments["v_cache"],
            out=whole[:rows],
            cu_seqlens_q=batch.cu_seqlens_q,
            max_seqlen_q=max(shape.query_lens),
            seqused_k=batch.seq_lens,
            max_seqlen_k=max(shape.seq_lens),
            softmax_scale=arguments["rules"].softmax_scale,
            causal=True,
            window_size=(-1, -1),
            block_table=batch.block_table,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )

    # P is cast to the values' format; the exponent is multiplied inside of exp; tiles of 16 keys or more, never split.
    return work, {"out": whole}, NumericContract(p_dtype=problem.case.spec.dtype, exponent_roundings=3, tile_keys=16)
