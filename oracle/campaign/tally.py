"""What a campaign has counted; adds up across workers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..case import FLOAT8, Case, Spec
from ..verdict import Outcome, Verdict
from .event_pairs import EventCounter
from .events import NONE
from .pairs import TRIPLES, Model, Trait, TupleCounter
from .parameters import BY_NAME
from .spread import bin_of
from .traits import LONG, compile_key, traits, visible_keys

Label = tuple[str, str]  # number formats, output (or what it is held to: "out row z")
LaunchPlan = tuple[tuple[str, int], ...]  # a candidate's `plan_of`, counts as their number of binary digits

# What a summary lists with every value that occurred, beside the features and their named values.
LISTED = ("operation", "dtype", "cache_layout", "num_kv_heads", "group_size", "block_size")


@dataclass
class Tally:
    """Counts over judged cases. A case that was declined, or could not be judged, counts by its reason only."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    declined: Counter[str] = field(default_factory=Counter)  # reason -> cases
    not_judged: Counter[str] = field(default_factory=Counter)  # reason -> cases
    features: Counter[Trait] = field(default_factory=Counter)
    values: Counter[tuple[str, str | int]] = field(default_factory=Counter)  # (what, any value that it had) -> cases
    pairs: TupleCounter = field(default_factory=TupleCounter)
    triples: TupleCounter = field(default_factory=lambda: TupleCounter(TRIPLES))  # empty unless asked for
    events: EventCounter = field(default_factory=EventCounter)
    plans: Counter[LaunchPlan] = field(default_factory=Counter)  # of candidates that say how they lay out launches
    keys: set[Spec] = field(default_factory=set)  # compile keys
    tokens: Counter[int] = field(default_factory=Counter)  # tokens of a case -> cases
    visible: Counter[int] = field(default_factory=Counter)  # keys that one token of a case sees at most -> cases
    ran: Counter[tuple[str, str]] = field(default_factory=Counter)  # (mode, "replays" ...) -> how many, really
    worst: dict[Label, tuple[float, Case]] = field(default_factory=dict)  # largest observed/bound of what agrees
    spread: dict[Label, Counter[int]] = field(default_factory=dict)  # bin of a case's largest (`spread`) -> cases

    def add(
        self, verdict: Verdict, model: Model, plan: Mapping[str, int] | None = None, *, triples: bool = False
    ) -> None:
        """Count a verdict. `plan`: the candidate's plan of the case; `triples`: count those too, which takes longer."""
        if verdict.outcome is Outcome.DECLINED:
            self.declined[verdict.reason] += 1
            return
        if verdict.outcome is Outcome.NOT_JUDGED:
            self.not_judged[verdict.reason] += 1
            return
        case = verdict.case
        found = traits(case)
        self.cases += 1
        self.outcomes[verdict.outcome.value] += 1
        self.features.update(found)
        self.values.update(listed_values(case))
        mask = model.mask(found)
        self.pairs.add(mask)
        if triples:
            self.triples.add(mask)
        self.events.add(case, (plan or {}).get("split_keys", NONE))
        if plan:
            self.plans[binned(plan)] += 1
        self.keys.add(compile_key(case.spec))
        self.tokens[case.batch.num_tokens] += 1
        self.visible[visible_keys(case)] += 1
        self.ran.update({(case.mode, what): times for what, times in verdict.counts})
        if verdict.outcome is Outcome.AGREES:
            for output, ratio in verdict.ratios:
                label = formats(case.spec), output
                self._raise(label, ratio, case)
                if math.isfinite(ratio):
                    self.spread.setdefault(label, Counter())[bin_of(ratio)] += 1

    def merge(self, other: Tally) -> None:
        self.cases += other.cases
        for name in ("outcomes", "declined", "not_judged", "features", "values", "plans", "tokens", "visible", "ran"):
            getattr(self, name).update(getattr(other, name))
        self.pairs.merge(other.pairs)
        self.triples.merge(other.triples)
        self.events.merge(other.events)
        self.keys |= other.keys
        for label, (ratio, case) in other.worst.items():
            self._raise(label, ratio, case)
        for label, bins in other.spread.items():
            self.spread.setdefault(label, Counter()).update(bins)

    def _raise(self, label: Label, ratio: float, case: Case) -> None:
        held = self.worst.get(label)
        # Of equal ones the first by its JSON, so that the order in which workers report does not matter.
        better = held is None or ratio > held[0] or (ratio == held[0] and case.to_json() < held[1].to_json())
        if math.isfinite(ratio) and better:
            self.worst[label] = ratio, case

    @property
    def long_share(self) -> float:
        """Of the judged cases, those with a token that sees `LONG` keys or more."""
        return sum(count for keys, count in self.visible.items() if keys >= LONG) / max(1, self.cases)

    def worst_of(self, output: str) -> tuple[float, str]:
        """(largest observed/bound, its number formats) of an output; (0.0, "") if there is none."""
        found = [(ratio, label) for (label, name), (ratio, _) in self.worst.items() if name == output]
        return max(found, default=(0.0, ""))


def median(counts: Counter[int]) -> int:
    """The lower median of what was counted; 0 of nothing."""
    half, seen = (sum(counts.values()) + 1) // 2, 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return value
    return 0


def listed_values(case: Case) -> list[tuple[str, str | int]]:
    """(what, value) of everything that a summary lists by value."""
    spec = case.spec
    listed = (name for name in LISTED if spec.operation in BY_NAME[name].operations)
    values: list[tuple[str, str | int]] = [(name, getattr(spec, name)) for name in listed]
    values += [(name, dtype) for name in ("q_dtype", "kv_dtype", "out_dtype") if (dtype := getattr(spec, name))]
    rope = f"+{spec.rope_head_size}" if spec.is_mla else ""
    values += [("head_size", f"{spec.head_size}{rope}"), ("head_size_v", spec.head_size_v)]
    return [*values, ("recipe", case.recipe), ("check", case.check), ("mode", case.mode)]


def binned(plan: Mapping[str, int]) -> LaunchPlan:
    """The plan with counts as their number of binary digits; a split's keys are few and stay as they are."""
    return tuple((name, value if name == "split_keys" else value.bit_length()) for name, value in sorted(plan.items()))


def formats(spec: Spec) -> str:
    """The number formats under which worst ratios are kept apart: the coarsest float8 tensor names them."""
    if spec.out_dtype == FLOAT8:
        return "float8 out"
    if spec.q_dtype == FLOAT8:
        return f"{spec.dtype}, float8 q and kv"
    return f"{spec.dtype}, float8 kv" if spec.kv_dtype == FLOAT8 else spec.dtype
