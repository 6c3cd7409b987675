"""One row of the attention benchmark: tensors, every implementation captured and judged, then all timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from attention_answers import Judge
from attention_rows import Row
from attention_work import Ceilings, figures, goal_here, meets, work_of
from peers import Peer, Prepared, Unsupported, is_ours
from peers.live import live_lengths
from step_timing import Clock, Times
from torch import Tensor

from pageproof.oracle.building.pages import lay_out
from pageproof.oracle.building.problem import Problem
from pageproof.oracle.building.tensors import build
from pageproof.oracle.execution.graphs.interface import Backend, Graph, capture

HOST_PLANS = 7  # a plan that is made on the host is timed so often

Line = dict[str, Any]


@dataclass
class Bench:
    """What all rows share."""

    backend: Backend
    clock: Clock
    ceilings: Ceilings
    rounds: int
    seconds: float  # at most, for the timing of one row


@dataclass
class Entry:
    """One implementation on one row, ready to be replayed."""

    line: Line
    prepared: Prepared  # a graph keeps addresses only
    graph: Graph
    plan: Graph | None = None


@dataclass
class Measured:
    """A row and its lines, by implementation."""

    row: Row
    lines: dict[str, Line] = field(default_factory=dict)
    seconds: float = 0.0

    def summary(self, ceilings: Ceilings) -> dict[str, Any]:
        work = work_of(self.row)
        floor, of = work.floor_us(ceilings)
        return {
            "name": self.row.name,
            "section": self.row.section,
            "requests": [list(request) for request in _counted(self.row.lengths)],
            "bucket": {"tokens": self.row.tokens, "requests": self.row.requests, "keys": self.row.keys},
            "formats": [self.row.spec.dtype, self.row.spec.kv_dtype or self.row.spec.dtype, self.row.spec.block_size],
            "bytes": work.bytes,
            "flops": work.flops,
            "floor_us": floor,
            "floor_of": of,
            "goal": goal_here(self.row.goal, ceilings),
            "seconds": self.seconds,
            "lines": list(self.lines.values()),
        }


def measure(measured: Measured, peers: dict[str, Peer], bench: Bench) -> None:
    """Fill in a line for every peer, with a `gap` that says why where it has no time.

    What is raised is no single peer's: the device is lost, or there is no room for the row's tensors.
    """
    began = time.perf_counter()
    measured.lines = {name: {"of": name, "gap": "not reached"} for name in peers}
    problem = _problem(measured.row, bench.backend.device)
    judge = Judge(problem)
    entries: dict[str, Entry] = {}
    for name, peer in peers.items():
        line = measured.lines[name] = {"of": name}
        with _gaps(line):
            entries[name] = _ready(line, peer.prepare(problem), problem, judge, bench.backend)
        bench.backend.synchronize()  # a fault of the device ends the run
    _time(entries, bench)
    for entry in entries.values():
        entry.graph.release()
        if entry.plan is not None:
            entry.plan.release()
    _derive(measured, bench.ceilings)
    measured.seconds = time.perf_counter() - began


def _problem(row: Row, device: torch.device) -> Problem:
    """The row's tensors. An update writes every row, one request's after the other, where the oracle's skips some."""
    problem = build(row.case(), device)
    if row.section != "update":
        return problem
    pages = lay_out(problem.case)
    query_lens, _ = live_lengths(problem)
    stops = pages.key_starts[1:]
    slots = [pages.slot_of_key[stop - new : stop] for new, stop in zip(query_lens, stops, strict=False)]
    problem.arguments["slot_mapping"] = torch.cat([torch.from_numpy(part) for part in slots]).to(device)
    return problem


@contextmanager
def _gaps(line: Line) -> Iterator[None]:
    """What goes wrong with one implementation is its gap, and the end of no other."""
    try:
        yield
    except Unsupported as error:
        line["gap"] = f"not offered: {error}"
    except ImportError as error:
        line["gap"] = f"not here: {error}"
    except Exception as error:  # whatever a peer may raise
        line |= {"gap": words(error), "failed": True}


def words(error: Exception) -> str:
    """The error's type, first and last line: one of them says what happened."""
    lines = [line.strip()[:200] for line in str(error).splitlines() if line.strip()]
    shown = lines if len(lines) < 2 else [lines[0], "...", lines[-1]]
    return f"{type(error).__name__}: {' '.join(shown)}"


def _ready(line: Line, prepared: Prepared, problem: Problem, judge: Judge, backend: Backend) -> Entry:
    """Captured, replayed once on outputs that hold nothing, and judged."""
    if prepared.plan is not None and prepared.plan_on == "host":
        line["plan_host_us"] = _host_us(prepared.plan, backend)  # before the capture: see peers/flashinfer.py
    if prepared.note:
        line["note"] = prepared.note
    pristine = {name: pool.clone() for name, pool in problem.pristine.items()}
    graph = captured(backend, prepared.work)
    blank(problem, prepared.outputs, pristine)
    graph.replay()
    if prepared.collect is not None:
        prepared.collect()
    backend.synchronize()
    line |= judge.ask(prepared.outputs, prepared.contract, independent=is_ours(line["of"]))
    if violation := problem.guards.violations():
        line |= {"agrees": False, "disagreement": violation}
        problem.guards.put_back()
    entry = Entry(line, prepared, graph)
    if prepared.plan is not None and prepared.plan_on == "device":
        entry.plan = captured(backend, prepared.plan)
    return entry


def captured(backend: Backend, work: Callable[[], None]) -> Graph:
    backend.warm_up(work)
    with capture(backend, backend.new_pool()) as graph:
        work()
    return graph


def blank(problem: Problem, outputs: dict[str, Tensor], pristine: dict[str, Tensor]) -> None:
    """What the warm-up wrote is no answer of the graph's. Rows of padding stay: not every peer writes them."""
    for name, tensor in outputs.items():
        if name in pristine:
            tensor.copy_(pristine[name])
        else:
            tensor[: sum(problem.case.batch.query_lens)] = torch.nan


def _host_us(plan: Callable[[], None], backend: Backend) -> float:
    taken = []
    for _ in range(HOST_PLANS):
        backend.synchronize()
        began = time.perf_counter()
        plan()
        backend.synchronize()
        taken.append((time.perf_counter() - began) * 1e6)
    return statistics.median(taken)


def _time(entries: dict[str, Entry], bench: Bench) -> None:
    works = {name: entry.graph.replay for name, entry in entries.items()}
    for name, times in bench.clock.interleaved(works, bench.rounds, bench.seconds).items():
        entries[name].line |= _named(times)
    plans = {name: entry.plan.replay for name, entry in entries.items() if entry.plan is not None}
    for name, times in bench.clock.interleaved(plans, bench.rounds, bench.seconds).items():
        entries[name].line["plan_us"] = statistics.median(times.step)


def _named(times: Times) -> Line:
    found = times.figures()
    return {
        "us": found["step_us"],
        "p10_us": found["step_p10_us"],
        "p90_us": found["step_p90_us"],
        "rounds": len(times.step),
    }


def _derive(measured: Measured, ceilings: Ceilings) -> None:
    work, goal = work_of(measured.row), goal_here(measured.row.goal, ceilings)
    timed = {name: line for name, line in measured.lines.items() if "us" in line}
    theirs = [line["us"] for name, line in timed.items() if not is_ours(name) and line["agrees"]]
    for name, line in timed.items():
        line |= figures(line["us"], work, ceilings)
        if theirs:
            line["times_as_fast_as_best_peer"] = min(theirs) / line["us"]
        if goal is not None and is_ours(name):
            line["meets_goal"] = meets(goal, line)


def _counted(lengths: tuple[tuple[int, int], ...]) -> list[tuple[int, int, int]]:
    """(how many, new tokens, keys), neighbours alike together."""
    counted: list[tuple[int, int, int]] = []
    for new, keys in lengths:
        if counted and counted[-1][1:] == (new, keys):
            counted[-1] = (counted[-1][0] + 1, new, keys)
        else:
            counted.append((1, new, keys))
    return counted
