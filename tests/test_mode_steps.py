"""The steps of a case in a mode other than eager: valid cases of one bucket's sizes, and what is in them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from pageproof import reference
from pageproof.oracle import BatchShape, Case, Spec
from pageproof.oracle.building.pages import lay_out
from pageproof.oracle.building.tensors import build
from pageproof.oracle.case import MODES, OPERATIONS
from pageproof.oracle.case_rules import why_invalid
from pageproof.oracle.checks.memory import bits_of
from pageproof.oracle.replays.buffers import Buffers, tensors_of
from pageproof.oracle.replays.profiles import PROFILES
from pageproof.oracle.replays.sequence import LARGE, OWN, REWRITTEN, SMALL, steps_of
from pageproof.oracle.replays.writing import new_slots

BATCH = BatchShape(query_lens=(1, 5, 0, 3), seq_lens=(33, 17, 0, 2), padding_tokens=2, shared_blocks=1)
MLA = Spec(operation="mla_attention", num_kv_heads=1, group_size=2, head_size=16, rope_head_size=16)
CPU = torch.device("cpu")


def cases() -> list[Case]:
    batches = (
        BATCH,
        BatchShape(),
        BatchShape(query_lens=(1,), seq_lens=(1,)),
        BatchShape(query_lens=(70,), seq_lens=(70,)),
    )
    return [
        Case(spec=Spec(operation=operation), batch=batch, mode="full", seed=seed)
        for operation in ("attention", "update_kv_cache", "merge_states")
        for seed, batch in enumerate(batches * 8)
    ]


def test_every_step_is_a_valid_plain_case_of_its_buckets_sizes() -> None:
    for case in cases():
        steps = steps_of(case)
        assert len(steps.replayed) == 6
        for step in (*steps.captured, *steps.replayed):
            assert why_invalid(step.case) is None
            assert (step.case.mode, step.case.spec) == (MODES[0], case.spec)
            like = steps.captured[step.bucket].case
            assert step.case.batch.num_tokens == like.batch.num_tokens
            assert step.case.batch.num_requests == like.batch.num_requests
            pages, like_pages = lay_out(step.case), lay_out(like)
            assert pages.num_blocks == like_pages.num_blocks
            assert pages.block_table.shape == like_pages.block_table.shape
        large, small = (step.case.batch for step in steps.captured)
        assert large.num_tokens == 2 * small.num_tokens
        assert large.num_tokens >= case.batch.num_tokens


def test_every_profile_is_replayed_and_the_cases_own_batch_in_each_case() -> None:
    seen: Counter[str] = Counter()
    for case in cases():
        replayed = steps_of(case).replayed
        seen.update(step.profile for step in replayed)
        own = [step for step in replayed if step.profile == OWN]
        assert len(own) == 2
        assert {step.bucket for step in replayed} == {LARGE, SMALL}
        live = [request for request in zip(case.batch.query_lens, case.batch.seq_lens, strict=True)]
        assert list(zip(own[0].case.batch.query_lens, own[0].case.batch.seq_lens, strict=True))[: len(live)] == live
    assert set(seen) == {*PROFILES, OWN, REWRITTEN}


def test_fewer_replays_are_the_first_ones() -> None:
    for case in cases()[:8]:
        steps = steps_of(case).replayed
        assert [steps_of(replace(case, replays=number)).replayed for number in (1, 4)] == [steps[:1], steps[:4]]


def test_slots_that_are_written_belong_to_one_key() -> None:
    case = Case(batch=BATCH, seed=3)
    pages = lay_out(case)
    slots = new_slots(case, pages)
    held = np.bincount(pages.slot_of_key)
    assert (held > 1).any()
    assert all(held[slot] == 1 for slot in slots[slots >= 0])
    assert list(slots[[1 + 5, -1, -2]] >= 0) == [False] * 3  # a token before its first key, and padding rows
    assert slots[0] == pages.slot_of_key[32]


@pytest.mark.parametrize("poison", ["abcde", "abde", "abcd"])
@pytest.mark.parametrize("float8", [False, True])
def test_the_slot_of_a_key_that_nobody_sees_is_written_unless_it_holds_nan(poison: str, float8: bool) -> None:
    spec = Spec(query_bias="dense", bias_width=16, kv_dtype="float8_e4m3fn" if float8 else "")
    batch, hidden = BatchShape(query_lens=(16, 12), seq_lens=(20, 12)), 0
    for seed in range(8):
        case = Case(spec=spec, batch=batch, mode="full", poison=poison, seed=seed)
        step = next(step for step in steps_of(case).replayed if step.profile == OWN)
        memory = tensors_of(step, CPU, updates=True)
        slots = new_slots(step.case, lay_out(step.case))
        rows = torch.cat([cache.float().flatten(0, 1).flatten(1) for cache in memory.caches.values()], dim=1)
        finite = torch.from_numpy(slots >= 0) & rows[torch.from_numpy(slots)].isfinite().all(1)
        assert memory.writing is not None
        assert memory.writing.slot_mapping.tolist() == torch.where(finite, torch.from_numpy(slots), -1).tolist()
        hidden += int((slots >= 0).sum() - finite.sum())
    assert (hidden > 0) == ("c" in poison and ("e" in poison or not float8))


@pytest.mark.parametrize("spec", [Spec(dtype="float16"), Spec(), MLA], ids=["float16", "bfloat16", "mla"])
@pytest.mark.parametrize("float8", [False, True])
def test_the_update_of_a_step_leaves_the_caches_as_they_were_built(spec: Spec, float8: bool) -> None:
    """By the reference's store: what was taken out as rows comes back bit for bit."""
    spec = replace(spec, kv_dtype="float8_e4m3fn", scales="head") if float8 else spec
    case = Case(spec=spec, batch=BATCH, mode="full", recipe="extreme", seed=3)
    for step in steps_of(case).replayed:
        memory = tensors_of(step, CPU, updates=True)
        built = {name: bits_of(cache).clone() for name, cache in memory.caches.items()}
        assert memory.writing is not None
        memory.unwrite()
        written = bool((memory.writing.slot_mapping >= 0).any())
        assert written != all(bits_of(memory.caches[name]).equal(bits) for name, bits in built.items())
        store = getattr(reference, memory.writing.operation)
        given = {"slot_mapping": memory.writing.slot_mapping, "scales": memory.writing.scales}
        store(**memory.writing.rows, **memory.caches, **given)
        assert all(bits_of(memory.caches[name]).equal(bits) for name, bits in built.items())
        assert memory.problem.guards.violations() is None


def test_rejected_tokens_leave_other_values_in_the_slots() -> None:
    steps = steps_of(Case(batch=BATCH, mode="full", seed=3)).replayed
    own, rewritten = (next(step for step in steps if step.profile == name) for name in (OWN, REWRITTEN))
    first, then = (tensors_of(step, CPU, updates=True) for step in (own, rewritten))
    then.unwrite()
    for name, cache in first.caches.items():
        assert bits_of(cache).equal(bits_of(then.caches[name]))
    assert first.writing is not None
    assert then.writing is not None
    assert first.writing.slot_mapping.equal(then.writing.slot_mapping)
    live = first.writing.slot_mapping >= 0
    assert first.writing.rows["key"][live].equal(-then.writing.rows["key"][live])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_refilled_buffers_hold_the_step_where_they_always_were(operation: str) -> None:
    spec = replace(MLA, nope_head_size=16) if "mla" in operation else Spec(kv_dtype="", odd_strides=True)
    case = Case(spec=replace(spec, operation=operation), batch=BATCH, mode="full", seed=5)
    steps = steps_of(case)
    memory = tensors_of(steps.captured[LARGE], CPU, updates=False)
    buffers = Buffers(memory.problem, memory.writing)
    given = {name: value for name, value in buffers.problem.arguments.items() if isinstance(value, torch.Tensor)}
    places = {name: tensor.data_ptr() for name, tensor in given.items()}
    for step in [step for step in steps.replayed if step.bucket == LARGE]:
        wanted = tensors_of(step, CPU, updates=False)
        buffers.refill(wanted)
        assert buffers.guarded().violations() is None
        for name, tensor in given.items():
            assert bits_of(tensor).equal(bits_of(wanted.problem.arguments[name]))
    assert places == {name: tensor.data_ptr() for name, tensor in given.items()}


def test_a_larger_pool_changes_no_value() -> None:
    case = Case(batch=BATCH, seed=3)
    plain, wide = build(case), build(case.with_batch(pool_blocks=20))
    assert wide.arguments["k_cache"].shape[0] == 20 > plain.arguments["k_cache"].shape[0]
    assert wide.arguments["q"][:9].equal(plain.arguments["q"][:9])
