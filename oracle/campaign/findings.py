"""Failing cases: told apart by what they have in common, kept as files that replay."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..case import ATTENTION_OPERATIONS, Case
from ..verdict import FAILURES, Verdict, replay_command
from .parameters import BY_NAME
from .traits import traits

Kind = tuple[str, str, str]  # operation, outcome, outputs that are wrong
Signature = tuple[Kind, frozenset[str]]  # a kind and the features that are on

_SPOKEN = {"causal": "non-causal", "kv_dtype": "float8 kv", "q_dtype": "float8 q", "out_dtype": "float8 out"}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failing case and what it is recognised by."""

    outcome: str
    outputs: str  # the outputs that are wrong, by name
    case: Case
    text: str  # the verdict's explanation

    @staticmethod
    def of(verdict: Verdict) -> Failure:
        outputs = ", ".join(mismatch.output for mismatch in verdict.mismatches if mismatch.outcome in FAILURES)
        return Failure(outcome=verdict.outcome.value, outputs=outputs, case=verdict.case, text=verdict.explain())

    @property
    def kind(self) -> Kind:
        return self.case.spec.operation, self.outcome, self.outputs

    @property
    def signature(self) -> Signature:
        return self.kind, self.features

    @property
    def features(self) -> frozenset[str]:
        """The names of the features that the case uses."""
        return features_on(self.case)

    @property
    def size(self) -> tuple[int, int, str]:
        batch = self.case.batch
        return len(self.features), batch.num_tokens + sum(batch.seq_lens), self.case.to_json()

    @property
    def name(self) -> str:
        return f"{self.outcome}-{hashlib.sha256(self.case.to_json().encode()).hexdigest()[:10]}"


@dataclass
class Finding:
    """The smallest failure of its kind, and how many there were."""

    failure: Failure
    count: int = 1
    path: Path | None = None

    def line(self, target: str) -> str:
        """What, with which features, how often, and the command that shows it again."""
        operation, outcome, outputs = self.failure.kind
        features = ", ".join(sorted(self.failure.features)) or "no feature on"
        where = f" in {outputs}" if outputs else ""
        times = f", {self.count:,} cases" if self.count > 1 else ""
        command = replay_command(str(self.path or self.failure.name), target)
        return f"{operation} {outcome}{where} ({features}{times})\n  {command}"


def features_on(case: Case) -> frozenset[str]:
    """Names of the parameters that are not off: "softcap", "float8 kv" and so on; sizes and batches are no features."""
    on = {(name, value) for name, value in traits(case) if BY_NAME[name].off is not None}
    named = (name for name, value in on if value != BY_NAME[name].off and BY_NAME[name].within_key != "free")
    windows = ("sliding_window", "right_window") if case.spec.operation in ATTENTION_OPERATIONS else ()
    # A window is on at any width, also at one that no kind of window is named after.
    named_windows = (name for name in windows if getattr(case.spec, name) is not None)
    return frozenset(_SPOKEN.get(name, name) for name in (*named, *named_windows))


class Findings:
    """The failures so far, one for each operation, outcome, wrong outputs and smallest set of features.

    A failure that has all the features of another of its kind is counted with that one: the features that it has
    more did not make it fail. Which one stays does not depend on the order in which they came.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """With a directory, every finding is written there at once: the case as JSON, the explanation as text."""
        self.directory = directory
        self._found: dict[Kind, list[Finding]] = {}

    def __iter__(self) -> Iterator[Finding]:
        return (finding for found in self._found.values() for finding in found)

    def __len__(self) -> int:
        return sum(len(found) for found in self._found.values())

    @property
    def failures(self) -> int:
        """Failing cases, those that were counted with another included."""
        return sum(finding.count for finding in self)

    def add(self, failure: Failure) -> bool:
        """Count a failure; whether it is new, or replaces larger ones of its kind."""
        found = self._found.setdefault(failure.kind, [])
        for finding in found:
            if finding.failure.features <= failure.features:
                finding.count += 1
                if failure.size >= finding.failure.size:
                    return False
                self._write(finding, failure)
                return True
        covered = [finding for finding in found if failure.features < finding.failure.features]
        found[:] = [finding for finding in found if finding not in covered]
        new = Finding(failure, 1 + sum(finding.count for finding in covered))
        for finding in covered:
            self._remove(finding)
        found.append(new)
        self._write(new, failure)
        return True

    def repeat(self, signature: Signature, count: int) -> None:
        """Count failures that add nothing to a finding which is known already."""
        kind, features = signature
        for finding in self._found.get(kind, ()):
            if finding.failure.features <= features:
                finding.count += count
                return

    def _write(self, finding: Finding, failure: Failure) -> None:
        self._remove(finding)
        finding.failure = failure
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            finding.path = self.directory / f"{failure.name}.json"
            finding.path.with_suffix(".txt").write_text(failure.text + "\n")
            finding.path.write_text(failure.case.to_json())

    def _remove(self, finding: Finding) -> None:
        if finding.path is not None:
            finding.path.unlink(missing_ok=True)
            finding.path.with_suffix(".txt").unlink(missing_ok=True)
            finding.path = None
