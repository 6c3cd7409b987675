"""Attention, ours and every peer that can be imported, on the same tensors in one run (docs/attention_benchmark.md).

    PYTHONPATH=tests/checkout:PEERS python benchmarks/attention.py [--section decode,prefill,mixed,mla,update,...]
        [--rows NAME...] [--peers vllm,flashinfer-fa3,...] [--kernels-only] [--dtypes bfloat16,float16]
        [--kv-dtypes same,float8_e4m3fn] [--pages 16,64,128] [--json FILE] [--plot FILE.png] [--seconds 500]
        [--build-only] [--tiny]

Every implementation is captured in a graph and its first replay judged by the oracle's bound; then all are replayed in
turns, with cold caches. A peer that is not installed, does not offer a row or fails on it has a line that says so; one
that disagrees with its bound is timed and marked. Ends with exit code 1 where ours disagrees or fails, or the device
is lost.

`--device cpu --tiny` runs small rows through the interpreter: everything but the figures is as on a GPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PEER_PACKAGES = ("vllm", "sglang", "flashinfer-python")


def main() -> int:
    options = parse()
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read where Triton is imported
    rows = selected(options)
    from attention_ceilings import measure_ceilings
    from attention_row import Bench
    from attention_table import heading
    from step_timing import Clock

    from pageproof.oracle.execution.graphs.cuda import CudaBackend
    from pageproof.oracle.execution.graphs.emulation import EmulatedBackend

    backend = CudaBackend() if options.device == "cuda" else EmulatedBackend()
    clock = Clock(backend.device)
    bench = Bench(backend, clock, measure_ceilings(clock), options.rounds, options.row_seconds)
    found: dict[str, Any] = {"environment": environment(backend.device), "ceilings": vars(bench.ceilings), "rows": []}
    print(heading(found["environment"], bench.ceilings), flush=True)
    if not options.kernels_only:
        build_kernels(rows, options, found)
    if options.build_only:
        return 0
    run(rows, options, bench, found)
    if options.plot is not None:
        from attention_plot import draw

        draw(found, options.plot)
    lines = [line for row in found["rows"] for line in row["lines"] if line["of"].partition("-")[0] == "ours"]
    wrong = any(line.get("agrees") is False or line.get("failed") for line in lines)
    return 1 if wrong or "lost" in found or "failed" in found else 0


def run(rows: list[Any], options: argparse.Namespace, bench: Any, found: dict[str, Any]) -> None:
    """Row after row, printed and saved as they come; what is not begun in time is named."""
    import torch
    from attention_row import Measured, measure, words
    from attention_table import table
    from peers import chosen

    asked = ["ours"] if options.kernels_only else options.peers and ["ours", *options.peers]
    for number, row in enumerate(rows):
        if time.monotonic() > options.began + options.seconds:
            found["not_begun"] = [late.name for late in rows[number:]]
            print(f"\nout of time, not begun: {', '.join(found['not_begun'])}")
            break
        peers = chosen(asked, row.spec.operation, row.section)
        measured = Measured(row)
        try:
            measure(measured, peers, bench)
        except torch.OutOfMemoryError as error:
            found.setdefault("failed", {})[row.name] = words(error)
        except Exception as error:  # of the device: nothing can be measured after it
            found["lost"] = f"{row.name}: {words(error)}"
        found["rows"].append(measured.summary(bench.ceilings))
        print(table(found["rows"][-1]), flush=True)
        save(found, options.json)
        if "lost" in found:
            print(f"\nthe run ends here: {found['lost']}")
            break
        gc.collect()  # what peers hold in cycles is gigabytes
        if bench.backend.device.type == "cuda":
            torch.cuda.empty_cache()
    save(found, options.json)


def selected(options: argparse.Namespace) -> list[Any]:
    """The rows that were asked for, in every format that was asked for; ends the program where a name means nothing."""
    from attention_rows import SECTIONS, all_rows, tiny, varied
    from peers import unknown

    sections = options.section or (SECTIONS if options.rows else SECTIONS[:5])
    if wrong := [name for name in sections if name not in SECTIONS] + unknown(options.peers or []):
        sys.exit(
            f"found {', '.join(wrong)}, expected sections of {', '.join(SECTIONS)}, and peers or families of PEERS"
        )
    rows = [row for row in all_rows() if row.section in sections]
    if options.rows:
        rows = [row for row in rows if any(fnmatch.fnmatch(row.name, pattern) for pattern in options.rows)]
    if options.tiny:
        rows = [tiny(row) for row in rows]
        options.dtypes = ["float16"]
    formats = [(dtype, kv, page) for dtype in options.dtypes for kv in options.kv_dtypes for page in options.pages]
    made = (
        varied(row, dtype=dtype, kv_dtype="" if kv == "same" else kv, page=page)
        for row in rows
        for dtype, kv, page in formats
    )
    found = [row for row in made if row is not None]
    return found or sys.exit(f"--rows: found no row like {' '.join(options.rows or [])}")


def build_kernels(rows: Iterable[Any], options: argparse.Namespace, found: dict[str, Any]) -> None:
    """FlashInfer compiles at first use: everything that the rows need, beforehand and at once."""
    asked = options.peers
    if options.device != "cuda" or (asked and not any(name.partition("-")[0] == "flashinfer" for name in asked)):
        return
    began = time.perf_counter()
    try:
        from peers.flashinfer import build

        count = build(row.spec for row in rows if row.section != "update")
        words = f"FlashInfer: {count} modules compiled or found in {time.perf_counter() - began:.0f} s"
    except ImportError as error:
        words = f"FlashInfer: not here: {error}"
    except Exception as error:  # each of its wrappers tries again, and says why it cannot
        words = f"FlashInfer: {type(error).__name__}: {error}"
    found["built"] = words
    print(words[:2000], flush=True)


def environment(device: Any) -> dict[str, Any]:
    from pageproof.oracle.environment import describe_device, versions

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "no package of that name"

    return {
        "device": describe_device(device),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/attention.py", *sys.argv[1:]]),
        "versions": {**versions(), **{name: version(name) for name in PEER_PACKAGES}},
    }


def save(found: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


def parse() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", type=names, help="decode,prefill,mixed,mla,update if not given, features, models")
    parser.add_argument("--rows", nargs="+", help="names of rows, of any section if none is given; * and ? allowed")
    parser.add_argument("--peers", type=names, help="names or families; ours is always measured")
    parser.add_argument("--kernels-only", action="store_true", help="ours alone")
    parser.add_argument(
        "--build-only", action="store_true", help="compile FlashInfer's kernels for these rows, and end"
    )
    parser.add_argument("--dtypes", type=names, default=["bfloat16"])
    parser.add_argument("--kv-dtypes", type=names, default=["same"], help="same, float8_e4m3fn")
    parser.add_argument("--pages", type=numbers, default=[16])
    parser.add_argument("--rounds", type=int, default=40, help="replays of each graph, at least 2")
    parser.add_argument("--row-seconds", type=float, default=3.0, help="after which no further round of a row begins")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further row begins")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small rows, for the interpreter")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a roofline, for which matplotlib has to be installed")
    options = parser.parse_args()
    options.began = time.monotonic()
    return options


if __name__ == "__main__":
    sys.exit(main())
