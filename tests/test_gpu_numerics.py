"""The GPU's arithmetic is inside of what the bound assumes of it, on a sample; benchmarks/numerics.py has it all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "numerics.py"


@pytest.mark.gpu
def test_measured_constants_are_inside_of_the_assumed_ones(tmp_path: Path) -> None:
    table = tmp_path / "numerics.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    body = json.loads(table.read_text())
    assert body["failed"] == []
    sections = {row["section"] for row in body["rows"]}
    assert sections == {"sums", "exp", "tanh", "log", "division", "casts"}
    assert [row["what"] for row in body["rows"] if not row["holds"]] == []
