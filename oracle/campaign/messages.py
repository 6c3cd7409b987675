"""What a campaign and its worker processes say to each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..case import MODES, Case
from ..verdict import Verdict
from .findings import Failure, Signature
from .offers import Plan
from .pairs import Trait
from .sampler import Group
from .tally import Tally


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker is told once."""

    number: int
    target: str
    device: str
    judge: str  # module:function
    inflight: Path
    nightly: bool = False  # triples of features as well as pairs
    modes: tuple[str, ...] = MODES


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Work out which rows the campaign starts with; needs the candidate, which only workers have."""

    seed: int


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A group, or what is left of it after a worker died in it."""

    group: Group
    start: int = 0
    skip: frozenset[int] = frozenset()  # positions from there on that were judged, or killed a worker
    deaths: int = 0  # of workers, in this group
    banned: frozenset[Trait] = frozenset()
    stop_at: float = float("inf")  # time.monotonic(), which all processes share
    suspect: Verdict | None = None  # of the case over which a worker died, or of one that still ran beside it


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A smaller case of a finding: is it still the same failure?"""

    number: int  # of the finding
    case: Case


@dataclass(frozen=True, kw_only=True)
class Tried:
    verdict: Verdict
    lost: bool  # the device: the process ends after this


@dataclass(frozen=True, kw_only=True)
class Ready:
    candidate: str  # its name
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The worker cannot work at all: no such target, no such device, or a fault of the oracle's outside of a case."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Planned:
    plan: Plan


@dataclass(kw_only=True)
class Report:
    """What was judged since the last report, up to a position of the group."""

    position: int
    ahead: frozenset[int] = frozenset()  # positions beyond it that were judged as well
    tally: Tally = field(default_factory=Tally)
    failures: list[Failure] = field(default_factory=list)  # new ones of drawn cases, or smaller ones of their kind
    repeats: Counter[Signature] = field(default_factory=Counter)  # more of what was reported before
    verdicts: list[Verdict] = field(default_factory=list)  # where the group was given, not drawn
    done: bool = False  # with the group
    lost: bool = False  # the device: the process ends after this report
    suspect: Verdict | None = None  # of the case over which it was, or of one that still ran beside it: not counted
