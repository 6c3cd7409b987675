"""Clocks of the step benchmark: what a replay takes on the device and on the host, and what it launches."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

FEWEST_ROUNDS = 5
FLUSHED_BYTES = 256 << 20  # more than any cache of a GPU holds
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")  # and their newer forms, which begin like this


@dataclass
class Times:
    """Microseconds of the same work, round after round; `device` is empty where there is no GPU."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def step(self) -> list[float]:
        """What counts as the time of a step."""
        return self.device or self.host

    def figures(self) -> dict[str, float | None]:
        low, *_, high = statistics.quantiles(self.step, n=10, method="inclusive")
        return {
            "step_us": statistics.median(self.step),
            "step_p10_us": low,
            "step_p90_us": high,
            "host_us": statistics.median(self.host),
        }


class Clock:
    """Times work from an idle device with cold caches on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spare = torch.empty(FLUSHED_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)

    def take(self, work: Callable[[], object], times: Times) -> None:
        """Do it once. The host begins to issue it while the caches are flushed, which takes some 60 us."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            times.host.append((time.perf_counter() - start) * 1e6)
            return
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        self._spare.zero_()
        before.record()
        start = time.perf_counter()
        work()
        times.host.append((time.perf_counter() - start) * 1e6)
        after.record()
        after.synchronize()
        times.device.append(before.elapsed_time(after) * 1e3)

    def interleaved(
        self, works: Mapping[str, Callable[[], object]], rounds: int, seconds: float = math.inf
    ) -> dict[str, Times]:
        """Every work once a round, each round beginning with another one: a drift of the clocks meets all alike.

        After `seconds` no further round begins, but for the first `FEWEST_ROUNDS`.
        """
        names, began = list(works), time.perf_counter()
        times = {name: Times() for name in names}
        for name in names:  # whatever is done only once
            works[name]()
        for turn in range(rounds):
            if turn >= FEWEST_ROUNDS and time.perf_counter() - began > seconds:
                break
            for index in range(len(names)):
                name = names[(turn + index) % len(names)]
                self.take(works[name], times[name])
        return times


def launches(work: Callable[[], None], device: torch.device) -> dict[str, int | None]:
    """Kernels that ran on the device, and calls of the host that launched them; None where no profiler sees them."""
    if device.type != "cuda":
        return {"kernels": None, "host_launches": None}
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize(device)
    events = profile.events()
    on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)
    calls = sum(event.name.startswith(_LAUNCHES) for event in events)
    return {"kernels": kernels or None, "host_launches": calls or None}


def paired_ratio(times: Times, base: Times) -> float:
    """Median over the rounds of one's step time divided by the other's."""
    return statistics.median(one / other for one, other in zip(times.step, base.step, strict=True))
