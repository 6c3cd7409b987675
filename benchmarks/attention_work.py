"""What a row has to do, and what that takes at least: bytes, flops, floors, and figures made of a measured time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attention_rows import REFERENCE, Goal, Row

from pageproof.oracle import Spec

ITEMSIZE = {"": 2, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches in this run: a device copy (bytes read and written), a read, a matrix product."""

    copy_gbps: float
    read_gbps: float
    matmul_tflops: float


@dataclass(frozen=True)
class Work:
    """Of one row. bytes: its keys and values, each once (an update's rows, read and written). pairs: visible ones."""

    bytes: int
    flops: int
    pairs: int

    def floor_us(self, ceilings: Ceilings) -> tuple[float, str]:
        """The larger of the two times, and what it is one of."""
        of_bytes = self.bytes / ceilings.copy_gbps / 1e3
        of_flops = self.flops / ceilings.matmul_tflops / 1e6
        return (of_bytes, "bytes") if of_bytes >= of_flops else (of_flops, "flops")


def work_of(row: Row) -> Work:
    spec = row.spec
    cached = ITEMSIZE[spec.kv_dtype or spec.dtype]
    width = spec.head_size + (spec.rope_head_size if spec.is_mla else spec.head_size_v)
    tokens = sum(new for new, _ in row.lengths)
    if spec.operation.startswith("update"):
        return Work(tokens * spec.num_kv_heads * width * (ITEMSIZE[spec.dtype] + cached), 0, 0)
    pairs = sum(_pairs(new, keys, spec.sliding_window) for new, keys in row.lengths)
    read = sum(keys - _first(new, keys, spec.sliding_window) for new, keys in row.lengths)
    flops = 2 * pairs * spec.num_query_heads * _columns(spec)
    if spec.operation == "mla_attention_decompressed":
        flops += 2 * read * spec.num_query_heads * spec.head_size * (spec.nope_head_size + spec.head_size_v)
    return Work(read * spec.num_kv_heads * width * cached, flops, pairs)


def _columns(spec: Spec) -> int:
    """Columns of the two products together, of one query head."""
    if spec.operation == "mla_attention":
        return 2 * spec.head_size + spec.rope_head_size
    if spec.operation == "mla_attention_decompressed":
        return spec.nope_head_size + spec.rope_head_size + spec.head_size_v
    return spec.head_size + spec.head_size_v


def _first(new: int, keys: int, window: int | None) -> int:
    return 0 if window is None else max(0, keys - new - window + 1)


def _pairs(new: int, keys: int, window: int | None) -> int:
    """Causal: token t sees keys - new + t + 1 of them, and no more than the window."""
    first, last = keys - new + 1, keys
    most = last if window is None else min(last, window)
    rising = max(0, min(last, most) - first + 1)  # tokens that see all keys up to their own
    rising_sum = (first + first + rising - 1) * rising // 2
    return rising_sum + (new - rising) * most


def figures(us: float, work: Work, ceilings: Ceilings) -> dict[str, float]:
    floor, _ = work.floor_us(ceilings)
    return {
        "gbps": work.bytes / us / 1e3,
        "tflops": work.flops / us / 1e6,
        "of_ceiling": floor / us,
        "ns_per_kpair": us * 1e6 / work.pairs if work.pairs else 0.0,
    }


def goal_here(goal: Goal | None, ceilings: Ceilings) -> dict[str, Any] | None:
    """The goal as this machine has to meet it: times by its copy rate, rates by its matrix product."""
    if goal is None:
        return None
    if goal.us is not None:
        return {"us": goal.us * REFERENCE["copy_gbps"] / ceilings.copy_gbps}
    if goal.tflops is not None:
        return {"tflops": goal.tflops * ceilings.matmul_tflops / REFERENCE["matmul_tflops"]}
    return {"of_ceiling": goal.of_ceiling}


def meets(goal: dict[str, float], line: dict[str, Any]) -> bool:
    if "us" in goal:
        return bool(line["us"] <= goal["us"])
    ((name, least),) = goal.items()
    return bool(line[name] >= least)
