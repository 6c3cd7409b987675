"""Every relation between a candidate's own runs finds the bugs that it is there for, with no answer compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.bound.evaluate import evaluate
from pageproof.oracle.building.tensors import build
from pageproof.oracle.candidate import Candidate
from pageproof.oracle.case import BatchShape, Case, Spec
from pageproof.oracle.checks import Finding, Session, ask
from pageproof.oracle.checks.comparison import twice_bounded, within
from pageproof.oracle.execution.eager import run
from pageproof.oracle.judging import judge
from pageproof.oracle.mutants import candidate as mutant
from pageproof.oracle.verdict import Outcome

FLOAT8 = "float8_e4m3fn"
Arguments = dict[str, Any]


def of_rules(**changes: Callable[[Any], Any]) -> Callable[[Arguments], Arguments]:
    """A bug that computes with other rules."""

    def changed(arguments: Arguments) -> Arguments:
        rules = arguments["rules"]
        return {**arguments, "rules": replace(rules, **{name: change(rules) for name, change in changes.items()})}

    return changed


def reads_past_the_end_unless_it_is_nan(arguments: Arguments) -> Arguments:
    batch, k_cache = arguments["batch"], arguments["k_cache"]
    page, offset = batch.block_table[0, batch.seq_lens[0] // 16], batch.seq_lens[0] % 16
    past_the_end = k_cache[page, offset]
    if past_the_end.isnan().any():
        return arguments
    lengths = batch.seq_lens.clone()
    lengths[0] += 1
    return {**arguments, "batch": replace(batch, seq_lens=lengths)}


def second_page_is_the_next_one(arguments: Arguments) -> Arguments:
    batch = arguments["batch"]
    table = batch.block_table.clone()
    table[:, 1] = (table[:, 0] + 1).clamp(0, arguments["k_cache"].shape[0] - 1)
    return {**arguments, "batch": replace(batch, block_table=table)}


def key_16_is_read_as_zeros(arguments: Arguments) -> Arguments:
    pages = arguments["batch"].block_table[:, 1].long()
    pages = pages[(pages >= 0) & (pages < arguments["k_cache"].shape[0])]  # others are not in use
    caches = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    for cache in caches.values():
        cache[pages, 0] = 0
    return {**arguments, **caches}


def tokens_that_come_together_see_each_other(arguments: Arguments) -> Arguments:
    several = (arguments["batch"].cu_seqlens_q.diff() > 1).any()
    return of_rules(causal=lambda rules: not several)(arguments)


def lone_tokens_lose_the_newest_key(arguments: Arguments) -> Arguments:
    batch = arguments["batch"]
    if (batch.cu_seqlens_q.diff() > 1).any():
        return arguments
    return {**arguments, "batch": replace(batch, seq_lens=batch.seq_lens - 1)}


def value_scale_is_dropped(arguments: Arguments) -> Arguments:
    return {**arguments, "scales": replace(arguments["scales"], v=None)}


def key_scale_is_squared(arguments: Arguments) -> Arguments:
    scales = arguments["scales"]
    return {**arguments, "scales": replace(scales, k=scales.k**2)}


def query_heads_are_dealt_out_in_turns(arguments: Arguments) -> Arguments:
    heads = torch.arange(arguments["q"].shape[1]).view(2, -1).T.reshape(-1)
    return {**arguments, "q": arguments["q"][:, heads].contiguous()}


@dataclass
class Spoiled(Reference):
    """The reference on spoiled arguments, or with a spoiled output; `late`: right the first time."""

    before: Callable[[Arguments], Arguments] = dict
    after: Callable[[Arguments], None] = lambda arguments: None
    late: bool = False

    def call(self, operation: str, arguments: Arguments) -> Any:
        right, self.late = self.late, False
        returned = super().call(operation, arguments if right else self.before(arguments))
        if not right:
            self.after(arguments)
        return returned


def last_request_is_forgotten(arguments: Arguments) -> None:
    start = int(arguments["batch"].cu_seqlens_q[-2])
    arguments["out"][start:] = 0


def values_of_masked_keys_leak(arguments: Arguments) -> None:
    values = arguments["v_cache"].float().nan_to_num()
    arguments["out"] += 2.0**-12 * values.sum()


BATCH = BatchShape(query_lens=(1, 3, 1), seq_lens=(40, 35, 20))
PLAIN = Case(spec=Spec(dtype="float32", head_size=32, head_size_v=32), batch=BATCH)
DECODE = PLAIN.with_batch(query_lens=(1, 1, 1))
FLOAT8_KV = PLAIN.with_spec(kv_dtype=FLOAT8, scales="head")

BUGS: dict[str, tuple[str, Case, Arguments]] = {
    "reads past the end unless it is NaN": (
        "interference", DECODE.with_spec(causal=False), {"before": reads_past_the_end_unless_it_is_nan},
    ),
    "window one short": (
        "must_read",
        replace(DECODE, seed=5).with_spec(sliding_window=20),
        {"before": of_rules(sliding_window=lambda rules: rules.sliding_window - 1)},
    ),
    "masked values leak": ("must_read", PLAIN, {"after": values_of_masked_keys_leak}),
    "new tokens see each other": ("sequential", PLAIN, {"before": tokens_that_come_together_see_each_other}),
    "tree mask is ignored": (
        "sequential",
        PLAIN.with_spec(query_bias="tree", bias_width=3).with_batch(query_lens=(1, 6, 1)),
        {"before": of_rules(query_bias=lambda rules: torch.zeros_like(rules.query_bias))},
    ),
    "lone tokens lose the newest key": ("sequential", PLAIN, {"before": lone_tokens_lose_the_newest_key}),
    "a tile's first key is lost": ("key_order", PLAIN, {"before": key_16_is_read_as_zeros}),
    "pages are taken for consecutive": (
        "page_order", replace(PLAIN, poison=""), {"before": second_page_is_the_next_one},
    ),
    "the last request is forgotten": ("request_order", PLAIN, {"after": last_request_is_forgotten}),
    "a page's first key is lost": ("split", PLAIN, {"before": key_16_is_read_as_zeros}),
    "the sink counts twice": (
        "ones", PLAIN.with_spec(sinks=True), {"before": of_rules(sinks=lambda rules: rules.sinks + 0.6931472)},
    ),
    "the value scale is dropped": ("ones", FLOAT8_KV, {"before": value_scale_is_dropped}),
    "the scale is off by 0.2%": (
        "shift", PLAIN, {"before": of_rules(softmax_scale=lambda rules: rules.softmax_scale * 1.002)},
    ),
    "the cap comes before the scale": (
        "rescale",
        PLAIN.with_spec(softcap=2.0),
        {"before": of_rules(softcap=lambda rules: rules.softcap * rules.softmax_scale)},
    ),
    "the key scale is squared": ("rescale", FLOAT8_KV, {"before": key_scale_is_squared}),
    "query heads are dealt out in turns": ("groups", PLAIN, {"before": query_heads_are_dealt_out_in_turns}),
}  # fmt: skip


def session_of(case: Case, candidate: Candidate, device: torch.device | str = "cpu") -> Session:
    problem, contract = build(case, device), candidate.contract(case)
    actual = run(candidate, problem)
    return Session(candidate, contract, problem, actual, evaluate(problem, contract))


def asked(case: Case, candidate: Candidate, device: torch.device | str = "cpu") -> Finding | None:
    """What the check says to a candidate whose answer nobody compared."""
    return ask(session_of(case, candidate, device))


@pytest.mark.parametrize(("share", "found"), [(0.9, False), (1.2, True)])
def test_two_runs_may_be_apart_by_their_bounds_and_no_further(share: float, found: bool) -> None:
    session = session_of(PLAIN, Reference())
    bounds = twice_bounded(session).bounds
    again = {name: (tensor.double() + share * bounds[name]).float() for name, tensor in session.actual.items()}
    assert (within(session, again, "", twice_bounded(session)) is not None) == found


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_that_the_answer_has_too_is_found(bug: str) -> None:
    check, case, spoil = BUGS[bug]
    finding = asked(replace(case, check=check), Spoiled(**spoil))
    assert finding is not None
    assert finding.outcome is Outcome.DIFFERS


# Of several new tokens: a second run that asks for them one by one is right.
ONLY_IN_THE_ANSWER = {"new tokens see each other", "tree mask is ignored"}


@pytest.mark.parametrize("bug", sorted(BUGS.keys() - ONLY_IN_THE_ANSWER))
def test_a_bug_that_only_the_check_shows_is_a_verdict_with_its_name(bug: str) -> None:
    check, case, spoil = BUGS[bug]
    verdict = judge(replace(case, check=check), Spoiled(late=True, **spoil))
    assert (verdict.outcome, verdict.check) == (Outcome.DIFFERS, check)
    assert "furthest at request" in verdict.reason


def test_garbage_that_becomes_nan_is_poison() -> None:
    def overflows(arguments: Arguments) -> None:
        if arguments["k_cache"].nan_to_num().abs().amax() > 1e4:
            arguments["out"][0] = torch.nan

    verdict = judge(replace(PLAIN, check="interference"), Spoiled(after=overflows))
    assert (verdict.outcome, verdict.check) == (Outcome.POISONED, "interference")


def test_parts_that_are_not_weighed_alike_are_found() -> None:
    class FirstPartWins(Reference):
        def call(self, operation: str, arguments: Arguments) -> Any:
            out, lse = super().call(operation, arguments)
            out_a: Tensor = arguments["out_a"]
            return torch.where((arguments["lse_a"] > -torch.inf)[..., None], out_a, out), lse

    case = Case(spec=Spec(operation="merge_states", head_size=32), batch=BATCH, check="swap")
    finding = asked(case, FirstPartWins())
    assert finding is not None
    assert finding.reason.startswith("out:")
    assert "when the parts are swapped" in finding.reason


MUTANTS = {
    "window_edge_skipped": ("must_read", DECODE.with_spec(sliding_window=20)),
    "last_partial_page_dropped": ("key_order", DECODE),
    "rescale_forgotten": ("split", replace(DECODE, recipe="needle")),
    "sink_in_every_split": ("ones", DECODE.with_spec(sinks=True).with_batch(seq_lens=(320, 35, 20))),
    "splits_averaged": ("split", DECODE.with_batch(seq_lens=(320, 290, 20))),
    "heads_interleaved": ("groups", PLAIN.with_batch(query_lens=(20,), seq_lens=(20,))),
    "value_scale_dropped": ("ones", FLOAT8_KV),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_our_kernels_is_found_without_its_answer_being_compared(
    name: str, pageproof_device: torch.device
) -> None:
    check, case = MUTANTS[name]
    assert asked(replace(case, check=check), mutant(name), pageproof_device) is not None
