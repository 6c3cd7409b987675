"""The step benchmark runs from its command line, without a GPU, and says what it could not measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = str(ROOT / "tests" / "checkout")  # and nothing else: a peer that is at hand is not asked here
COMMAND = [sys.executable, "benchmarks/step.py", "--device", "cpu", "--tiny", "--rounds", "2"]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": CHECKOUT, **variables}
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_every_mode_is_measured_and_compared(tmp_path: Path) -> None:
    written = tmp_path / "step.json"
    done = run("--model", "qwen3-30b-a3b", "--json", str(written))
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    rows = {(row["batch"], row["mode"]): row for row in found["step"]}
    modes = ["eager", "full", "piecewise", "breakable", "compiled"]
    assert list(rows) == [(batch, mode) for batch in ("2 x 40", "1 x 70 + 8") for mode in modes]
    for (_, mode), row in rows.items():
        assert row["same_bits"]
        assert 0 < row["step_p10_us"] <= row["step_us"] <= row["step_p90_us"]
        assert row["graphs"] == {"full": 1, "piecewise": 3, "breakable": 3}.get(mode, 0)
        assert (row["captured_bytes"] > 0) == (row["graphs"] > 0)
        assert row["kernels"] is None  # there is no device to launch them on
    assert rows["2 x 40", "breakable"]["captured_over_piecewise"] <= 1.05
    assert "breakable / piecewise: step" in done.stdout


def test_a_peer_that_is_not_there_is_a_named_gap(tmp_path: Path) -> None:
    written = tmp_path / "step.json"
    done = run("--sections", "attention", "--json", str(written))
    assert done.returncode == 0, done.stderr
    *ours, theirs = json.loads(written.read_text())["attention"]
    assert [row["of"] for row in ours] == ["ours", "ours with plan"]
    assert all(row["agrees"] and row["error_over_bound"] <= 1 for row in ours)
    assert theirs["gap"] == "ModuleNotFoundError: No module named 'vllm'"


def test_a_peer_is_judged_before_it_is_timed(tmp_path: Path) -> None:
    folder = tmp_path / "site" / "vllm" / "v1" / "attention" / "ops"
    folder.mkdir(parents=True)
    peer = "def unified_attention(*, out, **arguments):\n    out.fill_(1.0)\n"
    (folder / "triton_unified_attention.py").write_text(peer)
    path = os.pathsep.join([CHECKOUT, str(tmp_path / "site")])
    written = tmp_path / "step.json"
    done = run("--sections", "attention", "--json", str(written), PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    *_, theirs = json.loads(written.read_text())["attention"]
    assert (theirs["agrees"], "step_us" in theirs) == (False, False)
