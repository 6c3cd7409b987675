"""How large the statistical checks' figures are for a right candidate, over many cases (docs/bound.md).

    PYTHONPATH=tests/checkout python benchmarks/calibration.py [--cases 100000] [--seconds S] [--device cuda]
        [--workers N] [--seed S] [--target NAME] [--json FILE]
    PYTHONPATH=tests/checkout:. python benchmarks/calibration.py --simulated 3000

`fuzz` with the cases left out of which the statistics say nothing. Prints, for each kind of number formats, the cases
and the quantiles of each case's largest figure; `--json` writes the campaign's whole summary. A case outside of a limit
is a finding, as in `fuzz`; then, and if no case was judged, this ends with exit code 1. `--simulated` judges so many
draws of tests/test_statistics.py instead, each with a kernel that keeps to the arithmetic drawn for it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from pageproof.oracle import judge
from pageproof.oracle.adapters import find
from pageproof.oracle.bound.statistics import why_not_generic
from pageproof.oracle.campaign import report
from pageproof.oracle.campaign.pairs import MODEL
from pageproof.oracle.campaign.runner import run
from pageproof.oracle.campaign.summary import Options
from pageproof.oracle.campaign.tally import Tally
from pageproof.oracle.candidate import NumericContract
from pageproof.oracle.case import Case
from pageproof.oracle.verdict import Outcome

TARGET = "PAGEPROOF_CALIBRATION_TARGET"  # workers are processes of their own, and learn the target from here


class Generic:
    """Another candidate, which declines every case that has no statistics: so the campaign draws none of them."""

    def __init__(self) -> None:
        self.inner = find(os.environ[TARGET])
        self.name = self.inner.name

    def declines(self, case: Case) -> str | None:
        return self.inner.declines(case) or why_not_generic(case, self.inner.contract(case))

    def contract(self, case: Case) -> NumericContract:
        return self.inner.contract(case)

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        return self.inner.call(operation, arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=570.0)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="ours")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--simulated", type=int, default=0)
    options = parser.parse_args()
    if options.simulated:
        return simulated(options.simulated)
    os.environ[TARGET] = options.target
    asked = {name: getattr(options, name) for name in ("device", "seconds", "seed", "workers", "cases")}
    summary = run(Options(target="calibration:Generic", **asked))
    if options.json is not None:
        options.json.write_text(report.to_json(summary))
    print(table(summary.tally))
    print(report.closing(summary))
    return 1 if len(summary.findings) or not summary.tally.cases else 0


def simulated(draws: int) -> int:
    from tests.simulated_kernel import Simulated
    from tests.test_statistics import draw

    tally = Tally()
    for seed in range(draws):
        case, arithmetic, tensor_core = draw(seed)
        tally.add(judge(case, Simulated(arithmetic, seed=seed, tensor_core=tensor_core)), MODEL)
    print(table(tally))
    print(f"{draws:,} draws, {tally.long_share:.0%} >= 1024 keys, torch {torch.__version__}: {dict(tally.outcomes)}")
    return 0 if tally.outcomes[Outcome.AGREES] == draws else 1


def table(tally: Tally) -> str:
    names = (*report.QUANTILES, "largest")
    lines = [f"{'number formats':28}{'of':20}{'cases':>8}" + "".join(f"{name:>9}" for name in names)]
    for part in report.spread(tally):
        figures = "".join(f"{part[name]:9.3f}" for name in names)
        lines.append(f"{part['formats']:28}{part['output']:20}{part['cases']:8,}{figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
