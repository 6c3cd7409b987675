"""A failing case becomes small and stays the same failure: order, budget, what is kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import pytest
import torch

from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.campaign.findings import features_on
from pageproof.oracle.campaign.lengths import COMPILED
from pageproof.oracle.campaign.pairs import Model
from pageproof.oracle.campaign.sampler import random_group
from pageproof.oracle.campaign.traits import compile_key
from pageproof.oracle.case import FLOAT8, BatchShape, Case, Spec
from pageproof.oracle.case_rules import why_invalid
from pageproof.oracle.judging import judge
from pageproof.oracle.shrinking import Search, Symptom, shrink, symptom_of
from pageproof.oracle.shrinking.reducing import fewest, lowest
from pageproof.oracle.verdict import ORACLE_FAILED, Mismatch, Outcome, Verdict

EVALUATIONS = 150  # for what takes 60 to 110


def large_case() -> Case:
    """40 requests and most features; one request has both nine new tokens and more than 40 keys."""
    rng = random.Random(1)
    requests = [(1, rng.randint(1, 30)) for _ in range(39)]
    requests.insert(23, (9, 133))
    return Case(
        spec=Spec(
            kv_dtype=FLOAT8,
            scales="head",
            num_kv_heads=3,
            group_size=5,
            head_size=80,
            head_size_v=128,
            block_size=48,
            sliding_window=47,
            softcap=30.0,
            alibi=True,
            sinks=True,
        ),
        batch=BatchShape(
            query_lens=tuple(n for n, _ in requests),
            seq_lens=tuple(length for _, length in requests),
            padding_tokens=3,
            table_slack=2,
            shared_blocks=1,
        ),
        recipe="needle",
        seed=12345,
    )


class OneBadRow(Reference):
    """The third new token of a request is half as large again, if the request has more than 40 keys."""

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        returned = super().call(operation, arguments)
        starts, seq_lens = arguments["batch"].cu_seqlens_q.tolist(), arguments["batch"].seq_lens.tolist()
        for start, stop, length in zip(starts, starts[1:], seq_lens, strict=False):
            if stop - start >= 3 and length > 40:
                arguments["out"][start + 2] *= 1.5
        return returned


class SinksBesideAWindow(Reference):
    """The lse is off by one where there are both; and NaN where there are many requests, which is another fault."""

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        returned = super().call(operation, arguments)
        rules = arguments["rules"]
        if rules.sinks is not None and rules.sliding_window is not None:
            arguments["lse"] += 1.0
        elif rules.sinks is not None:
            arguments["lse"].fill_(torch.nan)
        return returned


def shrunk_against(candidate: Reference, case: Case) -> Search:
    symptom = symptom_of(judge(case, candidate))
    search = shrink(case, lambda trial: symptom_of(judge(trial, candidate)) == symptom, seconds=240)
    assert symptom_of(judge(search.best, candidate)) == symptom
    assert search.finished
    assert search.reproduced
    assert search.evaluations <= EVALUATIONS
    return search


def test_one_bad_row_among_forty_requests_comes_down_to_one_request_and_a_few_lines() -> None:
    search = shrunk_against(OneBadRow(), large_case())
    assert search.best == Case(
        spec=Spec(dtype="float32", num_kv_heads=1, group_size=1),
        batch=BatchShape(query_lens=(3,), seq_lens=(41,)),
        poison="",
    )
    lines = search.best.to_json().splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 100


def test_the_features_that_a_fault_needs_are_what_is_left() -> None:
    search = shrunk_against(SinksBesideAWindow(), large_case())
    assert features_on(search.best) == {"sinks", "sliding_window"}
    assert search.best.spec.sliding_window == 1
    assert search.best.batch == BatchShape(query_lens=(1,), seq_lens=(1,))


def trials_of(case: Case, fails: Callable[[Case], bool]) -> tuple[list[Case], Search]:
    search, asked = Search(case), []
    while search.trial is not None:
        asked.append(search.trial)
        search.tell(fails(search.trial))
    return asked, search


def long_with_sinks(case: Case) -> bool:
    return case.spec.sinks and max(case.batch.seq_lens, default=0) >= 40


def test_the_compile_key_is_left_only_when_nothing_gets_smaller_inside_it() -> None:
    asked, search = trials_of(large_case(), long_with_sinks)
    keys = [compile_key(case.spec) for case in asked]
    inside = [case for case, key in zip(asked, keys, strict=True) if key == keys[0]]
    first_outside = next(index for index, key in enumerate(keys) if key != keys[0])
    assert len(inside) >= first_outside > 20
    last = [case for case in asked[:first_outside] if long_with_sinks(case)][-1]
    assert last.batch == search.best.batch == BatchShape(query_lens=(1,), seq_lens=(40,))
    assert (last.recipe, last.seed, last.poison) == ("normal", 0, "")
    assert len(set(keys)) <= 25  # each of them would be seconds of compiling


def test_the_same_answers_give_the_same_questions_and_none_twice() -> None:
    (first, _), (second, _) = (trials_of(large_case(), long_with_sinks) for _ in range(2))
    assert first == second
    assert len(set(first)) == len(first)
    assert all(why_invalid(case) is None for case in first)


def drawn_cases() -> Generator[Case]:
    """Cases as campaigns draw them for a GPU, of every operation."""
    for index in range(150):
        group = replace(random_group(5, index, COMPILED), count=1)
        yield from group.cases(Model(extra=True), COMPILED)


def test_any_drawn_case_comes_down_to_the_same_plain_one() -> None:
    """Of what fails whatever it is, nothing is left but the operation."""
    plain: dict[str, set[Case]] = {}
    for case in drawn_cases():
        asked, search = trials_of(case, lambda trial: True)
        assert len(asked) < 30
        plain.setdefault(case.spec.operation, set()).add(search.best)
        assert not features_on(search.best)
    assert len(plain) == 6
    assert all(len(cases) == 1 for cases in plain.values())


def test_what_a_drawn_case_fails_with_stays_on() -> None:
    """The signature of a fault does not depend on the case that it was found with."""
    found = set()
    for case in drawn_cases():
        if not (case.spec.softcap and case.spec.kv_dtype and case.batch.num_tokens > 5):
            continue
        _, search = trials_of(
            case, lambda trial: bool(trial.spec.softcap and trial.spec.kv_dtype and trial.batch.num_tokens > 5)
        )
        assert search.best.batch.num_tokens == 6
        assert search.evaluations < 300
        found.add((search.best.spec.operation, features_on(search.best)))
    assert found == {(operation, frozenset({"softcap", "float8 kv"})) for operation, _ in found}
    assert len(found) == 3


def test_a_budget_is_kept_and_what_was_reached_stays() -> None:
    search = shrink(large_case(), long_with_sinks, evaluations=15)
    assert search.evaluations == 15
    assert not search.finished
    assert long_with_sinks(search.best)
    assert search.best.batch.num_requests < 40
    assert shrink(large_case(), long_with_sinks, seconds=0.0).best == large_case()


def test_what_does_not_fail_again_is_left_alone() -> None:
    search = shrink(large_case(), lambda case: False)
    assert (search.evaluations, search.finished, search.reproduced) == (1, True, False)
    assert search.best == large_case()
    with pytest.raises(ValueError, match="found a search that is over"):
        search.tell(True)


def test_a_window_shrinks_together_with_the_keys_beyond_it() -> None:
    case = Case(spec=Spec(sliding_window=100), batch=BatchShape(query_lens=(1,), seq_lens=(150,)))

    def fails(trial: Case) -> bool:
        window, (length,) = trial.spec.sliding_window, trial.batch.seq_lens or (0,)
        return window is not None and length == window + 50

    _, search = trials_of(case, fails)
    assert (search.best.spec.sliding_window, search.best.batch.seq_lens) == (1, (51,))


def driven(steps: Any, fails: Callable[[Any], bool]) -> Any:
    trial = next(steps)
    try:
        while True:
            trial = steps.send(fails(trial))
    except StopIteration as end:
        return end.value


def test_fewest_keeps_what_is_needed_together_wherever_it_stands() -> None:
    for needed in ({3}, {0, 39}, {7, 8, 30}, set()):
        asked: list[list[int]] = []

        def fails(kept: list[int], needed: set[int] = needed, asked: list[list[int]] = asked) -> bool:
            asked.append(kept)
            return needed <= set(kept)

        assert driven(fewest(range(40), lambda kept: kept), fails) == sorted(needed)
        assert len(asked) <= 12 * max(1, len(needed)) + 12


def test_lowest_finds_a_step_and_then_what_lies_between_two() -> None:
    steps = [0, 1, 15, 16, 17, 63, 64, 65]
    for threshold in (0, 1, 5, 16, 40, 65, 99, 100):
        assert driven(lowest(100, steps, lambda n: n), lambda n, t=threshold: n >= t) == threshold


def mismatch(**changes: Any) -> Mismatch:
    values = {"output": "out", "outcome": Outcome.DIFFERS, "count": 1, "total": 2, "index": (0,), "where": "here"}
    return Mismatch(**{**values, "actual": 1.0, "expected": 0.0, "bound": 0.1, **changes})


def verdict(**changes: Any) -> Verdict:
    return Verdict(**{"outcome": Outcome.DIFFERS, "case": Case(), "candidate": "it", "check": "bound", **changes})


def test_a_symptom_is_neither_a_number_nor_a_shape() -> None:
    first = verdict(mismatches=(mismatch(direction="missing key"),))
    assert symptom_of(first) == Symptom("attention", "differs", "bound", "out", "missing key")
    bigger = mismatch(direction="missing key", count=7, index=(9, 1, 3), actual=40.0)
    same = verdict(mismatches=(bigger,), case=Case(batch=BatchShape(query_lens=(1,), seq_lens=(9,))))
    assert symptom_of(first) == symptom_of(same)
    for other in (
        verdict(mismatches=(mismatch(direction="extra key"),)),
        verdict(mismatches=(mismatch(direction="missing key", output="lse"),)),
        verdict(mismatches=(mismatch(direction="missing key"),), check="row z"),
        verdict(mismatches=(mismatch(direction="missing key"),), case=Case(spec=Spec(operation="merge_states"))),
    ):
        assert symptom_of(first) != symptom_of(other)


@pytest.mark.parametrize(
    ("reason", "direction"),
    [
        ("  File x\n    y()\nValueError: group: found 3, expected 4", "ValueError"),
        ("  File x\ntorch.AcceleratorError: CUDA error: illegal\nCompile with it.\n", "torch.AcceleratorError"),
        ("triton.compiler.errors.CompilationError: at 3:4:\n  tl.dot", "triton.compiler.errors.CompilationError"),
        (f"{ORACLE_FAILED}:\nTraceback\nRuntimeError: no", f"{ORACLE_FAILED}: RuntimeError"),
        ("the process was ended by SIGSEGV", "the process was ended by SIGSEGV"),
        ("  File x\n    y()\nOdd", ""),
    ],
)
def test_a_crash_is_told_by_what_was_raised(reason: str, direction: str) -> None:
    assert symptom_of(verdict(outcome=Outcome.CRASHED, check="", reason=reason)).direction == direction


def test_a_mode_goes_where_a_plain_call_fails_alike_and_else_the_replays() -> None:
    case = replace(large_case(), mode="piecewise", replays=5)
    search = shrink(case, lambda trial: trial.spec.alibi, seconds=60.0)
    assert (search.best.mode, search.best.replays) == ("eager", 6)
    search = shrink(case, lambda trial: trial.mode == "piecewise" and trial.replays >= 2, seconds=60.0)
    assert (search.best.mode, search.best.replays) == ("piecewise", 2)
    grouped = replace(case, cache_groups=2)
    search = shrink(grouped, lambda trial: trial.mode == "piecewise", seconds=60.0)
    assert (search.best.mode, search.best.cache_groups) == ("piecewise", 1)
    search = shrink(grouped, lambda trial: trial.cache_groups == 2, seconds=60.0)
    assert (search.best.mode, search.best.cache_groups) == ("piecewise", 2)
    search = shrink(grouped, lambda trial: trial.spec.alibi, seconds=60.0)
    assert (search.best.mode, search.best.cache_groups) == ("eager", 1)
