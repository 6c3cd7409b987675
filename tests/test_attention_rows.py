"""The attention benchmark's rows, counts, goals and samples, asked of its modules themselves."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pageproof.oracle import BatchShape, Case, Spec, adapters
from pageproof.oracle.bound.evaluate import evaluate
from pageproof.oracle.building.tensors import build
from pageproof.oracle.case_rules import why_invalid
from pageproof.oracle.execution.eager import run

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
PREFILL = Case(spec=Spec(dtype="float16", head_size=16, head_size_v=16), poison="")


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [BENCHMARKS, *sys.path])


def module(name: str) -> Any:
    return importlib.import_module(name)


def test_rows_have_names_of_their_own_and_are_cases() -> None:
    rows = module("attention_rows").all_rows()
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        for shown in (row, module("attention_rows").tiny(row)):
            assert why_invalid(shown.case()) is None, row.name
            assert shown.case().batch.num_tokens >= sum(new for new, _ in shown.lengths)


def test_every_section_and_every_goal_has_its_rows() -> None:
    rows = module("attention_rows").all_rows()
    assert {row.section for row in rows} == set(module("attention_rows").SECTIONS)
    with_goal = {section: sum(row.goal is not None for row in rows if row.section == section) for section in
                 ("decode", "prefill", "mixed", "mla", "update")}  # fmt: skip
    assert with_goal == {"decode": 9, "prefill": 3, "mixed": 5, "mla": 4, "update": 4}


def test_other_formats_have_other_names_and_no_goal() -> None:
    rows = module("attention_rows")
    row = rows.all_rows()[0]
    assert rows.varied(row, dtype="bfloat16", kv_dtype="", page=16) == row
    other = rows.varied(row, dtype="float16", kv_dtype="float8_e4m3fn", page=64)
    assert (other.name, other.goal) == ("decode-1x4096/float16/kv-float8_e4m3fn/page-64", None)
    assert other.case().spec.block_size == 64
    float8 = next(row for row in rows.all_rows() if row.name == "update-8192-fp8")
    assert rows.varied(float8, dtype="bfloat16", kv_dtype="float8_e4m3fn", page=16) is None


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("lengths", [((1, 9),), ((9, 9),), ((4, 9), (1, 2)), ((3, 20),)])
def test_visible_pairs_and_bytes_are_those_that_a_mask_counts(
    window: int | None, lengths: tuple[tuple[int, int], ...]
) -> None:
    spec = Spec(num_kv_heads=2, group_size=3, head_size=8, head_size_v=4, sliding_window=window)
    row = module("attention_rows").Row(name="", section="decode", spec=spec, lengths=lengths)
    work = module("attention_work").work_of(row)
    pairs, keys_read = 0, 0
    for new, keys in lengths:
        seen = set()
        for token in range(new):
            position = keys - new + token
            visible = [j for j in range(position + 1) if window is None or position - j < window]
            pairs += len(visible)
            seen |= set(visible)
        keys_read += len(seen)
    assert (work.pairs, work.flops, work.bytes) == (pairs, 2 * pairs * 6 * 12, keys_read * 2 * 12 * 2)


def test_goals_follow_the_machine() -> None:
    work, rows = module("attention_work"), module("attention_rows")
    half = work.Ceilings(copy_gbps=4276.0 / 2, read_gbps=1.0, matmul_tflops=695.0 / 2)
    goal = work.goal_here(rows.Goal(us=100.0), half)
    assert goal == {"us": 200.0}
    assert work.meets(goal, {"us": 199.0})
    assert not work.meets(goal, {"us": 201.0})
    goal = work.goal_here(rows.Goal(tflops=600.0), half)
    assert goal == {"tflops": 300.0}
    assert work.meets(goal, {"us": 1.0, "tflops": 301.0})
    assert not work.meets(goal, {"us": 1.0, "tflops": 299.0})


def test_every_peer_has_its_function_and_no_peer_is_imported_for_it() -> None:
    before = set(sys.modules)
    for peer in module("peers").PEERS.values():
        target, _, function = peer.target.partition(":")
        assert callable(getattr(module(target), function))
    assert not {"vllm", "sglang", "flashinfer"} & {name.partition(".")[0] for name in set(sys.modules) - before}


def test_peers_are_chosen_by_name_family_and_section() -> None:
    peers = module("peers")
    usual = peers.chosen(None, "attention", "decode")
    assert "flex" not in usual
    assert "flex" in peers.chosen(None, "attention", "prefill")
    assert set(peers.chosen(["ours", "sdpa", "flex"], "attention", "decode")) == {
        "ours", "ours-invariant", "sdpa-cudnn", "sdpa-flash", "flex",
    }  # fmt: skip
    assert set(peers.chosen(["ours"], "update_kv_cache", "update")) == {"ours-update"}
    assert peers.unknown(["vllm", "flashinfer-fa3", "typo"]) == ["typo"]


def sampled(monkeypatch: pytest.MonkeyPatch, **batch: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A problem of which not all rows are judged, its judge, and right outputs."""
    answers = module("attention_answers")
    monkeypatch.setitem(answers.WHOLE, "cpu", 0)
    monkeypatch.setattr(answers, "RUN", 4)
    monkeypatch.setattr(answers, "MOST_RUNS", 3)
    case = replace(PREFILL, batch=BatchShape(**batch))
    problem = build(case)
    outputs = {name: tensor.clone() for name, tensor in run(adapters.find("reference"), problem).items()}
    return problem, answers.Judge(problem), outputs


def test_a_sample_of_rows_is_judged_as_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, judge, outputs = sampled(monkeypatch, query_lens=(40, 1), seq_lens=(47, 30))
    contract = adapters.find("ours").contract(problem.case)
    verdict = judge.ask(outputs, contract)
    assert verdict["agrees"]
    assert (verdict["rows_judged"], verdict["rows"]) == (9, 41)
    whole, part = evaluate(problem, contract), evaluate(judge._part, contract)
    for name in outputs:
        torch.testing.assert_close(part.values[name], whole.values[name][judge._rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("row", "seen"), [(0, True), (39, True), (40, True), (10, False)])
def test_a_wrong_row_is_found_where_the_sample_looks(monkeypatch: pytest.MonkeyPatch, row: int, seen: bool) -> None:
    problem, judge, outputs = sampled(monkeypatch, query_lens=(40, 1), seq_lens=(47, 30))
    assert (row in judge._rows.tolist()) == seen
    outputs["out"][row, 1, 3] += 1.0
    verdict = judge.ask(outputs, adapters.find("ours").contract(problem.case))
    assert verdict["agrees"] != seen


def test_an_error_within_the_hard_bound_is_found_where_roundings_are_independent() -> None:
    case = replace(PREFILL, batch=BatchShape(query_lens=(4,), seq_lens=(900,)))
    problem = build(case)
    outputs = {name: tensor.clone() for name, tensor in run(adapters.find("reference"), problem).items()}
    contract = adapters.find("ours").contract(case)
    judge = module("attention_answers").Judge(problem)
    assert judge.ask(outputs, contract, independent=True)["agrees"]
    expected = evaluate(problem, contract)
    assert expected.statistics is not None
    narrow, wide = expected.statistics.bounds["out"], expected.bounds["out"]
    place = tuple(int(part) for part in torch.unravel_index((wide - narrow).argmax(), wide.shape))
    outputs["out"][place] = expected.values["out"][place] + (narrow[place] + wide[place]) / 2
    assert judge.ask(outputs, contract)["agrees"]
    verdict = judge.ask(outputs, contract, independent=True)
    assert not verdict["agrees"]
    assert "sub-gaussian" in verdict["disagreement"]


def test_a_roofline_shows_right_lines_of_rows_with_flops() -> None:
    def line(of: str, tflops: float, agrees: bool = True) -> dict[str, Any]:
        return {"of": of, "us": 1.0, "tflops": tflops, "agrees": agrees}

    lines = [line("ours", 3.0), line("vllm-2d", 2.0), line("sglang-8", 9.0, agrees=False), {"of": "flex", "gap": ""}]
    rows = [
        {"section": "decode", "flops": 40, "bytes": 10, "lines": lines},
        {"section": "update", "flops": 0, "bytes": 10, "lines": lines},
    ]
    points = module("attention_plot").points({"rows": rows})
    assert points == {"decode": {"ours": [(4.0, 3.0)], "best peer": [(4.0, 2.0)]}}


def test_a_lost_device_ends_the_run_and_what_was_measured_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [module("attention_rows").tiny(row) for row in module("attention_rows").all_rows()[:3]]
    begun = []

    def measure(measured: Any, peers: dict[str, Any], bench: Any) -> None:
        begun.append(measured.row.name)
        measured.lines = {"ours": {"of": "ours", "gap": "not reached"}}
        if len(begun) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(module("attention_row"), "measure", measure)
    ceilings = module("attention_work").Ceilings(1.0, 1.0, 1.0)
    bench = SimpleNamespace(ceilings=ceilings, backend=SimpleNamespace(device=torch.device("cpu")))
    written = tmp_path / "run.json"
    options = SimpleNamespace(kernels_only=True, peers=None, began=0.0, seconds=float("inf"), json=written)
    found: dict[str, Any] = {"rows": []}
    module("attention").run(rows, options, bench, found)
    assert begun == [row.name for row in rows[:2]]
    assert (
        found["lost"]
        == f"{rows[1].name}: RuntimeError: CUDA error: an illegal memory access was encountered ... and more"
    )
    assert [row["name"] for row in json.loads(written.read_text())["rows"]] == begun
    assert "ours: not reached" in capsys.readouterr().out
