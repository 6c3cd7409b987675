"""FlashInfer's wrappers, as of 0.5.3: paged decode and prefill, the FA2 and the FA3 kernels, latent rows, append.

A plan is made on the host, once per step, for the very batch and not for a graph's capacity: that is what serves them
best, and here they are captured after it. Planning again gives a captured call's lists other memory.
Kernels are compiled by nvcc at their first use; `build` compiles those of many problems at once.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any

import torch

from pageproof.oracle import NumericContract, Spec
from pageproof.oracle.building.problem import Problem
from pageproof.oracle.formats import torch_dtype

from . import Prepared, Unsupported
from .live import Live, live, require, require_one_token

WORKSPACE_BYTES = 512 << 20
NO_POSITIONS = 0  # PosEncodingMode.NONE


def decode(problem: Problem) -> Prepared:
    """The decode wrapper on tensor cores, which takes the FA2 kernels."""
    module = importlib.import_module("flashinfer")
    require(problem, rules=("softcap", "sliding_window"), float8=True)
    found = live(problem)
    require_one_token(found)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(found.batch.device), "NHD", use_tensor_cores=True
    )  # fmt: skip
    lists = tuple(tensor.cpu() for tensor in found.page_lists())
    return _paged(found, wrapper, lists, {}, split=True)


def fa2(problem: Problem) -> Prepared:
    if problem.case.spec.is_mla:
        return _latent(problem, "fa2")
    require(problem, rules=("softcap", "sliding_window"), float8=True)
    return _prefill(problem, "fa2")


def fa3(problem: Problem) -> Prepared:
    if problem.case.spec.is_mla:
        return _latent(problem, "fa3")
    require(problem, rules=("softcap", "sliding_window"))
    return _prefill(problem, "fa3")


def _prefill(problem: Problem, backend: str) -> Prepared:
    """The prefill wrapper, which serves decodes and mixed batches too."""
    module = importlib.import_module("flashinfer")
    found = live(problem)
    wrapper = module.BatchPrefillWithPagedKVCacheWrapper(_workspace(found.batch.device), "NHD", backend=backend)
    lists = tuple(tensor.cpu() for tensor in (found.indptr(list(found.query_lens)), *found.page_lists()))
    return _paged(found, wrapper, lists, {"causal": True}, split=backend == "fa2")


def _paged(found: Live, wrapper: Any, lists: tuple[Any, ...], options: dict[str, Any], *, split: bool) -> Prepared:
    spec, arguments = found.spec, found.problem.arguments
    if spec.head_size != spec.head_size_v:
        raise Unsupported("keys and values of one size only")
    if spec.scales == "head":
        raise Unsupported("one scale per tensor only")
    key_scale, value_scale = found.scale("k"), found.scale("v")
    caches = arguments["k_cache"], arguments["v_cache"]
    queries = found.argument("q")
    out, outputs = found.new_out()

    def plan() -> None:
        wrapper.plan(
            *lists,
            spec.num_query_heads,
            spec.num_kv_heads,
            spec.head_size,
            spec.block_size,
            window_left=found.window_left,
            logits_soft_cap=found.rules.softcap,
            sm_scale=found.rules.softmax_scale,
            q_data_type=queries.dtype,
            kv_data_type=caches[0].dtype,
            **options,
        )

    def work() -> None:
        wrapper.run(queries, caches, k_scale=key_scale, v_scale=None if value_scale == 1.0 else value_scale, out=out)

    plan()
    return Prepared(work=work, outputs=outputs, contract=_contract(spec, split), plan=plan, plan_on="host")


def _contract(spec: Spec, split: bool) -> NumericContract:
    """P in the queries' format, as the partial results of a split; base 2 throughout; the hardware's tanh.

    Where splits end is decided by the number of processors: none is shorter than 128 keys, or 32 latent rows.
    """
    return NumericContract(
        p_dtype=spec.dtype,
        tanh="approx",
        exponent_roundings=3,
        tile_keys=16,
        split_keys=(32 if spec.is_mla else 128) if split else None,
        u_partial=torch.finfo(torch_dtype(spec.dtype)).eps / 2 if split else 2.0**-24,
    )


def _latent(problem: Problem, backend: str) -> Prepared:
    module = importlib.import_module("flashinfer.mla")
    require(problem)
    found = live(problem)
    spec = found.spec
    wrapper = module.BatchMLAPagedAttentionWrapper(_workspace(found.batch.device), backend=backend)
    starts, lengths = found.indptr(list(found.query_lens)), found.ints(list(found.seq_lens))
    indptr, indices, _ = found.page_lists()
    lists = tuple(tensor.cpu() for tensor in (starts, indptr, indices, lengths))
    latent, queries, rope = problem.arguments["latent_cache"], found.argument("q_nope"), found.argument("q_pe")
    compressed, positional = latent[..., : spec.head_size], latent[..., spec.head_size :]
    out, outputs = found.new_out()

    def plan() -> None:
        wrapper.plan(
            *lists,
            spec.num_query_heads,
            spec.head_size,
            spec.rope_head_size,
            spec.block_size,
            True,
            found.rules.softmax_scale,
            queries.dtype,
            latent.dtype,
        )

    def work() -> None:
        wrapper.run(queries, rope, compressed, positional, out=out)

    plan()
    return Prepared(work=work, outputs=outputs, contract=_contract(spec, True), plan=plan, plan_on="host")


def update(problem: Problem) -> Prepared:
    """Appends by request and position instead of by slot: the same rows to the same places."""
    module = importlib.import_module("flashinfer")
    if problem.case.spec.kv_dtype:
        raise Unsupported("converts nothing")
    arguments, spec = problem.arguments, problem.case.spec
    slots = arguments["slot_mapping"]
    pages, last = slots // spec.block_size, slots % spec.block_size
    rows = slots.shape[0]
    # Every row is a request of its own, of one page: where the append finds its slot is all that is asked.
    requests = torch.arange(rows, dtype=torch.int32, device=slots.device)
    indptr = torch.arange(rows + 1, dtype=torch.int32, device=slots.device)
    pages, positions, lengths = pages.int(), last.int(), (last + 1).int()
    caches = arguments["k_cache"], arguments["v_cache"]

    def work() -> None:
        module.append_paged_kv_cache(
            arguments["key"][:rows], arguments["value"][:rows], requests, positions, caches, pages, indptr, lengths
        )

    return Prepared(work=work, outputs=dict(problem.outputs), contract=NumericContract())


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    """What wrappers share: one after the other runs, and a plan writes only into what is its own."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def build(specs: Iterable[Spec]) -> int:
    """Compile the kernels that these problems will ask for, all at once; how many modules that is."""
    modules = importlib.import_module("flashinfer.jit.attention.modules")
    core, page = importlib.import_module("flashinfer.jit.core"), importlib.import_module("flashinfer.jit.page")
    wanted = {key for spec in specs for key in _modules(spec)}
    found = [page.gen_page_module()]
    for kind, *key in sorted(wanted, key=str):
        generate = modules.gen_batch_mla_module if kind == "mla" else modules.gen_batch_prefill_module
        found.append(generate(*key))
    core.build_jit_specs(found)
    return len(found)


def _modules(spec: Spec) -> Iterable[tuple[Any, ...]]:
    """(kind, *arguments of the generator) of every module that the functions above load for a problem of this kind."""
    if spec.sinks or spec.alibi or spec.operation not in ("attention", "mla_attention"):
        return
    queries, cached = torch_dtype(spec.dtype), torch_dtype(spec.kv_dtype or spec.dtype)
    for backend in ("fa2", "fa3"):
        if spec.kv_dtype and (backend == "fa3" or spec.is_mla):
            continue
        formats = (backend, queries, cached, queries, torch.int32)
        if spec.is_mla:
            yield "mla", *formats, spec.head_size, spec.rope_head_size, False
        else:
            rules = (NO_POSITIONS, spec.sliding_window is not None, spec.softcap is not None, False)
            yield "prefill", *formats, spec.head_size, spec.head_size_v, *rules
