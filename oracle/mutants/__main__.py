"""`python -m pageproof.oracle.mutants`: hunt every seeded bug and say after how many cases each was seen."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from ..cli import UNUSABLE, natural, positive
from ..environment import DEVICES, NoDevice, Unusable, choose_device, set_variables

if TYPE_CHECKING:
    from .catalogue import Mutant
    from .hunt import Step


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every mutant was found, 1 if one was not, 2 for wrong usage or where none can be hunted."""
    parser = argparse.ArgumentParser(prog="python -m pageproof.oracle.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to hunt (all)")
    parser.add_argument("--seed", type=natural, default=0, help="of the cases, as for fuzz (0)")
    parser.add_argument("--limit", type=positive(int), default=200, help="cases after which to give up (200)")
    parser.add_argument("--device", choices=DEVICES, help="where to run (a GPU where there is one)")
    options = parser.parse_args(arguments)
    try:
        device = choose_device(options.device)
        set_variables(device)
        mutants, ends = _hunt(options.names, options.seed, options.limit, device)
    except (Unusable, ValueError) as error:
        remedy = "; --device cpu goes on without one" if isinstance(error, NoDevice) else ""
        sys.stderr.write(f"mutants: {error}{remedy}\n")
        return UNUSABLE
    for mutant, end in zip(mutants, ends, strict=True):
        found = f"{end.outcome} at case {end.case}" if end.outcome else f"not found in {end.case} cases"
        sys.stdout.write(f"{mutant.name:28}{found:26}{mutant.story}\n")
    counts = [end.case for end in ends if end.outcome]
    median = f", median {statistics.median(counts):g} cases to find one" if counts else ""
    sys.stdout.write(f"found {len(counts)} of {len(ends)} mutants on {device}, seed {options.seed}{median}\n")
    return 0 if len(counts) == len(ends) else 1


def _hunt(names: Sequence[str], seed: int, limit: int, device: str) -> tuple[Sequence[Mutant], list[Step]]:
    from .catalogue import MUTANTS, find
    from .hunt import hunt_apart

    mutants = [find(name) for name in names] or MUTANTS
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        run = partial(hunt_apart, seed=seed, limit=limit, device=device)
        return mutants, list(pool.map(run, (mutant.name for mutant in mutants)))


if __name__ == "__main__":
    sys.exit(main())
