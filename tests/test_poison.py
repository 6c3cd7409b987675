"""What no row may read is poison, and nothing else is; outputs are born unwritten."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from pageproof import reference
from pageproof.oracle.building.poison import is_unwritten, sentinel_bits
from pageproof.oracle.building.tensors import Problem, build
from pageproof.oracle.case import ATTENTION_OPERATIONS, FLOAT8, POISON_TIERS, BatchShape, Case, Spec
from pageproof.oracle.formats import INTEGERS
from pageproof.oracle.strategies import cases

OUTPUT_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
HUGE = 2147480000


def make(**changes: Any) -> Case:
    """Request 0 reads keys 23..27 of 28, request 1 only pages 3 to 5 of 6, request 3 nothing."""
    spec = {"head_size": 16, "head_size_v": 16, "block_size": 8, "sliding_window": 5, "dtype": "float32", **changes}
    batch = BatchShape(query_lens=(1, 15, 0, 0), seq_lens=(28, 44, 0, 12), padding_tokens=2, table_slack=3)
    return Case(spec=Spec(**spec), batch=batch, seed=3)


def may_be_read(case: Case, bias: Tensor | None) -> list[list[bool]]:
    """Request by request, key by key, straight from the contract's table of meanings."""
    spec, readable, token = case.spec, [], 0
    for n, length in zip(case.batch.query_lens, case.batch.seq_lens, strict=True):
        seen = [False] * length
        for t in range(n):
            p = length - n + t
            for j in range(length):
                new = j - (length - n)
                visible = not spec.causal or j <= p
                visible &= spec.sliding_window is None or p - j < spec.sliding_window
                visible &= spec.right_window is None or j - p <= spec.right_window
                if bias is not None and 0 <= new < spec.bias_width:
                    visible &= bias[token + t, new].item() != -torch.inf
                seen[j] |= visible
        readable.append(seen)
        token += n
    return readable


def caches(problem: Problem) -> list[Tensor]:
    return [tensor for name, tensor in problem.arguments.items() if name.endswith("cache")]


def readable_slots(problem: Problem) -> Tensor:
    """[num_blocks, block_size] bool; the true table is that of the same case without garbage in it."""
    case = problem.case
    table = build(replace(case, poison="")).arguments["batch"].block_table
    cache, size = caches(problem)[0], case.spec.block_size
    readable = torch.zeros(cache.shape[:2], dtype=torch.bool)
    for request, seen in enumerate(may_be_read(case, problem.arguments["rules"].query_bias)):
        for key, visible in enumerate(seen):
            readable[table[request, key // size], key % size] |= visible
    return readable


@settings(max_examples=100)
@given(cases(operations=ATTENTION_OPERATIONS, requests=3))
def test_poison_is_exactly_what_no_row_may_read(case: Case) -> None:
    problem = build(case)
    readable = readable_slots(problem)
    for cache in caches(problem):
        assert cache[readable].double().isfinite().all()
        poison = cache[~readable].view(INTEGERS[cache.element_size()])
        if cache.dtype == torch.float8_e4m3fn:
            assert set(poison.unique().tolist()) == {0x7E, 0x7F}
        else:
            assert poison.unique().tolist() == [-1 if cache.element_size() > 1 else 0xFF]


@settings(max_examples=100)
@given(cases(operations=ATTENTION_OPERATIONS, requests=3))
def test_entries_through_which_a_key_is_read_are_true_and_the_unused_are_not(case: Case) -> None:
    given, true = (build(replace(case, poison=poison)) for poison in (case.poison, case.poison.replace("a", "")))
    table, expected = given.arguments["batch"].block_table, true.arguments["batch"].block_table
    size = case.spec.block_size
    for request, seen in enumerate(may_be_read(case, given.arguments["rules"].query_bias)):
        for column in {key // size for key, visible in enumerate(seen) if visible}:
            assert table[request, column] == expected[request, column]
            assert expected[request, column] or not case.batch.spare_blocks
        assert not expected[request, -(-len(seen) // size) :].any()


def test_unused_entries_are_huge_negative_or_of_others() -> None:
    table = build(make().with_batch(table_slack=40)).arguments["batch"].block_table
    unused = torch.cat((table[0, 4:], table[1, 6:], table[2]))
    assert (unused == HUGE).any()
    assert (unused < 0).any()
    assert ((unused > 0) & (unused < HUGE)).any()
    assert int(unused[unused < HUGE].max()) < caches(build(make()))[0].shape[0] + 1


def entries(case: Case) -> tuple[list[bool], list[bool]]:
    """(whether a key may be read through it, whether it is not the true one) of every entry that holds keys."""
    problem = build(case)
    table = problem.arguments["batch"].block_table
    true = build(replace(case, poison="bcde")).arguments["batch"].block_table
    read, changed = [], []
    for request, seen in enumerate(may_be_read(case, problem.arguments["rules"].query_bias)):
        for column, start in enumerate(range(0, len(seen), case.spec.block_size)):
            read.append(any(seen[start : start + case.spec.block_size]))
            changed.append(bool(table[request, column] != true[request, column]))
    return read, changed


# Every key that is not read has one and the same reason for it.
UNREAD = {
    "left of every window": make().with_batch(query_lens=(1, 15), seq_lens=(28, 44)),
    "of a request without rows": make(sliding_window=None).with_batch(query_lens=(1, 0), seq_lens=(28, 44)),
    "hidden by the query bias": make(
        block_size=1, sliding_window=None, causal=False, query_bias="dense", bias_width=30
    ).with_batch(query_lens=(30, 1), seq_lens=(40, 5)),
}


@pytest.mark.parametrize("case", UNREAD.values(), ids=UNREAD)
def test_an_entry_is_garbage_exactly_if_no_key_behind_it_may_be_read(case: Case) -> None:
    """Garbage may be another's page, and that by chance the true one: most of it differs, over all seeds."""
    garbage = []
    for seed in range(24):
        for read, changed in zip(*entries(replace(case, seed=seed)), strict=True):
            assert not (read and changed)
            if not read:
                garbage.append(changed)
    assert len(garbage) >= 12
    assert sum(garbage) > 0.7 * len(garbage)


@pytest.mark.parametrize("off", POISON_TIERS[:4])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_tier_that_is_off_is_finite(off: str, dtype: str) -> None:
    case = make(dtype=dtype)
    problem = build(replace(case, poison=POISON_TIERS.replace(off, "")))
    table = build(replace(case, poison="")).arguments["batch"].block_table
    cache = problem.arguments["v_cache"]
    places = {
        "a": [(0, 0), (0, 7)],
        "b": [(int(table[0, 3]), 4), (int(table[1, 5]), 7), (int(table[3, 1]), 4)],
        # Key 22 is just left of request 0's window, in a page that is read.
        "c": [(int(table[0, 2]), 6), (int(table[0, 0]), 0), (int(table[3, 0]), 5)],
    }
    for tier, found in places.items():
        for block, offset in found:
            assert bool(cache[block, offset].isnan().all()) == (tier != off), (tier, block, offset)
            assert bool(cache[block, offset].isfinite().all()) == (tier == off)
    padding = problem.arguments["q"][-2:]
    assert bool(padding.isnan().all()) == (off != "d")
    assert bool(padding.isfinite().all()) == (off == "d")
    assert bool(is_unwritten(problem.arguments["out"]).all()) == (off != "d")
    if off == "d":
        assert not problem.arguments["out"].any()
    if off == "a":
        assert not problem.arguments["batch"].block_table[2].any()


def test_float8_poison_is_nan_and_448_by_turns() -> None:
    case = make(kv_dtype=FLOAT8)
    both = build(case).arguments["k_cache"][0].view(torch.uint8)
    assert (both[..., ::2] != both[..., 1::2]).all()
    assert set(both.unique().tolist()) == {0x7E, 0x7F}
    finite = build(replace(case, poison="abcd")).arguments["k_cache"]
    assert finite.double().isfinite().all()


def test_a_slot_that_one_of_its_requests_sees_is_not_poisoned() -> None:
    """The long request's window has left the shared page; the short one still reads all of it."""
    spec = Spec(head_size=16, head_size_v=16, block_size=8, sliding_window=16, dtype="float32")
    case = Case(spec=spec, batch=BatchShape(query_lens=(1, 2), seq_lens=(40, 9), shared_blocks=1))
    problem = build(case)
    page = int(problem.arguments["batch"].block_table[1, 0])
    assert problem.arguments["k_cache"][page].isfinite().all()
    assert build(case.with_batch(query_lens=(1, 0))).arguments["k_cache"][page].isnan().all()


@pytest.mark.parametrize("operation", ATTENTION_OPERATIONS)
def test_the_answer_does_not_depend_on_poison(operation: str) -> None:
    mla = {"num_kv_heads": 1, "rope_head_size": 8, "nope_head_size": 16} if operation != "attention" else {}
    answers = []
    for poison in ("", "a", "b", "c", "d", "e", POISON_TIERS):
        for kv_dtype in ("", FLOAT8):
            problem = build(replace(make(operation=operation, kv_dtype=kv_dtype, **mla), poison=poison))
            answers.append((kv_dtype, getattr(reference, operation)(**problem.arguments)))
    for kv_dtype, (out, lse) in answers:
        first_out, first_lse = next(answer for other, answer in answers if other == kv_dtype)
        assert torch.equal(out, first_out)
        assert torch.equal(lse, first_lse)


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES)
def test_a_sentinel_is_a_nan_that_no_computation_gives(dtype: torch.dtype) -> None:
    bits = torch.tensor([sentinel_bits(dtype)], dtype=torch.int64).to(INTEGERS[dtype.itemsize])
    assert bits.view(dtype).double().isnan().all()
    assert is_unwritten(bits.view(dtype)).all()
    computed = [torch.tensor([1.5, 0.0, -0.0])]
    if dtype != torch.float8_e4m3fn:  # which has two NaNs only
        undefined = torch.tensor([torch.inf]) - torch.inf
        poison = torch.full((1,), -1, dtype=INTEGERS[dtype.itemsize]).view(dtype)
        computed += [undefined, -undefined, torch.tensor([torch.nan, -torch.nan]), poison + 1, poison.float() * 0.0]
    for values in computed:
        assert not is_unwritten(values.to(dtype)).any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("out_dtype", ["", FLOAT8])
@pytest.mark.parametrize("odd_strides", [False, True])
def test_outputs_are_born_unwritten(dtype: str, out_dtype: str, odd_strides: bool) -> None:
    problem = build(make(dtype=dtype, out_dtype=out_dtype, odd_strides=odd_strides))
    for output in problem.outputs.values():
        assert is_unwritten(output).all()
        assert output.double().isnan().all()
        output[0] = 0.0
        assert is_unwritten(output).flatten(1).all(dim=1).tolist() == [False] + [True] * (len(output) - 1)


def test_an_empty_part_of_a_merge_holds_nan() -> None:
    spec = Spec(operation="merge_states", head_size=16, dtype="float32", num_kv_heads=4)
    case = Case(spec=spec, batch=BatchShape(query_lens=(40,), seq_lens=(40,)))
    for poison, expected in ((POISON_TIERS, True), ("", False)):
        arguments = build(replace(case, poison=poison)).arguments
        for part in ("a", "b"):
            empty = arguments[f"lse_{part}"] == -torch.inf
            assert empty.any()
            assert bool(arguments[f"out_{part}"][empty].isnan().all()) == expected
            assert arguments[f"out_{part}"][~empty].isfinite().all()


def test_query_bias_of_no_token_and_of_no_key_is_nan() -> None:
    bias = build(make(query_bias="dense", bias_width=20)).arguments["rules"].query_bias
    assert bias[-2:].isnan().all()
    assert bias[0, 1:].isnan().all()
    assert bias[1:16, 15:].isnan().all()
    assert not bias[1:16, :15].isnan().any()
    assert not (bias == torch.inf).any()
