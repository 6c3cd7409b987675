"""Cases that failed in earlier campaigns: judged again before any case is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..case import Case
from ..case_rules import why_invalid
from ..verdict import Verdict
from .findings import ORIGINAL
from .lengths import sizes_for, total_work

LARGEST_WORK = 32  # times the largest case that is drawn here: what failed on a GPU may be hours for an interpreter


@dataclass(kw_only=True)
class Past:
    """The cases of earlier campaigns, and what has become of them."""

    files: dict[Case, Path] = field(default_factory=dict)
    left_out: list[Path] = field(default_factory=list)  # too large for this device, or not a case any more
    failing: list[Path] = field(default_factory=list)
    passing: list[Path] = field(default_factory=list)  # they agree now, or are declined

    @staticmethod
    def load(directory: Path, device: str) -> Past:
        """What lies in the directory; nothing if there is none."""
        past = Past()
        for path in sorted(directory.glob("*.json")):
            if path.name.endswith(ORIGINAL) or path.name.startswith("inflight-"):
                continue
            case = _read(path)
            if case is None or not _affordable(case, device):
                past.left_out.append(path)
            else:
                past.files.setdefault(case, path)
        return past

    def note(self, verdict: Verdict) -> None:
        """What the verdict on one of the cases was; of one that could not be judged nothing is known."""
        if verdict.failed:
            self.failing.append(self.files[verdict.case])
        elif verdict.outcome != "not-judged":
            self.passing.append(self.files[verdict.case])

    def line(self) -> str:
        """In words; "" where there was nothing."""
        if not self.files and not self.left_out:
            return ""
        judged = len(self.failing) + len(self.passing)
        parts = [f"{len(self.failing):,} of {judged:,} past findings fail, {len(self.passing):,} no longer"]
        if len(self.files) > judged:
            parts.append(f"{len(self.files) - judged:,} not reached")
        if self.left_out:
            parts.append(f"{len(self.left_out):,} left out, too large for this device or not a case any more")
        return "; ".join(parts)


def _read(path: Path) -> Case | None:
    try:
        case = Case.from_json(path.read_text())
        return case if why_invalid(case) is None else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _affordable(case: Case, device: str) -> bool:
    if device == "cpu" and case.spec.far_pages:
        return False
    sizes = sizes_for(device)
    return total_work(case.spec, case.batch, sizes) <= LARGEST_WORK * max(sizes.work)
