"""Cases that are judged together get the verdicts that they get alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from pageproof.oracle import Case, Spec, judge, judging_many, questions
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.building.tensors import build
from pageproof.oracle.campaign.lengths import INTERPRETED
from pageproof.oracle.campaign.pairs import Model
from pageproof.oracle.campaign.sampler import random_group
from pageproof.oracle.candidate import NumericContract
from pageproof.oracle.case import MODES, BatchShape
from pageproof.oracle.judging_many import judge_many
from pageproof.oracle.questions import Question
from pageproof.oracle.verdict import Outcome, Verdict

EAGER = Model(extra=True, banned=frozenset(("mode", mode) for mode in MODES[1:]))
SIZES = replace(INTERPRETED, cases_per_key=20, reads_share=0.0)
SPEC = Spec(dtype="float32", num_kv_heads=1, group_size=2, head_size=16, head_size_v=16)
BATCH = BatchShape(query_lens=(1, 4), seq_lens=(40, 9), padding_tokens=1)


class Broken(Reference):
    """Right but for the cases whose first request has an even number of keys; it declines by the seed."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def declines(self, case: Case) -> str | None:
        return "by its seed" if self.fault == "declines" and case.seed % 2 == 0 else None

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        returned = super().call(operation, arguments)
        if "batch" not in arguments or len(arguments["batch"].seq_lens) == 0 or int(arguments["batch"].seq_lens[0]) % 2:
            return returned
        if self.fault == "value":
            arguments["out"].view(-1)[:1] = 1e4
        elif self.fault == "nan":
            arguments["lse"].view(-1)[-1:] = float("nan")
        elif self.fault == "scores":  # every output too large by what a bound may allow
            arguments["out"].mul_(1 + 2**-9)
        elif self.fault == "input":
            arguments["batch"].seq_lens[0] = 2**30  # as a page table this would be no memory of the process
        elif self.fault == "raises":
            raise RuntimeError("no")
        elif self.fault == "memory":
            arguments["out"].set_(torch.zeros_like(arguments["out"]))
        return returned


def both(cases: list[Case], candidate: Reference, device: str = "cpu") -> tuple[list[Verdict], list[Verdict]]:
    found = dict(judge_many(cases, candidate, device, at=lambda _: None))
    assert sorted(found) == list(range(len(cases)))
    return [judge(case, candidate, device) for case in cases], [found[index] for index in range(len(cases))]


def compared(alone: Verdict, together: Verdict) -> None:
    assert replace(alone, ratios=(), reason="", mismatches=()) == replace(together, ratios=(), reason="", mismatches=())
    assert alone.reason.splitlines()[-1:] == together.reason.splitlines()[-1:]
    assert [wrong.index for wrong in alone.mismatches] == [wrong.index for wrong in together.mismatches]
    assert [name for name, _ in alone.ratios] == [name for name, _ in together.ratios]
    found, wanted = ([ratio for _, ratio in verdict.ratios] for verdict in (together, alone))
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("fault", ["", "value", "nan", "scores", "input", "raises", "memory", "declines"])
def test_every_case_has_the_verdict_that_it_has_alone(fault: str) -> None:
    outcomes = set()
    for group in range(6):
        cases = list(random_group(11, group, SIZES).cases(EAGER, SIZES))
        for alone, together in zip(*both(cases, Broken(fault)), strict=True):
            compared(alone, together)
            outcomes.add(alone.outcome)
    assert Outcome.AGREES in outcomes
    assert len(outcomes) > 1 or not fault


FEATURES: dict[str, list[dict[str, Any]]] = {
    "windows": [{"sliding_window": 1}, {"sliding_window": 9}, {"sliding_window": 2**31 - 1}],
    "right windows": [{"causal": False, "right_window": window} for window in (0, 2, 2**31 - 1)],
    "softcaps": [{"softcap": 0.5}, {"softcap": 50.0}],
    "biases": [{"query_bias": "dense", "bias_width": 1}, {"query_bias": "tree", "bias_width": 6}],
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("operation", ["attention", "mla_attention", "mla_attention_decompressed"])
def test_what_differs_within_a_compile_key_is_each_case_s_own(
    operation: str, features: list[dict[str, Any]], device: str
) -> None:
    sizes = {"nope_head_size": 16, "rope_head_size": 16} if operation.endswith("decompressed") else {}
    sizes |= {"rope_head_size": 16} if operation.startswith("mla") else {}
    spec = replace(SPEC, operation=operation, **sizes)  # type: ignore[arg-type]
    cases = [
        Case(spec=replace(spec, **each), batch=replace(BATCH, table_slack=slack), recipe=recipe, seed=seed)
        for seed, (each, slack, recipe) in enumerate(
            (each, slack, recipe) for each in features for slack in (0, 2) for recipe in ("normal", "extreme")
        )
    ]
    for alone, together in zip(*both(cases, Reference(), device), strict=True):
        compared(alone, together)
        assert alone.outcome is Outcome.AGREES


def test_cases_of_one_kernel_are_evaluated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    evaluate = questions.evaluate_together

    def counted(problems: Any, *rest: Any, **others: Any) -> Any:
        asked.append(len(problems))
        return evaluate(problems, *rest, **others)

    monkeypatch.setattr(questions, "evaluate_together", counted)
    cases = [Case(spec=replace(SPEC, sliding_window=1 + n % 5), batch=BATCH, seed=n) for n in range(20)]
    list(judge_many(cases, Reference(), "cpu", at=lambda _: None))
    assert asked == [16, 4]
    asked.clear()
    monkeypatch.setattr(judging_many, "WAITING_BYTES", 1)
    list(judge_many(cases, Reference(), "cpu", at=lambda _: None))
    assert asked == [1] * 20


class Workspace(Reference):
    """Merges into memory of its own, the same each time."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: tuple[torch.Tensor, ...] = ()

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        returned = super().call(operation, arguments)
        if not self.memory:
            self.memory = tuple(map(torch.empty_like, returned))
        return tuple(mine.copy_(theirs) for mine, theirs in zip(self.memory, returned, strict=True))


class Late(Reference):
    """Writes the outputs of the call before."""

    before: tuple[str, dict[str, Any]] | None = None

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if self.before is not None:
            super().call(*self.before)
        self.before = operation, arguments


def test_outputs_are_those_of_the_case_s_own_call() -> None:
    merges = [Case(spec=Spec(operation="merge_states"), batch=BATCH, seed=seed) for seed in range(4)]
    found = dict(judge_many(merges, Workspace(), "cpu", at=lambda _: None))
    assert [verdict.outcome for verdict in found.values()] == [Outcome.AGREES] * 4
    cases = [Case(spec=SPEC, batch=BATCH, seed=seed) for seed in range(4)]
    found = dict(judge_many(cases, Late(), "cpu", at=lambda _: None))
    assert [verdict.outcome for verdict in found.values()] == [Outcome.UNWRITTEN] * 4


class Declaring(Reference):
    """Its contract goes by the case's keys: what one is allowed, another is not."""

    def contract(self, case: Case) -> NumericContract:
        return NumericContract(p_dtype="bfloat16" if case.batch.seq_lens[0] % 2 else "float32")

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        super().call(operation, arguments)
        arguments["out"].mul_(1 + 2**-10)


def test_every_case_is_held_to_its_own_contract() -> None:
    lengths = (40, 41, 40, 41, 41, 40)
    cases = [Case(spec=SPEC, batch=replace(BATCH, seq_lens=(n, 9)), seed=seed) for seed, n in enumerate(lengths)]
    for alone, together in zip(*both(cases, Declaring()), strict=True):
        compared(alone, together)
    outcomes = [verdict.outcome for verdict in both(cases, Declaring())[1]]
    assert outcomes == [Outcome.AGREES if n % 2 else Outcome.DIFFERS for n in lengths]


class OtherForm(Reference):
    """Returns merges of some cases in another format, or with a row too many."""

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        out, lse = super().call(operation, arguments)
        kind = int(arguments["lse_a"].abs().nan_to_num(posinf=0).sum().item()) % 3
        return (out.double(), lse) if kind == 1 else (torch.cat([out, out[:1]]), lse) if kind == 2 else (out, lse)


def test_outputs_of_another_form_are_wrong_of_their_own_case_only() -> None:
    cases = [Case(spec=Spec(operation="merge_states"), batch=BATCH, seed=seed) for seed in range(12)]
    alone, together = both(cases, OtherForm())
    for one, many in zip(alone, together, strict=True):
        compared(one, many)
    assert {verdict.outcome for verdict in alone} == {Outcome.AGREES, Outcome.DIFFERS}


def test_what_goes_together() -> None:
    """One kernel, one contract, one kind of roundings, outputs of one form; and no pages that are far apart."""
    case = Case(spec=Spec(operation="merge_states"), batch=BATCH)
    problem = build(case, "cpu")
    out, lse = problem.arguments["out_a"], problem.arguments["lse_a"]
    one = Question(problem=problem, contract=NumericContract(), actual={"out": out, "lse": lse}, generic=False)
    others = [
        replace(one, contract=NumericContract(p_dtype="bfloat16")),
        replace(one, generic=True),
        replace(one, problem=replace(problem, case=case.with_spec(group_size=3))),
        replace(one, actual={"out": out.view(torch.int16), "lse": lse}),  # which torch would cast when it joins them
        replace(one, actual={"out": out[:, :1], "lse": lse}),
    ]
    kinds = [questions._kind_of(each) for each in (one, *others)]
    assert len({*kinds}) == len(kinds)
    assert None not in kinds
    assert questions._kind_of(replace(one, problem=replace(problem, case=replace(case, seed=5)))) == kinds[0]
    assert questions._kind_of(replace(one, actual={"out": out, "lse": lse[1:]})) is None
    assert questions._kind_of(replace(one, problem=replace(problem, case=case.with_spec(far_pages=True)))) is None


def test_wide_tables_are_not_made_of_many_narrow_ones() -> None:
    narrow = BatchShape(query_lens=(1,) * 3000, seq_lens=(1,) * 3000)
    wide = BatchShape(query_lens=(1,), seq_lens=(4096,))
    spec = replace(SPEC, block_size=1)
    cases = [Case(spec=spec, batch=batch, seed=seed) for seed, batch in enumerate((narrow, wide, wide, BATCH))]
    asked = [
        Question(problem=build(case, "cpu"), contract=NumericContract(), actual={}, generic=False) for case in cases
    ]
    assert list(questions._without_padding(range(4), asked)) == [[0], [1, 2, 3]]


class InModes(Reference):
    """Wrong in some cases: in all calls, or in the second call of a step, which only a replay has."""

    modes = MODES

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.calls: Counter[tuple[int, ...]] = Counter()

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        super().call(operation, arguments)
        if operation != "attention":
            return
        lengths = tuple(arguments["batch"].seq_lens.tolist())
        self.calls[lengths] += 1
        chosen = sum(lengths) % 5 == 0
        if chosen and (self.fault == "wrong" or (self.fault == "replay" and self.calls[lengths] == 2)):
            arguments["out"] += 1.0
        elif chosen and self.fault == "writes":
            arguments["v_cache"].view(-1)[:1] = 0
        elif sum(lengths) % 7 == 0 and self.fault == "raises":
            raise RuntimeError("no")


@pytest.mark.parametrize("fault", ["", "wrong", "replay", "writes", "raises"])
def test_cases_in_modes_beside_plain_ones(fault: str) -> None:
    cases = []
    for seed in range(1, 14, 2):
        batch = BatchShape(query_lens=(1, 5, 0, 3), seq_lens=(33, 17 + seed, 0, 9))
        groups = 2 if seed % 4 == 1 else 1
        cases.append(Case(spec=SPEC, batch=batch, mode="piecewise", replays=3, cache_groups=groups, seed=seed))
        cases.append(Case(spec=SPEC, batch=batch, seed=seed))
    candidate, told = InModes(fault), []
    calls = [Counter[tuple[int, ...]]() for _ in cases]

    def at(index: int) -> None:
        candidate.calls = calls[index]  # it may run once more, to see what a plain call does
        told.append(index)

    together = dict(judge_many(cases, candidate, "cpu", at=at))
    alone = [judge(case, InModes(fault), "cpu") for case in cases]
    for index, verdict in enumerate(alone):
        compared(verdict, together[index])
        assert verdict.counts == together[index].counts
    assert ({verdict.outcome for verdict in alone} == {Outcome.AGREES}) == (not fault)
    assert told[: len(cases)] == list(range(len(cases)))
    if not fault:
        assert told[len(cases) :] == [len(cases) - 1, *range(len(cases))]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11 warns of its own modules
def test_many_compiled_cases_do_not_count_towards_one_limit(pageproof_device: torch.device) -> None:
    """The compiler gives up after 8 compilations of one function, and each case has two."""
    spec = Spec(operation="merge_states", dtype="float16")
    cases = [Case(spec=spec, batch=BATCH, mode="compiled", replays=2, seed=seed) for seed in range(10)]
    found = [verdict for _, verdict in judge_many(cases, Ours(), pageproof_device, at=lambda _: None)]
    assert [verdict.outcome for verdict in found] == [Outcome.AGREES] * 10
