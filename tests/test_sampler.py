"""Cases are valid, have what their row says, lean to boundaries, and are the same for the same seed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from pageproof.oracle.campaign.covering import covering_array
from pageproof.oracle.campaign.lengths import COMPILED, INTERPRETED, Batches, Sizes, total_work
from pageproof.oracle.campaign.pairs import MODEL, Model
from pageproof.oracle.campaign.parameters import NOT_APPLICABLE, PARAMETERS
from pageproof.oracle.campaign.sampler import Group, made_up_group, random_group, row_group
from pageproof.oracle.campaign.traits import compile_key, traits, visible_keys
from pageproof.oracle.case import ATTENTION_OPERATIONS, FLOAT8, BatchShape, Case, Spec
from pageproof.oracle.case_rules import why_invalid

WIDE = Model(extra=True)
SIZES = [pytest.param(INTERPRETED, id="interpreted"), pytest.param(COMPILED, id="compiled")]


def drawn(sizes: Sizes, groups: int, seed: int = 5) -> list[Case]:
    return [case for index in range(groups) for case in random_group(seed, index, sizes).cases(WIDE, sizes)]


@pytest.fixture(scope="module")
def interpreted() -> list[Case]:
    return drawn(INTERPRETED, 700)


@pytest.fixture(scope="module")
def compiled() -> list[Case]:
    return drawn(replace(COMPILED, cases_per_key=12), 200)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_case_has_every_value_of_its_row(sizes: Sizes) -> None:
    for index, row in enumerate(covering_array(MODEL, seed=0)):
        wanted = {(name, value) for name, value in row.items() if value != NOT_APPLICABLE}
        for case in row_group(index, index, row, replace(sizes, cases_per_row=4)).cases(WIDE, sizes):
            assert why_invalid(case) is None
            assert wanted <= traits(case), f"{wanted - traits(case)} of {case}"


def test_random_cases_are_valid(interpreted: list[Case], compiled: list[Case]) -> None:
    assert [why_invalid(case) for case in interpreted + compiled] == [None] * len(interpreted + compiled)


def test_no_two_random_cases_are_alike(interpreted: list[Case], compiled: list[Case]) -> None:
    for cases in (interpreted, compiled):
        assert len({case.to_json() for case in cases}) == len(cases)


def test_random_cases_reach_every_value(interpreted: list[Case], compiled: list[Case]) -> None:
    for cases in (interpreted, compiled):
        seen = {trait for case in cases for trait in traits(case)}
        assert {(p.name, value) for p in PARAMETERS for value in p.values} <= seen


def test_a_feature_is_on_in_about_half_of_the_cases(interpreted: list[Case]) -> None:
    specs = [case.spec for case in interpreted if case.spec.operation in ATTENTION_OPERATIONS]
    for is_on in (
        lambda spec: spec.sliding_window is not None,
        lambda spec: spec.softcap is not None,
        lambda spec: spec.alibi,
        lambda spec: spec.sinks,
        lambda spec: spec.query_bias != "none",
        lambda spec: not spec.causal,
    ):
        assert 0.4 < sum(map(is_on, specs)) / len(specs) < 0.6


def test_cases_of_a_group_share_their_compile_key() -> None:
    for index in range(40):
        cases = list(random_group(1, index, replace(COMPILED, cases_per_key=10)).cases(WIDE, COMPILED))
        assert len(cases) == 10
        assert len({compile_key(case.spec) for case in cases}) == 1
        assert len({case.batch for case in cases}) > 1


def test_the_same_seed_and_index_give_the_same_cases() -> None:
    group = random_group(7, 3, INTERPRETED)
    assert list(group.cases(WIDE, INTERPRETED)) == list(group.cases(WIDE, INTERPRETED))
    for other in (replace(group, index=4), replace(group, seed=8)):
        assert list(group.cases(WIDE, INTERPRETED)) != list(other.cases(WIDE, INTERPRETED))


def test_a_group_cut_short_has_the_first_cases_of_the_whole() -> None:
    group = random_group(7, 3, COMPILED)
    whole = list(replace(group, count=9).cases(WIDE, COMPILED))
    assert list(replace(group, count=4).cases(WIDE, COMPILED)) == whole[:4]


def test_given_cases_are_left_as_they_are(interpreted: list[Case]) -> None:
    group = Group(seed=0, index=0, given=tuple(interpreted[:3]), count=3)
    assert list(group.cases(WIDE, INTERPRETED)) == interpreted[:3]


def test_values_that_the_target_declines_are_left_out() -> None:
    banned = frozenset({("dtype", "float32"), ("operation", "merge_states"), ("block_size", 128)})
    model = Model(extra=True, banned=banned)
    cases = [case for index in range(200) for case in random_group(0, index, INTERPRETED).cases(model, INTERPRETED)]
    assert all(case.spec.dtype != "float32" and case.spec.operation != "merge_states" for case in cases)
    assert all(case.spec.block_size != 128 for case in cases if case.spec.operation != "merge_states")


def test_a_quarter_of_the_compiled_cases_is_long(compiled: list[Case]) -> None:
    share = sum(visible_keys(case) >= 1024 for case in compiled) / len(compiled)
    assert 0.25 < share < 0.5
    assert max(max(case.batch.seq_lens, default=0) for case in compiled) > 32000


def test_cases_keep_to_their_sizes(interpreted: list[Case], compiled: list[Case]) -> None:
    for cases, sizes in ((interpreted, INTERPRETED), (compiled, COMPILED)):
        for case in cases:
            assert total_work(case.spec, case.batch, sizes) <= 2 * max(sizes.work)
    assert sorted(case.batch.num_tokens for case in interpreted)[len(interpreted) // 2] <= 24
    assert all(case.batch.num_tokens <= 2100 or case.batch.num_requests >= 65535 for case in compiled)


def test_pages_far_apart_are_drawn_on_a_gpu_only_and_not_in_four_bytes() -> None:
    far = [case for case in drawn(replace(COMPILED, far_share=1.0, cases_per_key=1), 60) if case.spec.far_pages]
    assert far
    assert all(case.spec.kv_dtype or case.spec.dtype != "float32" for case in far)
    assert not any(case.spec.far_pages for case in drawn(INTERPRETED, 60))


@pytest.mark.parametrize(
    ("sizes", "longest"), [(INTERPRETED, 1024), (COMPILED, 131072)], ids=["interpreted", "compiled"]
)
def test_extremes_are_nothing_one_and_very_many(sizes: Sizes, longest: int) -> None:
    spec = Spec(num_kv_heads=1, group_size=2)
    for seed in range(20):
        requests = Batches(spec, sizes, random.Random(seed)).draw("extremes")
        assert {0, 1, longest} == {length for _, length in requests}
        assert (0, 0) in requests


def test_crowds_are_more_than_sixteen_bits_count_and_of_few_heads() -> None:
    sizes = replace(COMPILED, crowd_share=1.0)
    for seed in range(4):
        for holders in (0, 1, 2):
            small = Batches(Spec(), sizes, random.Random(seed), floor=9, holders=holders).draw("decode")
            assert 65535 <= len(small) <= 70000
            assert sum(length >= 9 for _, length in small) == holders
        assert len(Batches(Spec(group_size=8), sizes, random.Random(seed)).draw("decode")) <= 300
    assert not any(case.batch.num_requests > 300 for case in drawn(INTERPRETED, 100))


def test_pages_repeat_and_pools_are_tight_and_requests_stand_alone(interpreted: list[Case]) -> None:
    cases = [case for case in interpreted if case.spec.operation in ATTENTION_OPERATIONS]
    assert 0.15 < sum(case.batch.repeated_blocks for case in cases) / len(cases) < 0.6
    assert 0.3 < sum(not case.batch.spare_blocks for case in cases) / len(cases) < 0.6
    alone = [case for case in cases if case.batch.num_tokens == case.batch.num_requests == 1]
    assert len(alone) > len(cases) // 100


def test_lengths_lean_to_boundaries(interpreted: list[Case]) -> None:
    """A request ending at its window's edge, drawn evenly, comes once in ten thousand cases."""
    events: Counter[str] = Counter()
    windowed = [case for case in interpreted if case.spec.sliding_window is not None]
    for case in windowed:
        page, window = case.spec.block_size, case.spec.sliding_window
        assert window is not None
        lengths = [length for length in case.batch.seq_lens if length]
        events["window"] += any(length in (window, window + 1) for length in lengths)
        events["page"] += page > 4 and any(length % page in (0, 1, page - 1) for length in lengths)
    assert events["window"] > len(windowed) // 10
    assert events["page"] > len(windowed) // 3


def brute_visible_keys(case: Case) -> int:
    spec, most = case.spec, 0
    for n, length in zip(case.batch.query_lens, case.batch.seq_lens, strict=True):
        for position in range(length - n, length):
            seen = [
                key
                for key in range(length)
                if (not spec.causal or key <= position)
                and (spec.sliding_window is None or position - key < spec.sliding_window)
                and (spec.right_window is None or key - position <= spec.right_window)
            ]
            most = max(most, len(seen))
    return most


def test_visible_keys_are_those_that_the_rules_let_be_seen() -> None:
    generator = random.Random(0)
    for _ in range(600):
        causal = generator.random() < 0.5
        spec = Spec(
            causal=causal,
            sliding_window=generator.choice((None, 1, 2, 5, 12, 40)),
            right_window=None if causal else generator.choice((None, 0, 1, 4, 30)),
        )
        lengths = [(generator.randint(0, 6), generator.randint(0, 20)) for _ in range(generator.randint(0, 2))]
        batch = BatchShape(query_lens=tuple(n for n, _ in lengths), seq_lens=tuple(length for _, length in lengths))
        case = Case(spec=spec, batch=batch)
        assert visible_keys(case) == brute_visible_keys(case), case


def test_a_number_has_every_name_that_fits() -> None:
    case = Case(spec=Spec(block_size=1, sliding_window=2), batch=BatchShape(query_lens=(1,), seq_lens=(2,)))
    found = {value for name, value in traits(case) if name == "sliding_window"}
    assert found == {"2", "page+1", "longest"}


def test_what_only_a_kernel_takes_as_data_does_not_change_the_compile_key() -> None:
    spec = Spec(sliding_window=5, softcap=30.0, query_bias="tree", bias_width=3)
    same = replace(spec, sliding_window=900, softcap=2.0, query_bias="dense", bias_width=8)
    assert compile_key(spec) == compile_key(same)
    for other in (replace(spec, sliding_window=None), replace(spec, softcap=None), replace(spec, head_size=128)):
        assert compile_key(other) != compile_key(spec)


def test_a_pair_that_what_is_declined_leaves_no_row_for_is_not_made_up() -> None:
    pair = frozenset({("kv_dtype", "same"), ("scales", "head")})
    group = made_up_group(0, 5, pair, frozenset(), COMPILED)
    assert group is not None
    assert pair <= frozenset(group.row or ())
    assert made_up_group(0, 5, pair, frozenset({("out_dtype", FLOAT8)}), COMPILED) is None
