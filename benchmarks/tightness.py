"""How near simulated kernels come to the bound that their declared arithmetic gives them (docs/bound.md).

    PYTHONPATH=tests/checkout:. python benchmarks/tightness.py [--draws 6000]

Each draw of tests/test_bound.py is one case and one arithmetic. Prints, for every format of the output, the cases, the
largest observed error / bound of out, the median over the cases of each case's largest, and the largest of lse. Ends
with exit code 1 if one was outside of its bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict

import torch

from pageproof.oracle import judge
from tests.simulated_kernel import Simulated
from tests.test_bound import draw


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=6000)
    options = parser.parse_args()
    ratios: dict[str, list[tuple[float, float]]] = defaultdict(list)
    failed = 0
    for seed in range(options.draws):
        case, arithmetic = draw(seed)
        verdict = judge(case, Simulated(arithmetic, seed=seed))
        failed += verdict.failed
        found = dict(verdict.ratios)
        ratios[case.spec.out_dtype or case.spec.dtype].append((found["out"], found["lse"]))
    print(f"{'out':16}{'cases':>6}{'out, largest':>14}{'out, median':>13}{'lse, largest':>14}")
    for name, pairs in sorted(ratios.items()):
        out, lse = zip(*pairs, strict=True)
        print(f"{name:16}{len(pairs):6}{max(out):14.3f}{statistics.median(out):13.3f}{max(lse):14.3f}")
    print(f"{options.draws} draws, torch {torch.__version__}, {failed} outside of the bound")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
