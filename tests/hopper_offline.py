"""Compile a kernel for Hopper without a GPU, and say as JSON what the machine code holds.

    python tests/hopper_offline.py '{"kernel": "prefill", "group": 3, "head_size": 192, "softcap": 30.0}'

A script, because the compiler asks the process which device it has, and tests of a CPU interpret their kernels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HEADS, PAGES, TOKENS = 2, 8, 64


class NoDevice:
    """What the compiler asks of a driver: a Hopper GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def is_active(self) -> bool:
        return True

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def step_arguments(options: dict[str, Any], q: torch.Tensor, size_v: int) -> Any:
    """All but the queries and the cache of a step with these rules."""
    from pageproof.optimized.launch import read_step

    rows, per_head = q.shape[:2], torch.zeros(q.shape[1])
    out_dtype = getattr(torch, options.get("out_dtype", options["dtype"]))
    return read_step(
        torch.zeros(2, PAGES, dtype=torch.int32),
        0.1,
        options.get("causal", True),
        options.get("sliding_window"),
        options.get("right_window"),
        options.get("softcap"),
        per_head if options.get("alibi") else None,
        per_head if options.get("sinks") else None,
        *(None, None, None, None),
        torch.ones(1) if out_dtype is torch.float8_e4m3fn else None,
        *(torch.zeros(size, dtype=torch.int32) for size in (7, (8, 8), (8, 8), (8, 8))),
        torch.zeros(*rows, size_v, dtype=out_dtype),
        torch.zeros(rows),
    )


def launch_prefill(options: dict[str, Any]) -> None:
    """A step with these sizes and rules; the rest is as in a model of head size 128."""
    from pageproof.optimized import hopper_prefill
    from pageproof.optimized.kernels.arguments import Step, paged_kv, queries
    from pageproof.optimized.launching import describe
    from pageproof.optimized.shapes import Shape
    from pageproof.optimized.tile_table import Operands

    found = {"dtype": "bfloat16", "group": 4, "head_size": 128, "head_size_v": 128, "block_size": 16} | options
    size, size_v, block_size, group = (found[name] for name in ("head_size", "head_size_v", "block_size", "group"))
    dtype = getattr(torch, found["dtype"])
    q = torch.zeros(TOKENS, HEADS * group, size, dtype=dtype)
    k, v = (torch.zeros(PAGES, block_size, HEADS, columns, dtype=dtype) for columns in (size, size_v))
    _, rules, scales, outputs, work, numbers, causal = arguments = step_arguments(found, q, size_v)
    step = Step(queries(q), paged_kv(k, v), arguments.requests, rules, scales, outputs, work)
    shape = Shape(HEADS, group, size, size_v, block_size, dtype, "sm_90", Operands.LOADED)
    assert hopper_prefill.why_portable(shape, step) is None
    hopper_prefill.run(step, numbers, hopper_prefill.constants_of(shape, causal), describe((step,), numbers))


def launch_mla(options: dict[str, Any]) -> None:
    """A step with these sizes and rules; the rest is as in a model of DeepSeek's."""
    from pageproof.optimized import hopper_mla
    from pageproof.optimized.kernels.arguments import Step, latent_kv, queries
    from pageproof.optimized.launch import allocate_partials
    from pageproof.optimized.launching import describe
    from pageproof.optimized.shapes import Shape
    from pageproof.optimized.tile_table import Operands

    found = {"dtype": "bfloat16", "group": 128, "block_size": 64} | options
    group, block_size, dtype = found["group"], found["block_size"], getattr(torch, found["dtype"])
    q, rope = (torch.zeros(TOKENS, group, columns, dtype=dtype) for columns in (512, 64))
    latent = torch.zeros(PAGES, block_size, 576, dtype=dtype)
    _, rules, scales, outputs, work, numbers, causal = arguments = step_arguments(found, q, 512)
    step = Step(queries(q, rope), latent_kv(latent, 512), arguments.requests, rules, scales, outputs, work)
    shape = Shape(1, group, 512, 512, block_size, dtype, "sm_90", Operands.LATENT, rope_size=64)
    assert hopper_mla.why_portable(shape, step) is None
    partials = allocate_partials(512, group, 512, q.device)
    constants = hopper_mla.constants_of(shape, causal, prefill=found.get("prefill", False))
    hopper_mla.run(step, partials, numbers, constants, describe((step, partials), numbers))


def compiled(options: dict[str, Any]) -> Any:
    """What is launched for `options["kernel"]`, "prefill" or "mla", compiled and not run."""
    from pageproof.optimized import hopper_mla, hopper_prefill
    from pageproof.optimized.kernels.hopper.mla import attend_latent
    from pageproof.optimized.kernels.hopper.prefill import hopper_prefill as prefill_kernel

    is_prefill = options["kernel"] == "prefill"
    kernel, launch = (prefill_kernel, launch_prefill) if is_prefill else (attend_latent, launch_mla)
    found: list[Any] = []
    run = kernel.run

    def compile_only(*arguments: Any, warmup: bool, **rest: Any) -> None:
        found.append(run(*arguments, warmup=True, **rest))

    kernel.run = compile_only
    for module in (hopper_prefill, hopper_mla):
        module.hopper_programs = lambda _device: 132
    launch(options)
    return found[0]


def machine_code(kernel: Any) -> dict[str, Any]:
    """Shared memory, spilled bytes, the assembler's warnings, and what runs while values are being multiplied.

    `hidden`: for each wait for a product of values that follows one for scores, exponentials between the two.
    """
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        log = _run("ptxas", "-v", "--gpu-name=sm_90a", str(ptx), "-o", "/dev/null")
        code = _run("nvdisasm", "-c", str(cubin))
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    hidden: list[int] = []
    since_scores: int | None = None
    for line in code.splitlines():
        if "WARPGROUP.DEPBAR" in line:
            if since_scores is not None:
                hidden.append(since_scores)
            since_scores = 0 if "0x1 ;" in line else None
        elif "MUFU.EX2" in line and since_scores is not None:
            since_scores += 1
    return {
        "shared": kernel.metadata.shared,
        "spilled": [int(count) for count in spills.groups()] if spills else None,
        "warnings": [line for line in log.splitlines() if "warning" in line.lower() or "serialized" in line],
        "products": len(re.findall("HGMMA", code)),
        "copies": len(re.findall("UTMALDG", code)),
        "hidden": hidden,
    }


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    driver.set_active(NoDevice())
    print(json.dumps(machine_code(compiled(json.loads(sys.argv[1])))))  # noqa: T201
