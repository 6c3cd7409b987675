"""The kernels of this project, as the layers of a step call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pageproof import optimized
from pageproof.optimized.tuning import request_programs
from pageproof.oracle.adapters import find
from pageproof.oracle.building.problem import Problem

from . import Prepared

WIDEST = {"cuda": (8192, 256), "cpu": (64, 8)}  # tokens and requests of the one graph that fits every mixed batch


def with_plan_given(problem: Problem) -> Prepared:
    """The attention of one layer: its plan was made before, once for all layers."""
    return _with_plan(problem, batch_invariant=False)


def batch_invariant(problem: Problem) -> Prepared:
    """The same where a request's bits do not depend on the batch."""
    return _with_plan(problem, batch_invariant=True)


def _with_plan(problem: Problem, *, batch_invariant: bool) -> Prepared:
    plan = _planned(problem, batch_invariant=batch_invariant)
    operation = getattr(optimized, problem.case.spec.operation)

    def work() -> None:
        operation(**problem.arguments, plan=plan)

    def make_plan() -> None:
        _planned(problem, batch_invariant=batch_invariant)

    return _prepared(problem, work, dict(problem.outputs), make_plan)


def planning_itself(problem: Problem) -> Prepared:
    """The attention of a step's first layer, which its plan comes before."""
    operation = getattr(optimized, problem.case.spec.operation)

    def work() -> None:
        operation(**problem.arguments, plan=_planned(problem))

    return _prepared(problem, work, dict(problem.outputs))


def in_the_widest_bucket(problem: Problem) -> Prepared:
    """The same in a graph whose buffers hold every mixed batch: most of their rows are padding here."""
    arguments = dict(problem.arguments)
    widest = WIDEST[problem.outputs["out"].device.type]
    tokens = max(widest[0], problem.case.batch.num_tokens)
    for name in ("q", "out", "lse"):
        arguments[name] = _longer(arguments[name], tokens)
    batch = arguments["batch"]
    more = max(0, widest[1] - batch.num_requests)
    end = batch.cu_seqlens_q[-1:].expand(more)
    arguments["batch"] = batch = optimized.Batch(
        torch.cat((batch.cu_seqlens_q, end)),
        _longer(batch.seq_lens, batch.num_requests + more),
        _longer(batch.block_table, batch.num_requests + more),
    )
    capacity = tokens, batch.num_requests, batch.max_blocks * problem.case.spec.block_size
    programs = _programs_of(problem)
    plan = optimized.make_plan(batch, capacity, request_programs=programs)

    def work() -> None:
        optimized.attention(**arguments, plan=plan)

    def make_plan() -> None:
        optimized.make_plan(batch, capacity, request_programs=programs)

    outputs = {name: arguments[name][: tensor.shape[0]] for name, tensor in problem.outputs.items()}
    return _prepared(problem, work, outputs, make_plan)


def update(problem: Problem) -> Prepared:
    operation = getattr(optimized, problem.case.spec.operation)

    def work() -> None:
        operation(**problem.arguments)

    return _prepared(problem, work, dict(problem.outputs))


def _prepared(problem: Problem, work: Any, outputs: dict[str, Tensor], plan: Any = None) -> Prepared:
    return Prepared(work=work, outputs=outputs, contract=find("ours").contract(problem.case), plan=plan)


def _planned(problem: Problem, *, batch_invariant: bool = False) -> optimized.Plan:
    """For everything that the buffers hold, and not only for the batch that lies in them."""
    batch = problem.arguments["batch"]
    keys = batch.max_blocks * problem.case.spec.block_size
    capacity = problem.case.batch.num_tokens, batch.num_requests, keys
    programs = _programs_of(problem)
    return optimized.make_plan(batch, capacity, request_programs=programs, batch_invariant=batch_invariant)


def _programs_of(problem: Problem) -> int:
    spec = problem.case.spec
    heads = {"num_query_heads": spec.num_query_heads, "num_kv_heads": spec.num_kv_heads}
    return request_programs(spec.operation, **heads)


def _longer(tensor: Tensor, rows: int) -> Tensor:
    """A copy with rows of 0 behind."""
    longer = tensor.new_zeros((rows, *tensor.shape[1:]))
    longer[: tensor.shape[0]] = tensor
    return longer
