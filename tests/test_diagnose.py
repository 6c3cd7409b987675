"""A failed row names what would explain it: a key missing, too many or misweighed, another's value, sink or scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof.oracle import BatchShape, Case, NumericContract, Outcome, Spec, diagnose, judge
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.building.tensors import build
from pageproof.oracle.suspects import Row, misweighed, suspects
from pageproof.oracle.verdict import Mismatch, Verdict
from pageproof.reference.attention import Answer

from .planted import Planted, times
from .simulated_kernel import Simulated

FLOAT8 = "float8_e4m3fn"
SPEC = Spec(head_size=64, head_size_v=64, block_size=16)
LONG = BatchShape(query_lens=(1,), seq_lens=(1024,))
MIXED = BatchShape(query_lens=(3, 5, 1), seq_lens=(20, 70, 50), padding_tokens=1)
FLOAT8_SPEC: dict[str, Any] = {"q_dtype": FLOAT8, "kv_dtype": FLOAT8, "out_dtype": FLOAT8, "scales": "head"}
MLA_SPEC: dict[str, Any] = {"num_kv_heads": 1, "group_size": 3, "rope_head_size": 16}
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float8": FLOAT8_SPEC,
    "mla": {"operation": "mla_attention", **MLA_SPEC},
    "mla float8": {"operation": "mla_attention", **MLA_SPEC, **FLOAT8_SPEC},
    "decompressed": {"operation": "mla_attention_decompressed", "nope_head_size": 32, **MLA_SPEC},
    "features": {"alibi": True, "sinks": True, "softcap": 20.0, "query_bias": "tree", "bias_width": 4},
    "window": {"sliding_window": 60},
}


def case_of(recipe: str = "normal", batch: BatchShape = LONG, seed: int = 0, **spec: Any) -> Case:
    return Case(spec=replace(SPEC, **spec), batch=batch, recipe=recipe, seed=seed)


def worst(verdict: Verdict) -> Mismatch:
    assert verdict.outcome is Outcome.DIFFERS
    return verdict.mismatches[0]


def page_of(case: Case, request: int, key: int) -> int:
    return int(build(case).arguments["batch"].block_table[request, key // 16])


@pytest.mark.parametrize("recipe", ["normal", "one_hot"])
def test_missing_key_is_named_under_a_kernel_s_own_roundings(recipe: str) -> None:
    """The first key of the second tile, which is the first of a page."""
    arithmetic = NumericContract(p_dtype="float16", tile_keys=64, split_keys=256)
    for seed in range(4):
        case = case_of(recipe, seed=seed, dtype="float16")
        judge(case, Simulated(arithmetic, seed=seed)).require()
        found = worst(judge(case, Simulated(arithmetic, fault="first key of a tile dropped", seed=seed)))
        assert found.direction == "missing key"
        place = f"page {page_of(case, 0, 64)}, slot 0; first of its page; first of a tile of 64"
        assert found.hint.startswith(f"key 64 ({place}) has weight 0, expected ")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_missing_key_is_named_in_every_operation_and_format(spec: dict[str, Any]) -> None:
    """In the middle of a batch, where requests, tokens and heads have to be told apart."""
    case = case_of("normal", MIXED, **spec)
    arithmetic = NumericContract(p_dtype="float16", tile_keys=64)
    judge(case, Planted(arithmetic=arithmetic)).require()
    found = worst(judge(case, Planted(factors=times(37, 0.0), arithmetic=arithmetic)))
    request = 1 if found.index[0] < 8 else 2
    assert found.direction == "missing key"
    assert f"key 37 (page {page_of(case, request, 37)}, slot 5" in found.hint


def test_missing_key_that_only_the_statistics_show_is_named() -> None:
    """Of 4,096 keys one, inside of the hard bound."""
    arithmetic = NumericContract(p_dtype="bfloat16", tile_keys=64)
    checks = set()
    for seed in range(8):
        case = case_of("normal", BatchShape(query_lens=(1,), seq_lens=(4096,)), seed=seed)
        verdict = judge(case, Planted(factors=times(100, 0.0), arithmetic=arithmetic))
        if verdict.failed and verdict.check != "bound":
            assert worst(verdict).direction == "missing key"
            assert "key 100 (" in worst(verdict).hint
            checks.add(verdict.check)
    assert checks


def test_missing_key_is_named_beside_the_request_s_own_bias() -> None:
    batch = BatchShape(query_lens=(3, 30), seq_lens=(20, 40))
    case = case_of("normal", batch, dtype="float16", query_bias="dense", bias_width=30)
    found = worst(judge(case, Planted(factors=times(37, 0.0), arithmetic=NumericContract(p_dtype="float16"))))
    assert found.direction == "missing key"
    assert found.hint.startswith(f"key 37 (page {page_of(case, 1, 37)}, slot 5")


def test_error_that_is_hardly_outside_of_its_bound_is_not_explained_away() -> None:
    """Of noise with one element just too large every key's weight could take a little; none is to blame."""
    generator = torch.Generator().manual_seed(0)
    values = 10 * torch.randn(200, 64, generator=generator, dtype=torch.float64)
    noise = torch.rand(65, generator=generator, dtype=torch.float64) - 0.5
    error = noise.clone()
    error[7] = 1.1
    row = Row(
        keys=torch.arange(200),
        visible=torch.ones(200, dtype=torch.bool),
        mass=torch.ones(200, dtype=torch.float64),
        sink=torch.zeros((), dtype=torch.float64),
        values=values,
        error=error,
        bound=torch.ones(65, dtype=torch.float64),
    )
    assert suspects(row, 16) == misweighed(row) == ()
    blamed = replace(row, error=noise + 0.4 * torch.cat((values[9], torch.zeros(1, dtype=torch.float64))))
    assert [(suspect.direction, suspect.first) for suspect in misweighed(blamed)] == [("wrong weight", 9)]


def test_extra_key_is_named() -> None:
    for recipe in ("normal", "one_hot", "census"):
        case = case_of(recipe, BatchShape(query_lens=(9,), seq_lens=(9,)))
        found = worst(judge(case, Simulated(fault="causal mask off by one")))
        row = found.index[0]
        assert found.direction == "extra key"
        assert f"key {row + 1} (" in found.hint
        assert "one after the token's own" in found.hint
        assert found.hint.endswith("expected 0")


def test_misweighed_keys_are_named() -> None:
    for factor, direction in ((2.0, "counted twice"), (3.5, "too much"), (0.4, "too little")):
        found = worst(judge(case_of("one_hot_full", seed=5), Planted(factors=times(1023, factor))))
        assert found.direction == "wrong weight", direction
        weights = found.hint.rsplit("weight ", 1)[1].split(" (")[0]
        weight, due = (float(part) for part in weights.split(", expected "))
        assert weight == pytest.approx(factor * due, rel=0.02)
        assert "key 1023 (" in found.hint


def test_missing_page_and_shortened_window_are_named() -> None:
    def without_page(part: Answer) -> Tensor:
        return part.rows.visible * (part.rows.keys // 16 != 3)[:, None]

    case = case_of("normal", BatchShape(query_lens=(1,), seq_lens=(300,)))
    found = worst(judge(case, Planted(factors=without_page)))
    assert found.direction == "missing key"
    assert found.hint.startswith(f"key 48 (page {page_of(case, 0, 48)}, slot 0; ")
    assert " to key 63 (" in found.hint
    assert "16 keys, have weight 0" in found.hint

    def three_fewer(part: Answer) -> Tensor:
        distance = part.rows.positions[:, :, None] - part.rows.keys[:, None]
        return part.rows.visible * (distance < 37)

    found = worst(judge(case.with_spec(sliding_window=40), Planted(factors=three_fewer)))
    assert found.hint.startswith(f"key 260 (page {page_of(case, 0, 260)}, slot 4; first of the window) to key 262 (")


def test_keys_that_show_alike_are_counted_and_an_edge_speaks_for_them() -> None:
    """All keys of one element of a census show alike."""
    hint = worst(judge(case_of("census"), Planted(factors=times(1023, 0.0)))).hint
    assert "last key" in hint
    assert " others would show alike)" in hint


def test_value_that_was_read_elsewhere_is_named() -> None:
    def neighbours(part: Answer) -> Tensor:
        return part.rows.v.roll(1, dims=1)

    def other_heads(part: Answer) -> Tensor:
        return part.rows.v.flip(2)

    cached: dict[str, Any] = {"kv_dtype": FLOAT8, "scales": "tensor"}
    for spec in ({}, cached, {"operation": "mla_attention", **MLA_SPEC, **cached}):
        case = case_of("tagged", LONG, seed=1, **spec)
        for values, slots_apart in ((neighbours, 1), (other_heads, 0)):
            if values is other_heads and case.spec.is_mla:
                continue  # there is one row for all
            found = worst(judge(case, Planted(values=values)))
            assert found.direction == diagnose.MISPLACED
            (page, slot, head), (due_page, due_slot, due_head) = (
                [int(word.split()[-1]) for word in half.split(", ")] for half in found.hint.split(", expected ")
            )
            assert due_head == found.index[1] // case.spec.group_size
            assert abs(head - due_head) == 1 - slots_apart
            assert due_slot > 0  # else the neighbour is on another page
            assert (page, slot) == (due_page, due_slot - slots_apart)


@pytest.mark.parametrize(
    ("fault", "spec", "direction"),
    [
        ("sink doubled", {"sinks": True}, "wrong sink"),
        ("value scale left out", {"kv_dtype": FLOAT8, "scales": "head"}, "wrong scale"),
        ("softcap left out", {"softcap": 2.0}, ""),
        ("splits averaged", {}, ""),
        ("lse in base 2", {}, ""),
    ],
)
def test_what_no_single_key_explains(fault: str, spec: dict[str, Any], direction: str) -> None:
    arithmetic = NumericContract(p_dtype="bfloat16", split_keys=32)
    case = case_of("normal", BatchShape(query_lens=(1,), seq_lens=(120,)), seed=1, **spec)
    found = worst(judge(case, Simulated(arithmetic, fault=fault)))
    assert (found.direction, bool(found.hint)) == (direction, bool(direction))


def test_explanation_prints_the_hint() -> None:
    verdict = judge(case_of("one_hot_full", seed=5), Planted(factors=times(1023, 0.0)))
    assert f"\nWhat would explain it (missing key): {worst(verdict).hint}\n" in verdict.explain()


@dataclass
class Spoiling(Reference):
    """Writes a number into one element of out, or of the first cache."""

    place: tuple[int, ...]
    number: float
    name: str = "spoiling"

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        returned = super().call(operation, arguments)
        target = arguments["out"] if "out" in arguments else arguments["k_cache"]
        target[self.place] = self.number
        return returned


@pytest.mark.parametrize(
    ("case", "candidate"),
    [
        (case_of(batch=MIXED), Spoiling((0, 0, 0), float("nan"))),
        (case_of(batch=MIXED), Spoiling((9, 0, 0), 1.0)),  # a padding row
        (case_of(batch=BatchShape(query_lens=(2,), seq_lens=(0,))), Spoiling((0, 0, 0), 1.0)),  # sees no key
        (case_of(batch=BatchShape(query_lens=(2,), seq_lens=(1,))), Spoiling((0, 0, 0), 1.0)),  # likewise, p < 0
        (case_of("cancel"), Planted(factors=times(3, 50.0))),  # all values are alike
        (case_of(batch=MIXED, operation="update_kv_cache"), Spoiling((1, 0, 0, 0), 1.0)),
    ],
    ids=["nan", "padding row", "no key", "before the keys", "cancel", "update"],
)
def test_nothing_is_said_where_nothing_can_be(case: Case, candidate: Any) -> None:
    verdict = judge(case, candidate)
    assert verdict.failed
    assert {(mismatch.direction, mismatch.hint) for mismatch in verdict.mismatches} == {("", "")}


def test_full_device_keeps_no_finding_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(diagnose, "diagnose", fail)
    found = worst(judge(case_of("one_hot_full", seed=5), Planted(factors=times(1023, 0.0))))
    assert found.hint == ""
