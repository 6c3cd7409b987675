"""A campaign asks a share of its cases one check more, and its summary counts them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

from pageproof.oracle.campaign.lengths import INTERPRETED
from pageproof.oracle.campaign.pairs import MODEL, Model
from pageproof.oracle.campaign.report import closing, to_json
from pageproof.oracle.campaign.sampler import Group
from pageproof.oracle.campaign.summary import Options, Summary
from pageproof.oracle.campaign.tally import Tally
from pageproof.oracle.case import CHECKS, Case
from pageproof.oracle.case_rules import why_invalid
from pageproof.oracle.verdict import Outcome, Verdict


def drawn(check_share: float) -> list[Case]:
    sizes = replace(INTERPRETED, check_share=check_share, reads_share=0.05 * (check_share > 0))
    return [
        case for index in range(200) for case in Group(seed=1, index=index, count=3).cases(Model(extra=True), sizes)
    ]


def test_a_share_of_the_cases_is_asked_every_check_now_and_then() -> None:
    cases = drawn(0.5)
    counts = Counter(case.check for case in cases if case.mode == "eager")
    assert set(counts) == set(CHECKS)
    # One in eight is an update, of which no relation says anything.
    assert 0.45 < counts["answer"] / counts.total() < 0.66
    assert {case.check for case in cases if case.mode != "eager"} == {"answer"}


def test_checks_are_asked_of_the_same_cases() -> None:
    plain, asked = drawn(0.0), drawn(1.0)
    assert [replace(case, check="answer") for case in asked] == plain
    assert all(why_invalid(case) is None for case in asked)


def test_the_summary_counts_them() -> None:
    tallies = Tally(), Tally()
    for number, check in enumerate(("split", "answer", "split", "ones")):
        verdict = Verdict(outcome=Outcome.AGREES, case=Case(check=check, seed=number), candidate="")
        tallies[number % 2].add(verdict, MODEL)
    tallies[0].merge(tallies[1])
    summary = Summary(options=Options(), device="cpu", workers=1, versions={}, tally=tallies[0])
    assert "check: split (2), answer (1), ones (1)" in closing(summary).splitlines()
    assert json.loads(to_json(summary))["values"]["check"] == {"split": 2, "answer": 1, "ones": 1}
