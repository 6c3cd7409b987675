"""What a campaign is asked for, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..case import MODES, Case
from ..verdict import Verdict
from .event_pairs import Reachable, reachable
from .events import NONE
from .findings import Findings
from .lengths import SPLITS, sizes_for
from .pairs import MODEL, Trait, Values
from .parameters import BY_NAME
from .past import Past
from .tally import Tally

JUDGE = "pageproof.oracle.judging:judge"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run. With `given`, those cases and no others, one worker, no time limit but that of each case."""

    target: str = "ours"
    device: str | None = None  # "cpu", "cuda", or None: a GPU where there is one
    seconds: float = 60.0  # of wall clock, starting the workers included
    seed: int = 0
    workers: int | None = None
    cases: int | None = None  # stop after so many
    findings: Path = Path("findings")
    nightly: bool = False  # cover all triples of features, not only all pairs
    modes: tuple[str, ...] = MODES  # the execution modes of drawn cases, as far as the target offers them
    past: Path | None = None  # where the failing cases of earlier campaigns are, to begin with; None: in `findings`
    shrink_seconds: float = 60.0  # for making findings small, after the last case was drawn; 0: not at all
    case_seconds: float = 180.0  # after which a case counts as timed out; compiling its kernels is included
    given: tuple[Case, ...] = ()
    judge: str = JUDGE  # module:function, called as judge(case, candidate, device) -> Verdict


@dataclass(kw_only=True)
class Summary:
    """Where a campaign stands, or what it came to."""

    options: Options
    device: str
    workers: int
    versions: dict[str, str]
    candidate: str = ""  # the target's name for itself, once a worker has said it
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    findings: Findings = field(default_factory=Findings)
    past: Past = field(default_factory=Past)
    trials: int = 0  # cases judged to make findings small, which count nowhere else
    verdicts: list[Verdict] = field(default_factory=list)  # of the cases that were given
    rows: int = 0  # of the covering array
    feasible: frozenset[Values] = frozenset()
    feasible_triples: frozenset[Values] = frozenset()  # empty unless the campaign covers triples
    banned: frozenset[Trait] = frozenset()  # values of which the target accepted none
    left_out: frozenset[Trait] = frozenset()  # execution modes that were not asked for, or are not offered
    rows_done: tuple[float, int] | None = None  # seconds and cases when the last row's group had been handed out
    abandoned: int = 0  # groups left because they cost too many workers
    interrupted: bool = False
    broken: str = ""  # why the campaign could not go on, if it could not

    @property
    def no_rows(self) -> frozenset[Trait]:
        """Values that no row has."""
        return self.banned | self.left_out

    @property
    def modes(self) -> tuple[str, ...]:
        """The execution modes that were asked for and are offered, once the rows are planned."""
        return tuple(mode for mode in self.options.modes if ("mode", mode) not in self.left_out)

    @property
    def pairs_covered(self) -> int:
        """Feasible pairs that some judged case had."""
        return self.tally.pairs.covered(MODEL, self.feasible)

    @property
    def pairs_missing(self) -> list[Values]:
        """Feasible pairs that no judged case had."""
        return self.tally.pairs.missing(MODEL, self.feasible)

    @property
    def triples_covered(self) -> int:
        """Feasible triples that some judged case had; 0 unless the campaign counts them."""
        return self.tally.triples.covered(MODEL, self.feasible_triples)

    @property
    def reachable(self) -> Reachable:
        """The boundary events that cases on this device can have; enumerated on first use, in a second or so."""
        sizes, block_size = sizes_for(self.device), BY_NAME["block_size"]
        pages = {int(value) for value in (*block_size.values, *block_size.extra)}
        keys = max(sizes.keys, 2 * max(SPLITS) + 1)  # of a request that is long for the sake of its splits
        splits = [size for plan in self.tally.plans for name, size in plan if name == "split_keys"]
        return reachable(tuple(sorted(pages)), sizes.tokens, keys, min(splits, default=NONE))

    @property
    def rate(self) -> float:
        """Judged cases per second of wall clock."""
        return self.tally.cases / self.seconds if self.seconds else 0.0

    @property
    def steady_rate(self) -> float | None:
        """The same after the rows of the covering array, each of which compiles kernels of its own."""
        if self.rows_done is None or self.seconds - self.rows_done[0] < 1.0:
            return None
        return (self.tally.cases - self.rows_done[1]) / (self.seconds - self.rows_done[0])
