"""What one GPU's arithmetic really does, beside what the error bound assumes of it (docs/bound.md).

    PYTHONPATH=tests/checkout python benchmarks/numerics.py [--json FILE] [--quick] [--device cuda]

(without PYTHONPATH where the package is installed). Prints a table and ends with exit code 1 if a section failed or a
measured error exceeds the assumed one. `--quick` looks at one float32 in 251, at sums of up to 128 products and at
fewer quotients.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict

import torch
import triton
from numerics_functions import casts, divisions, exponentials, logarithms, tanhs
from numerics_row import Row
from numerics_sums import accumulators, tf32_operands


def sections(device: torch.device, quick: bool) -> Iterator[tuple[str, Iterator[Row]]]:
    """Each section's name and its rows, which are measured when they are asked for."""
    yield "sums", accumulators(device, quick)
    yield "operands", tf32_operands(device)
    for section in (exponentials, tanhs, logarithms, divisions, casts):
        yield section.__name__, section(device, quick)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the table to this file")
    parser.add_argument("--quick", action="store_true", help="one float32 in 251, shorter sums, fewer quotients")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU, and torch sees none")
    rows: list[Row] = []
    failed = []
    for name, section in sections(device, options.quick):
        try:
            for row in section:
                rows.append(row)
                print(row.line, flush=True)
        except Exception:
            failed.append(name)
            print(f"{name} FAILED", flush=True)
            traceback.print_exc(file=sys.stdout)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    if options.json:
        body = {"machine": machine, "torch": torch.__version__, "triton": triton.__version__, "failed": failed}
        body["rows"] = [asdict(row) | {"holds": row.holds} for row in rows]
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(body, file, indent=1)
    exceeded = [row.what for row in rows if not row.holds]
    print(f"{machine}, torch {torch.__version__}, triton {triton.__version__}: {len(rows)} constants", end="")
    print(f", exceeded: {exceeded or 'none'}, failed sections: {failed or 'none'}")
    return 1 if failed or exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
