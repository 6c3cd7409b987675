"""The rates that floors are made of, measured in the run itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from attention_work import Ceilings
from step_timing import Clock

ROUNDS = 15


def measure_ceilings(clock: Clock) -> Ceilings:
    """A copy and a read of 2 GiB, and an 8192^3 product in bfloat16 of values that are not zero."""
    device = clock.device
    on_gpu = device.type == "cuda"
    count, size = (2**30, 8192) if on_gpu else (2**16, 64)
    source = torch.randn(count, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    works: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "read": lambda: source.sum(),
        "matmul": lambda: torch.mm(a, b, out=product),
    }
    taken = clock.interleaved(works, ROUNDS)
    us = {name: statistics.median(times.step) for name, times in taken.items()}
    return Ceilings(
        copy_gbps=2 * source.nbytes / us["copy"] / 1e3,
        read_gbps=source.nbytes / us["read"] / 1e3,
        matmul_tflops=2 * size**3 / us["matmul"] / 1e6,
    )
