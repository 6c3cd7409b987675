"""`python -m pageproof.oracle.mutants`: hunt every seeded bug and say after how many cases each was seen."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ..environment import DEVICES, choose_device, set_variables


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every mutant was found, 1 if one was not."""
    parser = argparse.ArgumentParser(prog="python -m pageproof.oracle.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to hunt (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases, as for fuzz (0)")
    parser.add_argument("--limit", type=int, default=200, help="cases after which to give up (200)")
    parser.add_argument("--device", choices=DEVICES, help="where to run (a GPU where there is one)")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    set_variables(device)
    from .catalogue import MUTANTS, find
    from .hunt import hunt_apart

    names = [find(name).name for name in options.names] or [mutant.name for mutant in MUTANTS]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        run = partial(hunt_apart, seed=options.seed, limit=options.limit, device=device)
        ends = list(pool.map(run, names))
    for name, end in zip(names, ends, strict=True):
        found = f"{end.outcome} at case {end.case}" if end.outcome else f"not found in {end.case} cases"
        sys.stdout.write(f"{name:28}{found}\n")
    counts = [end.case for end in ends if end.outcome]
    median = f", median {statistics.median(counts):g} cases to find one" if counts else ""
    sys.stdout.write(f"found {len(counts)} of {len(names)} mutants on {device}, seed {options.seed}{median}\n")
    return 0 if len(counts) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
