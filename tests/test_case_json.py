"""A case is its JSON: the same both ways, short where it is plain, refused where it is not understood."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pageproof.oracle.case import FLOAT8, SCHEMA, WIDTH, BatchShape, Case, Spec
from pageproof.oracle.case_rules import why_invalid

FULL = Case(
    spec=Spec(
        operation="attention",
        dtype="float16",
        q_dtype=FLOAT8,
        kv_dtype=FLOAT8,
        out_dtype=FLOAT8,
        scales="head",
        num_kv_heads=3,
        group_size=7,
        head_size=80,
        head_size_v=96,
        block_size=24,
        cache_layout="HND",
        odd_strides=True,
        causal=False,
        sliding_window=33,
        right_window=0,
        softcap=30.0,
        alibi=True,
        sinks=True,
        query_bias="tree",
        bias_width=5,
    ),
    batch=BatchShape(query_lens=(1, 7, 0), seq_lens=(40, 7, 0), padding_tokens=3, table_slack=2, shared_blocks=1),
    recipe="needle",
    poison="abd",
    seed=2**40 + 1,
)


def test_a_full_case_comes_back() -> None:
    assert why_invalid(FULL) is None
    assert Case.from_json(FULL.to_json()) == FULL


def test_a_plain_case_is_nothing_but_its_schema() -> None:
    assert json.loads(Case().to_json()) == {"schema": SCHEMA}
    assert Case.from_json(Case().to_json()) == Case()


def test_only_what_is_not_plain_is_written() -> None:
    body = json.loads(Case().with_spec(softcap=2.0).with_batch(query_lens=(2,), seq_lens=(5,)).to_json())
    assert body == {"schema": SCHEMA, "spec": {"softcap": 2.0}, "batch": {"query_lens": [2], "seq_lens": [5]}}


MANY = FULL.with_batch(query_lens=(1,) * 300, seq_lens=tuple(range(1, 301)))


@pytest.mark.parametrize("case", [Case(), FULL, MANY], ids=["plain", "full", "many requests"])
def test_lines_are_short_and_the_same_every_time(case: Case) -> None:
    text = case.to_json()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert Case.from_json(text) == case
    assert Case.from_json(text).to_json() == text


def test_what_fits_on_a_line_stays_on_it() -> None:
    """A part is broken only where it is too long, and then as few times as will do."""
    assert Case().with_batch(query_lens=(1,) * 8, seq_lens=(9,) * 8).to_json() == (
        '{\n  "schema": 1,\n'
        '  "batch": {"query_lens": [1, 1, 1, 1, 1, 1, 1, 1], "seq_lens": [9, 9, 9, 9, 9, 9, 9, 9]}\n}\n'
    )
    assert len(FULL.to_json().splitlines()) == 17
    numbers = [line for line in MANY.to_json().splitlines() if line.startswith(" " * 6)]
    assert all(len(line) > WIDTH - 6 for line in numbers if line.endswith(","))


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_a_line_is_as_long_as_allowed_and_no_longer(spare: int) -> None:
    """Around the limit, where the comma at its end decides."""
    length = WIDTH - len('  "recipe": "",') - spare
    text = replace(Case(), recipe="x" * length, seed=1).to_json()
    assert max(map(len, text.splitlines())) == WIDTH - spare
    lists = [Case().with_batch(query_lens=(1,) * count).to_json() for count in range(20, 40)]
    assert max(len(line) for text in lists for line in text.splitlines()) in (WIDTH - 2, WIDTH - 1, WIDTH)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "schema"),
        ("{}", "schema: found None"),
        ('{"schema": 99}', "schema: found 99"),
        ('{"schema": 1, "sped": {}}', "sped"),
        ('{"schema": 1, "spec": {"sliding_windw": 3}}', "sliding_windw"),
        ('{"schema": 1, "batch": {"lens": [3]}}', "lens"),
    ],
)
def test_json_that_is_not_understood_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Case.from_json(text)


MLA = Case(spec=Spec(operation="mla_attention", num_kv_heads=1, head_size=64, rope_head_size=16))

INVALID = [
    (Case().with_spec(operation="atention"), "operation"),
    (Case().with_spec(dtype="float64"), "dtype"),
    (Case().with_spec(kv_dtype="float8_e5m2"), "kv_dtype"),
    (Case().with_spec(scales="token"), "scales"),
    (replace(Case(), recipe="censuss"), "recipe"),
    (replace(Case(), poison="ba"), "poison"),
    (replace(Case(), poison="aa"), "poison"),
    (replace(Case(), poison="ax"), "poison"),
    (replace(Case(), mode="graph"), "mode"),
    (replace(Case(), mode="full", check="repeat"), "check"),
    (replace(Case(), mode="full").with_spec(far_pages=True), "mode"),
    (replace(Case(), replays=0), "replays"),
    (replace(Case(), seed=-1), "seed"),
    (Case().with_spec(head_size=0), "head_size"),
    (Case().with_spec(block_size=0), "block_size"),
    (Case().with_spec(group_size=2.0), "group_size"),
    (Case().with_spec(q_dtype=FLOAT8), "q_dtype"),
    (Case().with_spec(operation="update_kv_cache", q_dtype=FLOAT8, kv_dtype=FLOAT8), "q_dtype"),
    (Case().with_spec(operation="update_kv_cache", out_dtype=FLOAT8), "out_dtype"),
    (Case().with_spec(operation="merge_states", kv_dtype=FLOAT8), "kv_dtype"),
    (Case().with_spec(scales="tensor"), "scales"),
    (MLA.with_spec(num_kv_heads=2), "num_kv_heads"),
    (MLA.with_spec(cache_layout="HND"), "cache_layout"),
    (MLA.with_spec(rope_head_size=0), "rope_head_size"),
    (MLA.with_spec(operation="mla_attention_decompressed"), "nope_head_size"),
    (Case().with_spec(sliding_window=0), "sliding_window"),
    (Case().with_spec(right_window=-1, causal=False), "right_window"),
    (Case().with_spec(right_window=1), "right_window: only without causal"),
    (Case().with_spec(softcap=0.0), "softcap"),
    (Case().with_spec(softcap=float("inf")), "softcap"),
    (Case().with_spec(query_bias="tree"), "bias_width"),
    (Case().with_spec(bias_width=3), "bias_width"),
    (Case().with_batch(query_lens=(1,)), "seq_lens"),
    (Case().with_batch(query_lens=(1,), seq_lens=(-1,)), "seq_lens"),
    (Case().with_batch(query_lens=(1,), seq_lens=(2**31,)), "seq_lens"),
    (Case().with_batch(padding_tokens=-1), "padding_tokens"),
]


@pytest.mark.parametrize(("case", "words"), INVALID, ids=[f"{i} {words}" for i, (_, words) in enumerate(INVALID)])
def test_a_contradiction_is_named(case: Case, words: str) -> None:
    reason = why_invalid(case)
    assert reason is not None
    assert reason.startswith(words)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        FULL,
        MLA,
        MLA.with_spec(kv_dtype=FLOAT8, scales="head"),
        Case().with_batch(query_lens=(5,), seq_lens=(2,)),
        Case().with_spec(operation="update_kv_cache", sliding_window=0, softcap=-1.0),  # nobody looks at its rules
        replace(Case(), poison=""),
    ],
    ids=["plain", "full", "MLA", "float8 MLA", "more queries than keys", "rules of an update", "no poison"],
)
def test_what_means_something_is_valid(case: Case) -> None:
    assert why_invalid(case) is None
