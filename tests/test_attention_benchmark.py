"""The attention benchmark runs from its command line without a GPU: rows, judging, named gaps, tables and JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = str(ROOT / "tests" / "checkout")  # and nothing else: a peer that is at hand is not asked here
COMMAND = [sys.executable, "benchmarks/attention.py", "--device", "cpu", "--tiny", "--rounds", "2"]


def run(written: Path, *arguments: str, path: str = CHECKOUT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = path
    return subprocess.run(
        [*COMMAND, "--json", str(written), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def lines_of(written: Path) -> dict[str, dict[str, Any]]:
    """Of each row by name its lines by implementation."""
    rows = json.loads(written.read_text())["rows"]
    return {row["name"].partition("/")[0]: {line["of"]: line for line in row["lines"]} for row in rows}


def fake_vllm(folder: Path, body: str) -> str:
    """A search path on which vLLM's unified attention is a function of this body, and nothing else of it is there."""
    place = folder / "vllm" / "v1" / "attention" / "ops"
    place.mkdir(parents=True)
    (place / "triton_unified_attention.py").write_text(f"def unified_attention(*, out, **arguments):\n    {body}\n")
    return os.pathsep.join([CHECKOUT, str(folder)])


def test_every_kind_of_row_is_judged_and_timed(tmp_path: Path) -> None:
    written = tmp_path / "run.json"
    rows = ["decode-8x*", "prefill-1x4096", "mixed-65536+4", "mla-1x8192", "*decompressed*", "update-8192*"]
    done = run(written, "--rows", *rows, "--peers", "vllm,torch")
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    lines = lines_of(written)
    names = "decode-8x16384 prefill-1x4096 mixed-65536+4 mla-1x8192 mla-prefill-decompressed-1x2048-16h"
    assert list(lines) == [*names.split(), "update-8192", "update-8192-fp8"]
    for row in lines.values():
        for name, line in row.items():
            if name.startswith("ours"):
                assert line["agrees"]
                assert line["error_over_bound"] <= 1
                assert 0 < line["p10_us"] <= line["us"] <= line["p90_us"]
                assert line["gbps"] > 0
    assert all(row["floor_us"] > 0 for row in found["rows"])
    assert all(rate > 0 for rate in found["ceilings"].values())
    assert set(lines["mixed-65536+4"]) == {"ours", "ours-planning", "ours-invariant", "ours-8192", "vllm-2d", "vllm-3d"}
    assert lines["mixed-65536+4"]["ours"]["plan_us"] > 0
    assert lines["update-8192"]["torch-update"]["agrees"]
    for row in lines.values():
        for line in row.values():
            assert (f"  {line['of']}" if "us" in line else line["gap"]) in done.stdout


def test_a_peer_that_is_absent_or_offers_less_is_a_named_gap(tmp_path: Path) -> None:
    written = tmp_path / "run.json"
    done = run(written, "--rows", "mixed-65536+4", "update-8192-fp8", "--peers", "vllm-2d,flashinfer-fa3,sdpa,torch")
    assert done.returncode == 0, done.stderr
    lines = lines_of(written)
    assert lines["mixed-65536+4"]["vllm-2d"]["gap"] == "not here: No module named 'vllm'"
    assert lines["mixed-65536+4"]["flashinfer-fa3"]["gap"] == "not here: No module named 'flashinfer'"
    assert lines["mixed-65536+4"]["sdpa-flash"]["gap"] == "not offered: requests of one length only"
    assert lines["update-8192-fp8"]["torch-update"]["gap"] == "not offered: no float8 caches"
    assert "sdpa-cudnn, sdpa-flash: not offered: requests of one length only" in done.stdout


def test_a_peer_that_disagrees_is_timed_and_marked_and_is_no_best_peer(tmp_path: Path) -> None:
    written = tmp_path / "run.json"
    path = fake_vllm(tmp_path / "site", "out.fill_(1.0)")
    done = run(written, "--rows", "prefill-1x4096", "--peers", "vllm-2d", path=path)
    assert done.returncode == 0, done.stderr
    lines = lines_of(written)["prefill-1x4096"]
    assert (lines["vllm-2d"]["agrees"], lines["vllm-2d"]["us"] > 0) == (False, True)
    assert lines["vllm-2d"]["error_over_bound"] > 1
    assert "times_as_fast_as_best_peer" not in lines["ours"]
    assert "disagrees: out differs" in done.stdout


def test_a_peer_that_fails_ends_no_other(tmp_path: Path) -> None:
    written = tmp_path / "run.json"
    path = fake_vllm(tmp_path / "site", "raise RuntimeError('first line\\nlast line')")
    done = run(written, "--rows", "prefill-1x4096", "mla-1x8192", "--peers", "vllm", path=path)
    assert done.returncode == 0, done.stderr
    lines = lines_of(written)
    assert lines["prefill-1x4096"]["vllm-2d"]["gap"] == "RuntimeError: first line ... last line"
    assert lines["prefill-1x4096"]["ours"]["agrees"]
    assert lines["mla-1x8192"]["ours"]["agrees"]


def test_what_is_not_begun_in_time_is_named(tmp_path: Path) -> None:
    written = tmp_path / "run.json"
    done = run(written, "--rows", "prefill-1x4096", "mla-1x8192", "--kernels-only", "--seconds", "0")
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    assert (found["rows"], found["not_begun"]) == ([], ["prefill-1x4096/float16", "mla-1x8192/float16"])
    assert "out of time, not begun: prefill-1x4096/float16" in done.stdout


def test_a_name_that_means_nothing_is_refused(tmp_path: Path) -> None:
    for arguments, words in (
        (("--section", "decod"), "found decod, expected sections of decode"),
        (("--peers", "vlm"), "found vlm, expected sections of"),
        (("--rows", "nothing-*"), "--rows: found no row like nothing-*"),
    ):
        done = run(tmp_path / "run.json", *arguments)
        assert done.returncode == 1
        assert words in done.stderr
