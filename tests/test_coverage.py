"""What a campaign covered is counted from what was judged, and said in words and as JSON."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from pageproof.optimized import Batch, Capacity, make_plan
from pageproof.optimized.kernels import work_lists
from pageproof.optimized.tuning import plan_limits
from pageproof.oracle import campaign
from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.campaign import Options, Summary, coverage, offers, report
from pageproof.oracle.campaign.covering import Accepts
from pageproof.oracle.campaign.lengths import INTERPRETED
from pageproof.oracle.campaign.offers import make_plan as make_rows
from pageproof.oracle.campaign.pairs import MODEL, PAIRS, Model, feasible
from pageproof.oracle.campaign.parameters import Row
from pageproof.oracle.campaign.tally import Tally, binned
from pageproof.oracle.candidate import plan_of
from pageproof.oracle.case import MODES, BatchShape, Case, Spec

from . import campaign_helpers as helpers

EDGES = [
    (16, 64),
    (17, 65),
    (1, 63),
    (1, 64),
    (1, 65),
    (0, 0),
    (0, 70),
    (33, 33),
    (16, 256),
    (16, 257),
    (20, 3),
    (3, 0),
]


@pytest.fixture(autouse=True)
def _helpers_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def case_of(requests: list[tuple[int, int]], **spec: object) -> Case:
    lengths = BatchShape(query_lens=tuple(n for n, _ in requests), seq_lens=tuple(keys for _, keys in requests))
    return Case(spec=Spec(**spec), batch=lengths)  # type: ignore[arg-type]


def batches() -> Iterator[list[tuple[int, int]]]:
    yield EDGES
    yield [(1, 10), (1, 100_000), (2, 20)]  # the shortest split does not fit, nor do its first doublings
    yield [(16, 2**20), (16, 2**20), (16, 2**20), (16, 2**20), (1, 2**20)]  # no split does
    generator = random.Random(7)
    for _ in range(6):
        keys = [0, 1, 63, 64, 65, 128, 500, 3000]
        yield [
            (generator.choice([0, 1, 2, 16, 17, 40]), generator.choice(keys)) for _ in range(generator.randint(0, 70))
        ]


def test_the_plan_on_the_host_is_the_plan_on_the_device(pageproof_device: torch.device) -> None:
    for requests in batches():
        starts = [0]
        for n, _ in requests:
            starts.append(starts[-1] + n)
        batch = Batch(
            torch.tensor(starts, dtype=torch.int32, device=pageproof_device),
            torch.tensor([keys for _, keys in requests], dtype=torch.int32, device=pageproof_device),
            torch.zeros(len(requests), 1, dtype=torch.int32, device=pageproof_device),
        )
        case = case_of(requests)
        capacity = Capacity(starts[-1], len(requests), 2**21)
        plan = make_plan(batch, capacity, request_programs=case.spec.num_kv_heads)
        counts = plan.counts.tolist()
        said = Ours().plan_of(case)
        for name, place in {
            "prefill_tiles": work_lists.NUM_PREFILL_ITEMS,
            "decode_splits": work_lists.NUM_DECODE_ITEMS,
            "merged_rows": work_lists.NUM_MERGE_ITEMS,
            "partial_rows": work_lists.NUM_PARTIAL_ROWS,
            "most_decode_tokens": work_lists.MOST_DECODE_TOKENS,
        }.items():
            assert said[name] == counts[place.value], (name, requests)
        splits = plan.decode_items[: counts[work_lists.NUM_DECODE_ITEMS.value], work_lists.SPLIT_KEYS.value]
        assert set(splits.tolist()) <= {said["split_keys"]}
        assert said["split_keys"] in (2**30, plan_limits().split_base << said["split_doublings"])


def test_empty_splits_are_those_of_which_no_row_sees_a_key() -> None:
    base = plan_limits().split_base
    for window in (None, 1, 2, base - 1, base, base + 1, 3 * base, 10 * base):
        for n, keys in ((1, 4 * base), (1, 4 * base + 1), (3, 2 * base + 1), (2, base), (5, 3)):
            said = Ours().plan_of(case_of([(n, keys)], sliding_window=window))
            first = 0 if window is None else max(0, keys - n - window + 1)
            splits = [range(start, min(start + base, keys)) for start in range(0, keys, base)]
            empty = sum(not any(key >= first for key in split) for split in splits) if len(splits) > 1 else 0
            assert (said["empty_splits"], said["most_splits"]) == (empty, len(splits)), (window, n, keys)


def test_a_candidate_need_not_say_how_it_launches() -> None:
    assert plan_of(helpers.Fake(), case_of(EDGES)) == {}
    assert plan_of(Ours(), case_of(EDGES, operation="update_kv_cache")) == {}
    assert plan_of(Ours(), case_of(EDGES))["prefill_tiles"] > 0


def test_plans_are_told_apart_by_digits_and_by_the_keys_of_a_split() -> None:
    assert binned({"b": 5, "a": 0}) == binned({"a": 0, "b": 7})
    assert binned({"a": 0}) != binned({"a": 1})
    assert binned({"split_keys": 64}) != binned({"split_keys": 65})


def counted(cases: list[Case], *, triples: bool = False) -> Summary:
    summary = Summary(options=Options(), device="cpu", workers=1, versions={}, seconds=10.0)
    summary.feasible = frozenset(feasible(MODEL, PAIRS))
    for case in cases:
        verdict = helpers.agreeing(case, helpers.Fake(), "cpu")
        summary.tally.add(verdict, MODEL, plan_of(Ours(), case), triples=triples)
    return summary


def test_every_kind_of_coverage_stands_in_the_words_and_in_the_json() -> None:
    cases = [case_of([(1, 64), (17, 90)], block_size=48, sliding_window=3, kv_dtype="float8_e4m3fn")]
    cases += [case_of([(1, 300)], head_size=96, sliding_window=30), case_of([(2, 5)], operation="update_kv_cache")]
    summary = counted(cases)
    words = coverage.lines(summary)
    for line in (
        "operation: attention (2), update_kv_cache (1)",
        "float8: kv (1)",
        "block_size: 16 (2), 48 (1)",
        "head_size: 64 (2), 96 (1)",
        "compile keys: attention (2), update_kv_cache (1)",
        "launch plans: 2 distinct, with decode_splits (2), empty_splits (1), merged_rows (1), most_decode_tokens (2), ",
    ):
        assert f"\n{line}" in f"\n{words}", line
    assert f"NOT ALL PAIRS of features were covered: {len(summary.pairs_missing):,} are missing, such as (" in words
    assert "triples" not in words
    body = json.loads(report.to_json(summary))
    assert body["pairs"]["covered"] + len(body["pairs"]["missing"]) == body["pairs"]["feasible"]
    assert body["values"]["block_size"] == {"16": 2, "48": 1}
    assert body["events"]["cases"]["one new token"] == 2
    assert body["events"]["covered"] == sum(cases > 0 for cases in body["events"]["cases"].values())
    assert body["event_pairs"]["covered"] + len(body["event_pairs"]["missing"]) == body["event_pairs"]["reachable"]
    assert ["seq_len % 64 = 0", "context % page = -1"] in body["event_pairs"]["missing"]
    assert body["compile_keys"] == {"all": 3, "by_operation": {"attention": 2, "update_kv_cache": 1}}
    assert body["plans"]["distinct"] == 2
    digits = Counter(str(plan_of(Ours(), case)["empty_splits"].bit_length()) for case in cases[:2])
    assert len(digits) == 2
    assert body["plans"]["cases"]["empty_splits"] == digits


def test_events_of_splits_are_asked_for_only_of_a_candidate_that_says_where_it_splits() -> None:
    split_keys = plan_of(Ours(), case_of([(1, 64)]))["split_keys"]
    with_plan = counted([case_of([(1, split_keys)])])
    without = Summary(options=Options(), device="cpu", workers=1, versions={})
    without.tally.add(helpers.agreeing(case_of([(1, 64)]), helpers.Fake(), "cpu"), MODEL)
    asked = [any("split" in name for name in summary.reachable.events) for summary in (with_plan, without)]
    assert asked == [True, False]
    assert with_plan.tally.events.cases["seq_len % split = 0"] == 1


def test_triples_are_counted_when_they_are_asked_for() -> None:
    case = case_of([(1, 64)], alibi=True, sinks=True)
    assert counted([case]).tally.triples.seen == {}
    summary = counted([case], triples=True)
    triple = frozenset({("alibi", True), ("sinks", True), ("causal", True)})
    other = frozenset({("alibi", True), ("sinks", True), ("causal", False)})
    summary.feasible_triples = frozenset({triple, other})
    assert summary.triples_covered == 1
    assert "\ntriples of features 1/2\n" in coverage.lines(summary)


def test_tallies_of_several_processes_add_up_with_everything_they_count() -> None:
    cases = [case_of([(1, 16 * n), (n, 40)], sinks=n % 2 == 0, sliding_window=n) for n in range(1, 12)]
    whole, parts = Tally(), [Tally(), Tally()]
    for index, case in enumerate(cases):
        for tally in (whole, parts[index % 2]):
            verdict = helpers.agreeing(case, helpers.Fake(), "cpu")
            tally.add(verdict, MODEL, plan_of(Ours(), case), triples=True)
    parts[1].merge(parts[0])
    assert parts[1] == whole
    assert whole.plans
    assert whole.triples.seen


def test_nightly_rows_follow_those_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[Row]] = []

    def more(model: Model, seed: int, rows: Sequence[Row], accepts: Accepts) -> list[Row]:
        modes = {("mode", name) for name in MODES[1:]}  # the helper names none
        assert model.banned == {("q_dtype", "float8_e4m3fn"), *modes}
        asked.append(tuple(rows))
        return [rows[3]]

    pairs = make_rows(helpers.Picky(), 4, INTERPRETED)
    monkeypatch.setattr(offers, "more_rows_for_triples", more)
    assert make_rows(helpers.Picky(), 4, INTERPRETED) == pairs
    nightly = make_rows(helpers.Picky(), 4, INTERPRETED, nightly=True)
    assert asked == [pairs.rows]
    assert nightly.rows == (*pairs.rows, pairs.rows[3])


def test_a_pair_whose_cases_were_declined_gets_another_row(tmp_path: Path) -> None:
    """The helper declines by the seed, which no row can know: what was missed on the way is made up for."""
    options = Options(
        target="campaign_helpers:Fake",
        judge="campaign_helpers:declining_at_random",
        device="cpu",
        seconds=120.0,
        workers=2,
        cases=600,
        findings=tmp_path / "findings",
    )
    summary = campaign.run(options)
    assert sum(summary.tally.declined.values()) > 20
    assert summary.rows > len(make_rows(helpers.Fake(), 0, INTERPRETED).rows)
    assert len(summary.pairs_missing) < 20
