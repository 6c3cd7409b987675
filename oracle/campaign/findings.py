"""Failing cases: told apart by what they have in common, kept as files that replay, and shrunk one by one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from ..case import ATTENTION_OPERATIONS, Case
from ..shrinking import Symptom, symptom_of
from ..verdict import Verdict, replay_command
from .parameters import BY_NAME
from .traits import traits

Signature = tuple[Symptom, frozenset[str]]  # how it shows, and the features that are on

ORIGINAL = ".original.json"  # ends the name of a case as it was before it was shrunk

_SPOKEN = {"causal": "non-causal", "kv_dtype": "float8 kv", "q_dtype": "float8 q", "out_dtype": "float8 out"}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failing case and what it is recognised by."""

    symptom: Symptom
    case: Case
    text: str  # the verdict's explanation

    @staticmethod
    def of(verdict: Verdict) -> Failure:
        return Failure(symptom=symptom_of(verdict), case=verdict.case, text=verdict.explain())

    @property
    def signature(self) -> Signature:
        return self.symptom, self.features

    @cached_property
    def features(self) -> frozenset[str]:
        """The names of the features that the case uses."""
        return features_on(self.case)

    @cached_property
    def size(self) -> tuple[int, int, str]:
        batch = self.case.batch
        return len(self.features), batch.num_tokens + sum(batch.seq_lens), self.case.to_json()

    @property
    def name(self) -> str:
        return f"{self.symptom.outcome}-{hashlib.sha256(self.case.to_json().encode()).hexdigest()[:10]}"


class Stage(StrEnum):
    """How far a finding has come."""

    FOUND = "not shrunk"
    TAKEN_UP = "being shrunk"
    SHRUNK = "shrunk"
    PARTLY = "shrunk in part"  # the time for it was up
    UNSTEADY = "did not fail again"  # when the case was judged a second time, by itself


@dataclass(eq=False)
class Finding:
    """What stands for failures that are alike, and how many there were."""

    failure: Failure
    count: int = 1
    path: Path | None = None
    stage: Stage = Stage.FOUND
    kept: bool = False  # its file is from an earlier campaign, and stays
    origins: list[frozenset[str]] = field(init=False)  # features of cases as they were found, not as shrunk

    def __post_init__(self) -> None:
        self.origins = [self.failure.features]

    def covers(self, features: frozenset[str]) -> bool:
        """Whether a failure with these features, and the same symptom, is counted here."""
        return any(origin <= features for origin in self.origins)

    def line(self, target: str) -> str:
        """What, with which features, how often, and the command that shows it again."""
        operation, outcome, check, outputs, direction = self.failure.symptom
        features = ", ".join(sorted(self.failure.features)) or "no feature on"
        failed = f" ({check})" if check not in ("", "bound") else ""
        where = (f" in {outputs}" if outputs else "") + (f": {direction}" if direction else "")
        times = f", {self.count:,} cases" if self.count > 1 else ""
        command = replay_command(str(self.path or self.failure.name), target)
        return f"{operation} {outcome}{failed}{where} ({features}{times}; {self.stage.value})\n  {command}"


def features_on(case: Case) -> frozenset[str]:
    """Names of the parameters that are not off: "softcap", "float8 kv" and so on; sizes and batches are no features."""
    on = {(name, value) for name, value in traits(case) if BY_NAME[name].off is not None}
    named = (name for name, value in on if value != BY_NAME[name].off and BY_NAME[name].within_key != "free")
    windows = ("sliding_window", "right_window") if case.spec.operation in ATTENTION_OPERATIONS else ()
    # A window is on at any width, also at one that no kind of window is named after.
    named_windows = (name for name in windows if getattr(case.spec, name) is not None)
    return frozenset(_SPOKEN.get(name, name) for name in (*named, *named_windows))


class Findings:
    """The failures so far, one finding for each symptom and smallest set of features.

    A failure that has all the features of another with its symptom is counted with that one: the features that it
    has more did not make it fail. Which one stays does not depend on the order in which they came. Once shrunk,
    findings are the same if symptom and features are.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """With a directory, every finding is written there at once: the case as JSON, the explanation as text."""
        self.directory = directory
        self._found: dict[Symptom, list[Finding]] = {}

    def __iter__(self) -> Iterator[Finding]:
        return (finding for found in self._found.values() for finding in found)

    def __len__(self) -> int:
        return sum(len(found) for found in self._found.values())

    @property
    def failures(self) -> int:
        """Failing cases, those that were counted with another included."""
        return sum(finding.count for finding in self)

    def add(self, failure: Failure) -> bool:
        """Count a failure; whether it is new, or replaces larger ones with its symptom."""
        found = self._found.setdefault(failure.symptom, [])
        for finding in found:
            if finding.covers(failure.features):
                finding.count += 1
                if not _replaceable(finding) or failure.size >= finding.failure.size:
                    return False
                self._remove(finding)
                self._write(finding, failure)
                return True
        covered = [item for item in found if _replaceable(item) and failure.features < item.failure.features]
        found[:] = [finding for finding in found if finding not in covered]
        new = Finding(failure, 1 + sum(finding.count for finding in covered))
        for finding in covered:
            self._remove(finding)
        found.append(new)
        self._write(new, failure)
        return True

    def keep(self, failure: Failure, path: Path) -> None:
        """Count the failure of a case whose file is there from an earlier campaign."""
        stage = Stage.SHRUNK if original_of(path).exists() else Stage.FOUND
        self._found.setdefault(failure.symptom, []).append(Finding(failure, path=path, stage=stage, kept=True))

    def repeat(self, signature: Signature, count: int) -> None:
        """Count failures that add nothing to a finding which is known already."""
        symptom, features = signature
        for finding in self._found.get(symptom, ()):
            if finding.covers(features):
                finding.count += count
                return

    @property
    def all_taken_up(self) -> bool:
        """Whether there is none left that may be shrunk."""
        return all(finding.stage is not Stage.FOUND for finding in self)

    def next_to_shrink(self) -> Finding | None:
        """Which finding to take up: first what returns at all, then what no shrunk one explains, then the smallest."""
        waiting = [finding for finding in self if finding.stage is Stage.FOUND]

        def rank(finding: Finding) -> tuple[bool, bool, tuple[int, int, str]]:
            hangs = finding.failure.symptom.outcome == "timed-out"
            return hangs, self._explanation(finding) is not None, finding.failure.size

        return min(waiting, key=rank, default=None)

    def shrunk(self, finding: Finding, smallest: Failure, stage: Stage) -> None:
        """What became of a finding that was taken up. The case it was found with stays beside the smaller one."""
        finding.stage = stage
        if smallest.case != finding.failure.case:
            if finding.path is not None:
                _put(original_of(finding.path), finding.failure.case.to_json())
            self._write(finding, smallest)
        for other in list(self._found[smallest.symptom]):
            same = other.failure.features == smallest.features and other.stage is stage is Stage.SHRUNK
            if same and other is not finding:
                first, second = sorted((finding, other), key=lambda one: (not one.kept, one.failure.size))
                self._count_with(first, second)
                return

    def conclude(self) -> None:
        """Nothing more is shrunk: what was not, and a shrunk finding explains, is counted with that one."""
        for finding in [finding for finding in self if finding.stage is Stage.FOUND]:
            explanation = self._explanation(finding)
            if explanation is not None:
                self._count_with(explanation, finding)

    def _explanation(self, finding: Finding) -> Finding | None:
        """A shrunk finding with the same symptom that needs no feature which this one has not."""
        others = (item for item in self._found[finding.failure.symptom] if item.stage is Stage.SHRUNK)
        return next((other for other in others if other.failure.features <= finding.failure.features), None)

    def _count_with(self, finding: Finding, other: Finding) -> None:
        finding.count += other.count
        finding.origins += other.origins
        self._found[other.failure.symptom].remove(other)
        self._remove(other)

    def _write(self, finding: Finding, failure: Failure) -> None:
        finding.failure = failure
        if finding.path is None:
            if self.directory is None:
                return
            finding.path = self.directory / f"{failure.name}.json"
        finding.path.parent.mkdir(parents=True, exist_ok=True)
        _put(finding.path.with_suffix(".txt"), failure.text + "\n")
        _put(finding.path, failure.case.to_json())

    def _remove(self, finding: Finding) -> None:
        if finding.path is not None and not finding.kept:
            for path in (finding.path, finding.path.with_suffix(".txt"), original_of(finding.path)):
                path.unlink(missing_ok=True)
        finding.path = None


def original_of(path: Path) -> Path:
    """Where the case of a finding is kept as it was before it was shrunk."""
    return path.with_name(path.stem + ORIGINAL)


def _replaceable(finding: Finding) -> bool:
    return finding.stage is Stage.FOUND and not finding.kept


def _put(path: Path, text: str) -> None:
    """The whole file or none of it."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)
