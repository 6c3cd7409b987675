"""The recipes whose outputs can be read: counts, single weights and tags, and sums that cancel, in every format."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.building.pages import lay_out, readable_keys
from pageproof.oracle.building.poison import classify
from pageproof.oracle.building.recipes.one_hot import chunk_starts
from pageproof.oracle.building.recipes.tagged import Tag, decode
from pageproof.oracle.building.tensors import build
from pageproof.oracle.case import BatchShape, Case, Spec
from pageproof.oracle.judging import judge
from pageproof.reference.attention import attention

from .test_recipes import FORMATS, attend, make, scores


def stored_values(case: Case) -> Tensor:
    """[num_written, num_kv_heads, value size] float64 as they lie in the cache, in the order of their slots."""
    pages = lay_out(case)
    written = torch.from_numpy(classify(case, pages, readable_keys(case, pages, None)).written)
    arguments = build(case).arguments
    latent = case.spec.is_mla
    cache = arguments["latent_cache"][:, :, None, : case.spec.head_size] if latent else arguments["v_cache"]
    return cache.double().flatten(0, 1)[written]


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_all_scores_of_a_census_are_equal(spec: dict[str, Any]) -> None:
    case = make("census", sinks=True, **spec)
    assert (scores(case) == 0).all()
    assert (build(case).arguments["rules"].sinks <= 0).all()


def test_a_census_counts_keys() -> None:
    out, _ = attention(**build(make("census", dtype="float32", group_size=1)).arguments)
    counts = out[0].double() * 200  # the first request's only row sees 200 keys
    assert torch.allclose(counts, counts.round(), atol=1e-4)
    assert (counts.round().sum(-1) == 200).all()
    assert (counts.round() > 1).any()


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_full_one_hot_values_show_single_weights(spec: dict[str, Any], window: int | None) -> None:
    for seed in range(4):
        case = replace(make("one_hot_full", sliding_window=window, **spec), seed=seed)
        starts = chunk_starts(case)
        scales = build(case).arguments["scales"]
        unit = None if scales is None else scales.k if case.spec.is_mla else scales.v
        for part in attend(build(case)):
            for group, request in enumerate(part.rows.requests.tolist()):
                keys = part.rows.keys[group]
                for head in range(case.spec.num_kv_heads):
                    columns = keys - int(starts[request, head])
                    real = (columns >= 0) & (columns < part.out.shape[-1])
                    due = torch.zeros_like(part.out[group, head])
                    due[..., columns[real]] = part.weights.p[group, head][..., real]
                    due = due if unit is None else due * unit.double().expand(case.spec.num_kv_heads)[head]
                    assert torch.allclose(part.out[group, head], due, rtol=1e-12, atol=0)
                    assert (due > 0).any()


def test_chunks_begin_at_the_start_end_at_the_end_and_lie_around_the_edge() -> None:
    found: dict[int | None, set[int]] = {}
    for window in (None, 100):
        cases = (replace(make("one_hot_full", sliding_window=window), seed=seed) for seed in range(40))
        found[window] = {int(start) for case in cases for start in chunk_starts(case)[0]}
    assert {0, 200 - 48} <= found[None]  # a value row has 48 elements
    assert {100, 200 - 48} <= found[100]
    assert min(found[100]) == 100
    middle = replace(make("one_hot_full"), seed=0).with_batch(query_lens=(100,), seq_lens=(200,))
    assert 100 - 24 in {int(start) for seed in range(40) for start in chunk_starts(replace(middle, seed=seed))[0]}
    assert len(found[None]) > 5


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_tags_spell_where_they_lie(spec: dict[str, Any]) -> None:
    case = make("tagged", block_size=24, **spec)
    pages = lay_out(case)
    written = classify(case, pages, readable_keys(case, pages, None)).written
    rows = stored_values(case)
    assert len(rows) == len(written) == 320
    for slot, heads in zip(written.tolist(), rows.tolist(), strict=True):
        for head, row in enumerate(heads):
            assert decode(case, row) == Tag(slot // 24, slot % 24, head)


def test_what_is_no_tag_is_not_decoded() -> None:
    case = make("tagged")
    row, other = stored_values(case)[0, :2].tolist()
    assert decode(case, row) is not None
    assert decode(case, [value + 0.2 for value in row]) == decode(case, row)
    assert decode(case, [value + 0.4 for value in row]) is None
    assert decode(case, [*row[:-1], row[-1] % 8 + 1]) is None  # the digits contradict each other
    assert decode(case, [(a + b) / 2 for a, b in zip(row, other, strict=True)]) is None
    assert decode(case, [0.0] * len(row)) is None
    narrow = make("tagged", head_size_v=2)  # too few elements for a page, an offset and a head
    assert decode(narrow, stored_values(narrow)[0, 0].tolist()) is None


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_a_tagged_row_gets_most_of_its_weight_from_one_key(spec: dict[str, Any]) -> None:
    largest = [
        part.weights.p[group, :, :, row].amax(-1).flatten()
        for part in attend(build(make("tagged", **spec)))
        for group in range(len(part.rows.requests))
        for row in part.rows.valid[group].nonzero().flatten().tolist()
    ]
    assert (torch.cat(largest) > 0.9).double().mean() > 0.5


@pytest.mark.parametrize("length", [0, 1])
def test_a_pool_of_one_slot_has_a_tag_as_well(length: int) -> None:
    batch = BatchShape(query_lens=(1,), seq_lens=(length,), spare_blocks=False)
    case = Case(
        spec=Spec(dtype="float32", num_kv_heads=1, group_size=1, block_size=1), batch=batch, recipe="tagged", poison=""
    )
    assert lay_out(case).num_blocks == 1
    for row in stored_values(case)[:, 0].tolist():
        assert decode(case, row) == Tag(page=0, offset=0, head=0)
    judge(case, Reference()).require()


def test_tagged_rows_look_at_every_edge() -> None:
    """Over a few seeds: the first and last key that is seen, both sides of a page's boundary, and any other."""
    case = make("tagged", dtype="float32", sliding_window=40, num_kv_heads=4, group_size=4).with_batch(
        query_lens=(1,), seq_lens=(120,)
    )
    looked_at: set[int] = set()
    for seed in range(12):
        part = attend(build(replace(case, seed=seed)))[0]
        best = part.weights.p[0, ..., 0, :].max(-1)
        looked_at |= {int(part.rows.keys[0, place]) for place in best.indices[best.values > 0.9].flatten()}
    assert {80, 119} <= looked_at
    assert looked_at & {80, 96, 112}
    assert looked_at & {95, 111}
    assert len(looked_at) > 8


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_large_parts_cancel_in_scores_and_in_outputs(spec: dict[str, Any]) -> None:
    case = make("cancel", **spec)
    left, partial = [], []
    for seed in range(6):
        for part in attend(build(replace(case, seed=seed).with_batch(query_lens=(1,), seq_lens=(200,)))):
            terms = part.weights.p[..., None] * part.rows.v.permute(0, 2, 1, 3)[:, :, None, None]
            left.append(float(part.out.abs().mean()))
            partial.append(float(terms.cumsum(-2).abs().amax(-2).mean()))
            sizes = (part.rows.q.abs()[0, 0, 0, 0] * part.rows.k.abs()[0, :, 0]).sum(-1)
            assert part.scores.x.abs().mean() < 3
            assert (build(case).arguments["rules"].softmax_scale * sizes).mean() > 4
    assert max(partial) > 5 * sorted(left)[len(left) // 2]


def test_signs_come_in_an_even_number_of_equal_runs() -> None:
    counts = set()
    for seed in range(60):
        case = replace(make("cancel", dtype="float32"), seed=seed).with_batch(query_lens=(1,), seq_lens=(256,))
        signs = attend(build(case))[0].rows.v[0, :, 0, 0].sign()
        changes = int((signs[1:] != signs[:-1]).sum())
        assert signs.sum() == 0
        counts.add(changes + 1)
    assert counts <= {2**power for power in range(1, 9)}
    assert {2, 256} <= counts
