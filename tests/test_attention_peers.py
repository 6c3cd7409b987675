"""The benchmark's adapters say to a peer what the case says; FlashInfer's stand-in computes what it was told."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pageproof.optimized.interpreter import INTERPRETED
from pageproof.oracle import BatchShape, Case, Spec
from pageproof.oracle.building.tensors import build

from . import fake_flashinfer

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
DECODES = BatchShape(query_lens=(1, 1, 1, 0), seq_lens=(33, 16, 50, 0), padding_tokens=2, table_slack=2)
MIXED = BatchShape(query_lens=(1, 20, 4, 0), seq_lens=(33, 20, 50, 0), padding_tokens=3, table_slack=1)
ALIKE = BatchShape(query_lens=(20, 20), seq_lens=(20, 20))
PLAIN = Spec(dtype="float16", head_size=32, head_size_v=32)
MLA = Spec(operation="mla_attention", dtype="float16", num_kv_heads=1, group_size=4, head_size=32, rope_head_size=16)

INTERPRETED_ONLY = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, and these tensors on a CPU")


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [BENCHMARKS, *sys.path])
    for name, module in fake_flashinfer.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def spec(**rules: Any) -> Spec:
    return Spec(dtype="float16", head_size=32, head_size_v=32, **rules)


def answer(peer: str, case: Case) -> dict[str, Any]:
    """The judge's verdict on what the peer wrote."""
    problem = build(case)
    prepared = importlib.import_module("peers").PEERS[peer].prepare(problem)
    for name, tensor in prepared.outputs.items():
        tensor[: sum(case.batch.query_lens)] = torch.nan
        assert tensor.shape == problem.outputs[name].shape
    if prepared.plan is not None:
        prepared.plan()
    prepared.work()
    if prepared.collect is not None:
        prepared.collect()
    verdict: dict[str, Any] = (
        importlib.import_module("attention_answers").Judge(problem).ask(prepared.outputs, prepared.contract)
    )
    return verdict


@pytest.mark.parametrize("rules", [{}, {"sliding_window": 5}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize(
    ("peer", "batch"),
    [
        ("flashinfer-decode", DECODES),
        ("flashinfer-fa2", MIXED),
        ("flashinfer-fa3", MIXED),
        pytest.param("ours", MIXED, marks=INTERPRETED_ONLY),
    ],
)
def test_a_peer_is_told_the_batch_and_the_rules(peer: str, batch: BatchShape, rules: dict[str, Any]) -> None:
    verdict = answer(peer, Case(spec=spec(**rules), batch=batch, poison=""))
    assert verdict["agrees"], verdict


@pytest.mark.parametrize("peer", ["flashinfer-decode", "flashinfer-fa2"])
def test_a_peer_is_told_the_scales(peer: str) -> None:
    quantised = spec(kv_dtype="float8_e4m3fn", scales="tensor")
    assert answer(peer, Case(spec=quantised, batch=DECODES, poison=""))["agrees"]


@pytest.mark.parametrize("peer", ["flashinfer-fa2", "flashinfer-fa3", pytest.param("ours", marks=INTERPRETED_ONLY)])
def test_a_peer_is_told_the_latent_rows(peer: str) -> None:
    assert answer(peer, Case(spec=MLA, batch=MIXED, poison=""))["agrees"]


def test_rows_are_appended_to_their_slots() -> None:
    case = Case(spec=Spec(operation="update_kv_cache", dtype="float16"), batch=MIXED, poison="")
    problem = build(case)
    problem.arguments["slot_mapping"] = problem.arguments["slot_mapping"].clamp(min=0).unique()
    for name, pool in problem.pristine.items():
        problem.outputs[name].copy_(pool)
    prepared = importlib.import_module("peers").PEERS["flashinfer-update"].prepare(problem)
    prepared.work()
    judge = importlib.import_module("attention_answers").Judge(problem)
    assert judge.ask(prepared.outputs, prepared.contract)["agrees"]


@pytest.mark.parametrize("batch", [ALIKE, BatchShape(query_lens=(1, 1), seq_lens=(40, 40))])
def test_torch_attends_to_gathered_keys(batch: BatchShape) -> None:
    assert answer("sdpa-flash", Case(spec=PLAIN, batch=batch, poison=""))["agrees"]


@pytest.mark.parametrize(
    ("peer", "rules", "batch", "words"),
    [
        ("vllm-2d", {"query_bias": "chain", "bias_width": 2}, DECODES, "no query_bias"),
        ("vllm-3d", {}, MIXED, "splits requests of at most 8 tokens only"),
        ("sglang-8", {}, MIXED, "one token per request only"),
        ("flashinfer-fa3", {"sinks": True}, MIXED, "no sinks"),
        ("flashinfer-fa3", {"kv_dtype": "float8_e4m3fn"}, MIXED, "no float8_e4m3fn caches"),
        ("sdpa-flash", {"sliding_window": 3}, ALIKE, "no sliding_window"),
    ],
)
def test_what_a_peer_does_not_do_is_said(
    monkeypatch: pytest.MonkeyPatch, peer: str, rules: dict[str, Any], batch: BatchShape, words: str
) -> None:
    peers = importlib.import_module("peers")
    for name in (importlib.import_module("peers.vllm").UNIFIED, importlib.import_module("peers.sglang").DECODE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # it is here, and is not called
    problem = build(Case(spec=spec(**rules), batch=batch, poison=""))
    with pytest.raises(peers.Unsupported, match=words):
        peers.PEERS[peer].prepare(problem)
