"""What campaigns have found stays found: every case in past_findings/ agrees now."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pageproof.oracle import Case, judge
from pageproof.oracle.adapters import find
from pageproof.oracle.case_rules import why_invalid

FINDINGS = sorted((Path(__file__).parent / "past_findings").glob("*.json"))


@pytest.mark.gpu
@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_it_agrees(path: Path) -> None:
    judge(Case.from_json(path.read_text()), find("ours"), torch.device("cuda")).require()


def test_there_are_some_and_they_can_be_read() -> None:
    assert len(FINDINGS) >= 4
    for path in FINDINGS:
        case = Case.from_json(path.read_text())
        assert why_invalid(case) is None
        assert Case.from_json(case.to_json()) == case
