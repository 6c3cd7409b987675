"""A campaign: all pairs of features first, then random cases grouped by compile key, over worker processes.

Which cases a group has depends on the seed and the group's index alone; how many groups are reached depends on the
time there is. So the same seed gives the same cases on any number of workers, as far as the time reaches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ..environment import choose_device, usable_cores, variables_for, versions, visible_gpus
from .controller import Controller
from .findings import Findings
from .past import Past
from .pool import make_setups
from .summary import Options, Summary

# Where every worker has a core, the GPU is what they wait for, and when they compile it has less to do. On an H200 and
# 16 cores 22 workers judge 125 cases with replays in a second while none compiles, 16 judge 112.
WORKERS_PER_CORE = 1.5
WORKERS_PER_GPU = 24


def run(options: Options, watch: Callable[[Summary], None] = lambda summary: None) -> Summary:
    """Run a campaign to its end; `watch` is called a few times a second with where it stands.

    Raises `environment.Unusable` if the device or the target cannot be used. An interrupt ends the campaign and
    leaves what it came to so far.
    """
    device = choose_device(options.device)
    devices = [f"cuda:{index}" for index in range(visible_gpus())] if device == "cuda" else ["cpu"]
    summary = Summary(
        options=options,
        device=device,
        workers=workers(options, len(devices) if device == "cuda" else 0),
        versions=versions(),
        findings=Findings(options.findings),
        past=Past() if options.given else Past.load(options.past or options.findings, device),
    )
    options.findings.mkdir(parents=True, exist_ok=True)
    setups = make_setups(options, summary.workers, devices)
    watch(summary)
    with variables_for(device):
        Controller(options, summary, setups).run(watch)
    for lock in options.findings.glob("far-*.lock"):
        lock.unlink()
    with contextlib.suppress(OSError):
        options.findings.rmdir()  # there is something in it, or there is no need of it
    return summary


def workers(options: Options, gpus: int) -> int:
    if options.given:
        return 1
    cores = usable_cores()
    return options.workers or (min(int(WORKERS_PER_CORE * cores), WORKERS_PER_GPU * gpus) if gpus else cores)
