"""What a decoder's step costs in each execution mode, and attention on a mixed batch (docs/step.md).

    PYTHONPATH=tests/checkout python benchmarks/step.py [--model llama-3-8b,...] [--layers 4] [--tokens 8,64,512]
        [--modes eager,full,...] [--sections step,attention] [--rounds 40] [--json FILE]

Batches: so many requests of one token each over `--context` keys, and one decode beside a prefill. A mode whose hidden
states have other bits than the first mode's, and an attention outside of its bound, end this with exit code 1. With
`--device cpu --tiny` everything runs in the emulation, on small shapes, but what a GPU alone can tell.

vLLM's kernel is measured beside ours where `vllm.v1.attention.ops.triton_unified_attention` can be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLUMNS = ("mode", "step_us", "step_p10_us", "step_p90_us", "host_us", "kernels", "host_launches", "graphs", "nodes")


def main() -> int:
    options = parse()
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read where Triton is imported
    import torch

    from pageproof.oracle.execution.graphs.cuda import CudaBackend
    from pageproof.oracle.execution.graphs.emulation import EmulatedBackend

    backend = CudaBackend() if options.device == "cuda" else EmulatedBackend()
    found: dict[str, Any] = {"torch": torch.__version__, "device": options.device, "step": [], "attention": []}
    if options.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    if "step" in options.sections:
        for row in steps(options, backend):
            found["step"].append(row)
        save(found, options.json)
    if "attention" in options.sections:
        from step_attention import attention_rows

        found["attention"] = attention_rows(backend, tiny=options.tiny, rounds=options.rounds)
        print("\n".join(json.dumps(row) for row in found["attention"]))
    save(found, options.json)
    wrong = [row for row in found["step"] if not row["same_bits"]]
    wrong += [row for row in found["attention"] if row.get("agrees") is False]
    return 1 if wrong else 0


def save(found: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


def steps(options: argparse.Namespace, backend: Any) -> Iterator[dict[str, Any]]:
    """Every model's rows, printed as they come."""
    import torch
    from step_modes import GOALS, Model, Sizes, measure

    from pageproof.oracle.adapters import find
    from pageproof.oracle.models import shape_of

    candidate, dtype = find(options.target), torch.float16 if options.tiny else torch.bfloat16
    sizes = Sizes(options.tokens, options.context, options.mixed_keys, options.prefill)
    batches = list(sizes.batches())
    for name in options.model:
        shape = shape_of(name).tiny() if options.tiny else shape_of(name)
        model = Model(shape.with_layers(options.layers), batches, dtype, backend)
        for batch in batches:
            print(f"\n{name}, {options.layers} layers, {batch.name}, bucket {batch.num_tokens}")
            print("".join(f"{column:>14}" for column in COLUMNS) + "  captured MiB")
            rows = measure(model, batch, candidate, options.modes, options.rounds)
            for row in rows:
                print("".join(f"{shown(row[column]):>14}" for column in COLUMNS), end="")
                print(f"{row['captured_bytes'] / 2**20:14.2f}" + ("" if row["same_bits"] else "  OTHER BITS"))
                if "step_over_piecewise" in row:
                    ratios = row["step_over_piecewise"], row["captured_over_piecewise"]
                    goals = f"(goals: at most {GOALS['step']}, {GOALS['captured']})"
                    print(f"  breakable / piecewise: step {ratios[0]:.3f}, captured {ratios[1]:.3f} {goals}")
                yield {"model": name, "layers": options.layers, **row}
            print(f"  fastest: {min(rows, key=lambda row: row['step_us'])['mode']} (goal: full)")
        del model


def shown(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def parse() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=names, default=["llama-3-8b"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=numbers, default=(8, 64, 512))
    parser.add_argument("--modes", type=names, default=["eager", "full", "piecewise", "breakable", "compiled"])
    parser.add_argument("--sections", type=names, default=["step", "attention"])
    parser.add_argument("--context", type=int, default=4096, help="keys of each decoding request")
    parser.add_argument("--mixed-keys", type=int, default=65536, help="keys of the decode beside a prefill")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of that prefill, a power of two")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--target", default="ours", help="the candidate whose operators are used")
    parser.add_argument("--tiny", action="store_true", help="small shapes and batches, for the interpreter")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.tiny:
        options.layers, options.tokens, options.context = 2, (2,), 40
        options.mixed_keys, options.prefill = 70, 8
    return options


if __name__ == "__main__":
    sys.exit(main())
