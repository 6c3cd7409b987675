"""Attention alone on a mixed batch, replayed from a graph: ours, and vLLM's one launch for everything.

Both answers are held to the bound of their own arithmetic before either is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attention_answers import Judge
from attention_row import blank, captured
from peers import PEERS
from step_timing import Clock

from pageproof.oracle import BatchShape, Case, Spec
from pageproof.oracle.building.tensors import build
from pageproof.oracle.execution.graphs.interface import Backend

MEASURED = {"ours": "ours", "ours with plan": "ours-planning", "vllm": "vllm-2d"}
GOAL = 10.0  # times as fast as the peer


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
    judge = Judge(problem)
    works: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, Any]] = {}
    held = []  # a graph keeps addresses only
    for name, peer in MEASURED.items():
        rows[name] = {"attention": f"1 x {case.batch.seq_lens[0]} + {case.batch.query_lens[1]}", "of": name}
        try:
            prepared = PEERS[peer].prepare(problem)
        except ImportError as error:
            rows[name]["gap"] = f"{type(error).__name__}: {error}"
            continue
        graph = captured(backend, prepared.work)
        blank(problem, prepared.outputs, {})
        graph.replay()
        backend.synchronize()
        rows[name] |= judge.ask(prepared.outputs, prepared.contract)
        if rows[name]["agrees"]:
            works[name] = graph.replay
        held.append(prepared)
    times = Clock(backend.device).interleaved(works, rounds)
    for name, taken in times.items():
        rows[name] |= taken.figures()
    if "vllm" in times:
        for name in times.keys() - {"vllm"}:
            rows[name]["times_as_fast"] = rows["vllm"]["step_us"] / rows[name]["step_us"]
            rows[name]["goal"] = GOAL
    return list(rows.values())
