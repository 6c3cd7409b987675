"""The covering arrays have every feasible pair and triple, and what counts them does not rest on who makes the rows."""

from __future__ import annotations

import itertools
import random

import pytest

from pageproof.oracle.campaign.covering import covering_array, more_rows_for_triples
from pageproof.oracle.campaign.pairs import MODEL, PAIRS, TRIPLES, Model, TupleCounter, all_tuples, feasible
from pageproof.oracle.campaign.parameters import (
    BY_NAME,
    NOT_APPLICABLE,
    PARAMETERS,
    Constraint,
    Parameter,
    Row,
    domain,
)

Pairs = set[frozenset[tuple[str, object]]]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return covering_array(MODEL, seed=0)


def tuples_of(rows: list[Row], strength: int) -> Pairs:
    """By plain enumeration, with nothing of the module under test."""
    return {
        frozenset(values)
        for row in rows
        for values in itertools.combinations([item for item in row.items() if item[1] != NOT_APPLICABLE], strength)
    }


def pairs_of(rows: list[Row]) -> Pairs:
    return tuples_of(rows, PAIRS)


@pytest.fixture(scope="module")
def feasible_pairs() -> Pairs:
    return feasible(MODEL, PAIRS)


def toy() -> Model:
    """Four parameters of which the last applies where the first says so, and c = a + b has to be even."""
    both = frozenset({"x", "y"})
    parameters = (
        Parameter(name="operation", values=("x", "y"), operations=both),
        Parameter(name="a", values=(0, 1, 2), operations=both),
        Parameter(name="b", values=(0, 1, 2, 3), operations=both),
        Parameter(name="c", values=(0, 1), operations=both),
        Parameter(name="d", values=(5, 6), operations=frozenset({"y"})),
    )
    constraints = (
        Constraint(scope=("a", "b", "c"), holds=lambda a, b, c: (a + b + c) % 2 == 0),
        Constraint(scope=("a", "b"), holds=lambda a, b: a != 2 or b == 2),
        Constraint(scope=("operation", "d"), holds=lambda op, d: (d == NOT_APPLICABLE) == (op == "x")),
    )
    return Model(parameters=parameters, constraints=constraints)


def brute_force(model: Model) -> list[Row]:
    names = [parameter.name for parameter in model.parameters]
    combinations = itertools.product(*((*parameter.values, NOT_APPLICABLE) for parameter in model.parameters))
    complete = [dict(zip(names, values, strict=True)) for values in combinations]
    always = [parameter.name for parameter in model.parameters if parameter.name != "d"]
    return [
        row
        for row in complete
        if all(row[name] != NOT_APPLICABLE for name in always)
        and all(constraint.holds(*(row[name] for name in constraint.scope)) for constraint in model.constraints)
    ]


def model_with_domains(model: Model) -> Model:
    """`domain` knows the real operations only; here every operation but "d" applies always."""
    model.__dict__["domains"] = {
        parameter.name: (*parameter.values, NOT_APPLICABLE) if parameter.name == "d" else parameter.values
        for parameter in model.parameters
    }
    return model


@pytest.mark.parametrize("strength", [PAIRS, TRIPLES])
def test_feasible_are_the_tuples_of_every_valid_row(strength: int) -> None:
    model = model_with_domains(toy())
    assert feasible(model, strength) == tuples_of(brute_force(model), strength)


def test_a_witness_that_breaks_a_constraint_adds_no_pair() -> None:
    model = model_with_domains(toy())
    wrong: Row = {"operation": "x", "a": 2, "b": 3, "c": 0, "d": 5}
    for strength in (PAIRS, TRIPLES):
        assert feasible(model, strength, [wrong]) == feasible(model, strength)


def test_the_arrays_of_a_small_model_have_every_feasible_pair_and_triple() -> None:
    model = model_with_domains(toy())
    array = covering_array(model, seed=3)
    assert pairs_of(array) == feasible(model, PAIRS)
    more = more_rows_for_triples(model, 3, array)
    assert tuples_of(array + more, TRIPLES) == feasible(model, TRIPLES)
    assert all(row in brute_force(model) for row in array + more)


def test_the_array_has_every_feasible_pair_in_few_valid_rows(rows: list[Row], feasible_pairs: Pairs) -> None:
    assert all(MODEL.is_valid(row) for row in rows)
    assert pairs_of(rows) == feasible_pairs
    assert len(rows) <= 150


def test_a_row_that_is_left_out_is_missed_by_the_count(rows: list[Row]) -> None:
    wanted = feasible(MODEL, PAIRS, rows)
    counter = TupleCounter()
    for row in rows[1:]:
        counter.add(MODEL.mask(row.items()))
    missing = set(counter.missing(MODEL, wanted))
    assert missing == pairs_of(rows) - pairs_of(rows[1:])
    assert missing
    counter.add(MODEL.mask(rows[0].items()))
    assert counter.covered(MODEL, wanted) == len(wanted)


def test_counters_of_several_processes_add_up(rows: list[Row]) -> None:
    wanted = feasible(MODEL, PAIRS, rows)
    parts = [TupleCounter(), TupleCounter()]
    for index, row in enumerate(rows[:20]):
        parts[index % 2].add(MODEL.mask(row.items()))
    parts[0].merge(parts[1])
    assert parts[0].covered(MODEL, wanted) == len(pairs_of(rows[:20]))


@pytest.mark.parametrize(
    "pair",
    [
        {("causal", True), ("right_window", "1")},
        {("operation", "mla_attention"), ("num_kv_heads", 2)},
        {("operation", "update_kv_cache"), ("softcap", "tight")},
        {("operation", "merge_states"), ("kv_dtype", "float8_e4m3fn")},
        {("kv_dtype", "same"), ("q_dtype", "float8_e4m3fn")},
        {("query_bias", "none"), ("bias_width", "wide")},
        {("batch", "decode"), ("bias_width", "narrow")},
        {("block_size", 1), ("sliding_window", "page-1")},
        {("head_size", 64), ("kv_lora_rank", 64)},
    ],
)
def test_what_cannot_go_together_is_not_feasible(pair: set[tuple[str, object]], feasible_pairs: Pairs) -> None:
    assert frozenset(pair) in set(all_tuples(MODEL, PAIRS))
    assert frozenset(pair) not in feasible_pairs


def test_feasible_pairs_include_what_needs_a_third_value(feasible_pairs: Pairs) -> None:
    assert frozenset({("scales", "head"), ("kv_dtype", "same")}) in feasible_pairs  # with float8 out
    assert frozenset({("scales", "none"), ("operation", "update_mla_cache")}) in feasible_pairs


def test_the_array_is_the_same_for_the_same_seed(rows: list[Row]) -> None:
    assert covering_array(MODEL, seed=0) == rows
    assert covering_array(MODEL, seed=1) != rows


def test_the_nightly_rows_have_every_feasible_triple(rows: list[Row]) -> None:
    *others, last = [*rows, *more_rows_for_triples(MODEL, 0, rows)]
    wanted = feasible(MODEL, TRIPLES, [*others, last])
    generator = random.Random(0)
    for _ in range(1500):  # whatever the rows hold, every triple is in the count if and only if a row has it
        chosen = generator.sample(PARAMETERS, 3)
        triple = {parameter.name: generator.choice(parameter.values) for parameter in chosen}
        exists = MODEL.complete(triple, lambda _name, values, _row: values) is not None
        assert (frozenset(triple.items()) in wanted) == exists, triple
    counter = TupleCounter(TRIPLES)
    for row in others:
        counter.add(MODEL.mask(row.items()))
    missing = counter.missing(MODEL, wanted)
    assert missing
    assert all(triple <= set(last.items()) for triple in missing)
    rest = TupleCounter(TRIPLES)
    rest.add(MODEL.mask(last.items()))
    counter.merge(rest)
    assert counter.covered(MODEL, wanted) == len(wanted) > 100_000


def test_rows_that_the_target_declines_cost_no_other_pair(feasible_pairs: Pairs) -> None:
    def accepts(row: Row) -> bool:
        return row["q_dtype"] != "float8_e4m3fn" and not (row["alibi"] is True and row["sinks"] is True)

    banned = Model(banned=frozenset({("q_dtype", "float8_e4m3fn")}))
    array = covering_array(banned, seed=0, accepts=accepts)
    lost = feasible_pairs - pairs_of(array)
    assert all(accepts(row) for row in array)
    assert all(("q_dtype", "float8_e4m3fn") in pair or pair == {("alibi", True), ("sinks", True)} for pair in lost)


def test_a_proof_that_no_row_exists_is_exhaustive() -> None:
    model = model_with_domains(toy())
    generator = random.Random(0)
    valid = brute_force(model)
    for _ in range(200):
        fixed = dict(generator.sample(sorted(generator.choice(valid).items()), 2))
        fixed[generator.choice(["a", "b", "c"])] = generator.choice([0, 1])
        exists = any(all(row[name] == value for name, value in fixed.items()) for row in valid)
        assert (model.complete(fixed, lambda _name, values, _row: values) is not None) == exists


def test_every_parameter_has_distinct_values_and_its_off_value_among_them() -> None:
    for parameter in PARAMETERS:
        values = domain(parameter, extra=True)
        assert len(set(values)) == len(values)
        assert parameter.off is None or parameter.off in parameter.values
        assert parameter.within_key in ("fixed", "free", "on")
    assert len(BY_NAME) == len(PARAMETERS)
