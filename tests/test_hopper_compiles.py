"""The kernels for Hopper compile where there is no GPU, and their machine code overlaps what their source overlaps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pageproof.optimized.tile_table import ARCHITECTURES

SCRIPT = Path(__file__).with_name("hopper_offline.py")


def described(options: dict[str, Any], cache: Path) -> dict[str, Any]:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(SCRIPT), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    body: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return body


EVERYTHING: dict[str, Any] = {
    **{"dtype": "float16", "head_size": 192, "head_size_v": 256, "block_size": 48, "group": 3},
    **{"sliding_window": 100, "softcap": 30.0, "alibi": True, "sinks": True, "out_dtype": "float8_e4m3fn"},
}


@pytest.mark.parametrize(
    ("options", "exponentials", "spilled"),
    # Of a tile, for one thread: 64 x 128 / 128, and 64 x 64 / 128 with as many of a tanh. Rows of 72 columns lie on
    # multiples of 16 bytes, but of no more. Bytes at most: with every rule 284, of which 40 came with the wide stores.
    [({}, 64, 192), ({"head_size": 72}, 64, 192), (EVERYTHING, 64, 288)],
    ids=str,
)
def test_the_softmax_runs_while_values_are_multiplied(
    options: dict[str, Any], exponentials: int, spilled: int, tmp_path: Path
) -> None:
    found = described({"kernel": "prefill"} | options, tmp_path)
    assert found["warnings"] == []  # "wgmma is serialized" is one
    assert found["spilled"] is not None
    assert max(found["spilled"]) <= spilled
    assert found["copies"] > 0
    assert found["hidden"]
    assert min(found["hidden"]) >= exponentials


MLA_RULES: dict[str, Any] = {"sliding_window": 100, "softcap": 30.0, "alibi": True, "sinks": True}


# Pages of 8 slots with every rule are not here: with Triton 3.7 the kernel spills 1,280 bytes for them.
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 8},
        {"dtype": "float16", "group": 71, "block_size": 16} | MLA_RULES,
        {"prefill": True, "group": 16, "block_size": 16},
    ],
    ids=str,
)
def test_products_of_absorbed_mla_are_not_serialized(options: dict[str, Any], tmp_path: Path) -> None:
    found = described({"kernel": "mla"} | options, tmp_path)
    assert found["warnings"] == []
    assert found["spilled"] is not None
    assert max(found["spilled"]) <= 1024
    assert found["copies"] > 0
    assert found["products"] > 0
    assert found["shared"] <= ARCHITECTURES["sm_90"].shared_memory
