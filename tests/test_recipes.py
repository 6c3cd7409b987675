"""Every recipe holds what it is made for, in every format: dominant needles, one-hot rows, extreme scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof.oracle.building.pages import lay_out, readable_keys
from pageproof.oracle.building.poison import classify
from pageproof.oracle.building.recipes import VARIANTS, needles, variant
from pageproof.oracle.building.tensors import Problem, build
from pageproof.oracle.case import ATTENTION_OPERATIONS, DTYPES, FLOAT8, RECIPES, BatchShape, Case, Spec
from pageproof.reference.attention import Answer, attention, attention_rows
from pageproof.reference.mla import mla_attention_rows

BATCH = BatchShape(query_lens=(1, 7), seq_lens=(200, 120))
FORMATS: list[dict[str, Any]] = [
    *({"dtype": dtype} for dtype in DTYPES),
    {"dtype": "float16", "kv_dtype": FLOAT8, "scales": "tensor"},
    {"dtype": "bfloat16", "q_dtype": FLOAT8, "kv_dtype": FLOAT8, "scales": "head"},
    {"operation": "mla_attention", "num_kv_heads": 1, "rope_head_size": 16},
    {"operation": "mla_attention", "num_kv_heads": 1, "rope_head_size": 16, "kv_dtype": FLOAT8, "scales": "tensor"},
]


def make(recipe: str, **spec: Any) -> Case:
    return Case(spec=Spec(**{"head_size": 32, "head_size_v": 48, **spec}), batch=BATCH, recipe=recipe)


def extreme(name: str, **spec: Any) -> Case:
    case = make("extreme", **spec)
    return next(found for seed in range(1000) if variant(found := replace(case, seed=seed)) == name)


def attend(problem: Problem) -> list[Answer]:
    mla = problem.case.spec.is_mla
    names = ("q_nope", "q_pe", "latent_cache") if mla else ("q", "k_cache", "v_cache")
    tensors = [problem.arguments[name] for name in names]
    rest = [problem.arguments[name] for name in ("batch", "rules", "scales")]
    return list((mla_attention_rows if mla else attention_rows)(*tensors, *rest))


def scores(case: Case) -> Tensor:
    """Every visible score before the softcap, in one row."""
    return torch.cat(
        [part.scores.x[part.rows.visible[:, None, None].expand_as(part.scores.x)] for part in attend(build(case))]
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("operation", ATTENTION_OPERATIONS)
def test_the_batch_does_not_depend_on_the_recipe(recipe: str, operation: str) -> None:
    case = make(recipe, operation=operation, num_kv_heads=1, rope_head_size=8, nope_head_size=8)
    batch, plain = (build(one).arguments["batch"] for one in (case, replace(case, recipe="normal")))
    assert torch.equal(batch.block_table, plain.block_table)


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_normal_scores_are_near_one(spec: dict[str, Any]) -> None:
    found = scores(make("normal", **spec))
    assert 0.1 < found.std() < 5.0
    assert abs(found.mean()) < 0.5


@pytest.mark.parametrize("window", [None, 3, 33, 150])
@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_needles_get_nearly_all_of_the_weight_in_every_row(spec: dict[str, Any], window: int | None) -> None:
    case = make("needle", sliding_window=window, **spec)
    positions = needle_keys(case)
    for part in attend(build(case)):
        for group, request in enumerate(part.rows.requests.tolist()):
            first = int(part.rows.keys[group, 0])
            columns = [
                key - first for r, key in positions if r == request and 0 <= key - first < part.rows.keys.shape[1]
            ]
            weight = part.weights.p[group][..., columns].sum(-1)[..., part.rows.valid[group]]
            sees_one = part.rows.visible[group][:, columns].any(-1)[part.rows.valid[group]]
            assert sees_one.any()
            assert (weight[..., sees_one] > 0.99).all()


def needle_keys(case: Case) -> set[tuple[int, int]]:
    """(request, key) of every needle."""
    pages = lay_out(case)
    slots = classify(case, pages, readable_keys(case, pages, None))
    keys = slots.key_of_written[needles(case, pages, slots)]
    return set(zip(pages.request_of_key[keys].tolist(), pages.index_of_key[keys].tolist(), strict=True))


def test_needles_stand_at_every_edge() -> None:
    found = needle_keys(make("needle", sliding_window=50))
    # Request 0: one row at 199, window 150..199. Request 1: rows at 113..119, windows from 64..113 to 70..119.
    assert {(0, 150), (0, 199), (0, 192), (0, 191)} <= found  # window, last key, a page's and tile's start, one before
    assert {(1, 64), (1, 113), (1, 70), (1, 69), (1, 119), (1, 112), (1, 111), (1, 96), (1, 95)} <= found
    assert not {(0, 149), (1, 63)} & found  # no row sees these
    assert {(0, 0), (1, 0)} <= needle_keys(make("needle"))
    right = needle_keys(make("needle", causal=False, right_window=2))
    assert {(1, 113 + 2), (1, 113 + 3), (1, 116 + 2)} <= right
    assert len(found) < 40


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_a_needle_off_by_one_would_move_the_output(spec: dict[str, Any]) -> None:
    """Counting one key more or less at the window's edge has to change what comes out, by far."""
    case = make("needle", sliding_window=50, **spec)
    problem = build(replace(case, poison="abde"))
    right = attend(problem)
    arguments = problem.arguments
    for window in (49, 51):
        rules = replace(arguments["rules"], sliding_window=window)
        wrong = attend(replace(problem, arguments={**arguments, "rules": rules}))
        moved = max(float((one.out - other.out).abs().max()) for one, other in zip(right, wrong, strict=True))
        assert moved > 0.05 * max(float(part.out.abs().max()) for part in right)


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_one_hot_values_are_basis_vectors_of_all_directions(spec: dict[str, Any]) -> None:
    case = make("one_hot", **spec)
    problem = build(replace(case, batch=BatchShape(query_lens=(200,), seq_lens=(200,))))
    latent = problem.case.spec.is_mla
    cache = problem.arguments["latent_cache"][..., :32] if latent else problem.arguments["v_cache"]
    rows = cache.double().flatten(0, -2)
    rows = rows[rows.isfinite().all(-1)]
    rows = rows[rows.abs().amax(-1) <= 1]  # float8 poison may be 448
    assert len(rows) >= 200
    assert ((rows == 0) | (rows == 1)).all()
    assert (rows.sum(-1) == 1).all()
    counts = rows.sum(0)
    assert (counts > 0).sum() > 0.85 * len(counts)
    assert counts.max() < 8 * counts.mean()


def test_the_output_of_one_hot_values_adds_up_to_one() -> None:
    out, _ = attention(**build(make("one_hot", dtype="float32")).arguments)
    assert torch.allclose(out.sum(-1), torch.ones(()))


def test_every_variant_comes_up() -> None:
    assert {variant(replace(make("extreme"), seed=seed)) for seed in range(200)} == set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_extreme_values_still_mean_something(name: str, spec: dict[str, Any]) -> None:
    case = extreme(name, sinks=True, **spec)
    largest = 448.0 if spec.get("out_dtype") else float(torch.finfo(getattr(torch, case.spec.dtype)).max)
    for part in attend(build(case)):
        assert part.out.isfinite().all()
        assert part.out.abs().max() < largest
        assert not part.weights.lse.isnan().any()


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_extreme_scores_are_where_they_are_meant_to_be(spec: dict[str, Any]) -> None:
    found = {name: scores(extreme(name, **spec)) for name in VARIANTS}
    assert found["large"].abs().max() > 20
    assert (found["floor"] < -100).all()
    assert (found["saturated"].abs() > 100).all()
    assert (found["saturated"] > 0).any()
    assert (found["saturated"] < 0).any()
    assert found["tiny"].abs().max() < 0.01
    assert (found["flat"] == 0).all()
    assert found["heavy"].abs().max() > 30
    assert found["ladder"].max() > 50
    assert found["ladder"].min() < 5


def test_a_ladder_rises_or_falls_from_key_to_key() -> None:
    slopes = set()
    for seed in range(300):
        case = replace(make("extreme", dtype="float32"), seed=seed)
        if variant(case) == "ladder":
            x = attend(build(case))[0].scores.x[0, 0, 0, 0]
            halves = x[:60].mean() - x[60:120].mean()
            slopes.add(bool(halves < -10) - bool(halves > 10))
    assert slopes == {-1, 1}


def test_extreme_sinks_are_infinite_huge_and_tiny() -> None:
    found = build(make("extreme", sinks=True, num_kv_heads=4)).arguments["rules"].sinks.tolist()
    assert {float("inf"), float("-inf"), 1e4, -1e4, 80.0, -80.0, 0.0} <= set(found)
    usual = build(make("normal", sinks=True, num_kv_heads=16)).arguments["rules"].sinks
    assert not (usual == torch.inf).any()
    assert usual[usual.isfinite()].abs().max() < 10


@pytest.mark.parametrize("causal", [True, False])
def test_a_tree_shows_every_token_its_ancestors(causal: bool) -> None:
    case = replace(
        make("normal", query_bias="tree", bias_width=20, causal=causal),
        batch=BatchShape(query_lens=(20, 30), seq_lens=(90, 30)),
    )
    masked = 0
    for seed in range(10):
        bias = build(replace(case, seed=seed)).arguments["rules"].query_bias
        for block in (bias[:20], bias[20:40]):
            sees = block == 0
            assert ((block == 0) | (block == -torch.inf)).all()
            masked += int((~sees.any(-1)).sum())
            assert not sees.triu(1).any()
            for token in sees.any(-1).nonzero().flatten().tolist():
                assert sees[token, token]
                for ancestor in sees[token].nonzero().flatten().tolist():
                    assert not sees[ancestor].any() or (sees[ancestor] <= sees[token]).all()
        assert ((bias[40:] == 0) | (bias[40:] == -torch.inf)).all()
    assert 0 < masked < 0.2 * 400


def test_a_dense_bias_has_numbers_and_masks() -> None:
    case = make("normal", query_bias="dense", bias_width=7)
    bias = build(replace(case, batch=BatchShape(query_lens=(40,), seq_lens=(90,)))).arguments["rules"].query_bias
    assert 0.05 < float((bias == -torch.inf).float().mean()) < 0.25
    assert 1.0 < float(bias[bias.isfinite()].std()) < 3.0


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_parts_of_a_merge_are_empty_now_and_then(recipe: str) -> None:
    case = Case(spec=Spec(operation="merge_states", head_size=8, num_kv_heads=4), recipe=recipe).with_batch(
        query_lens=(100,), seq_lens=(100,)
    )
    arguments = build(case).arguments
    lse_a, lse_b = arguments["lse_a"], arguments["lse_b"]
    empty_a, empty_b = lse_a == -torch.inf, lse_b == -torch.inf
    assert (empty_a & empty_b).any()
    assert (empty_a & ~empty_b).any()
    assert (empty_b & ~empty_a).any()
    assert (empty_a | empty_b).float().mean() < 0.3
    assert not (lse_a.isnan() | lse_b.isnan()).any()
    assert not ((lse_a == torch.inf) & (lse_b == torch.inf)).any()
    assert bool((lse_a == torch.inf).any()) == bool((lse_b == torch.inf).any()) == (recipe == "extreme")
    if recipe == "needle":
        finite = lse_a.isfinite() & lse_b.isfinite()
        assert (lse_a - lse_b)[finite].abs().max() < 1.0


UPDATE = Case(spec=Spec(operation="update_kv_cache", kv_dtype=FLOAT8, dtype="float32")).with_batch(
    query_lens=(30, 1, 0, 40), seq_lens=(30, 50, 0, 20), padding_tokens=5
)


@pytest.mark.parametrize("seed", range(5))
def test_slots_are_distinct_and_some_are_skipped(seed: int) -> None:
    arguments = build(replace(UPDATE, seed=seed).with_batch(shared_blocks=1)).arguments
    slots = arguments["slot_mapping"]
    assert slots.shape == (71,)
    assert arguments["key"].shape[0] == 76
    assert arguments["key"][71:].isnan().all()
    used = slots[slots >= 0]
    assert used.unique().numel() == used.numel()
    assert (slots[31:51] < 0).all()  # twenty tokens before position 0
    assert 0.02 < float((torch.cat((slots[:31], slots[51:])) < 0).float().mean()) < 0.4
    assert int(slots.min()) < -2
    assert int(used.max()) < arguments["k_cache"].shape[0] * 16


def test_the_needles_of_an_update_are_ties() -> None:
    for scales in ("none", "head"):
        case = replace(UPDATE, recipe="needle").with_spec(scales=scales)
        arguments = build(case).arguments
        scale = 1.0 if scales == "none" else arguments["scales"].k.double()[:, None]
        values = (arguments["key"][:71].double() / scale).abs()
        mantissa, _ = torch.frexp(values[values >= 2.0**-6])
        assert ((mantissa * 32).round() % 2 == 1).all()  # one bit more than float8_e4m3fn has
        assert torch.allclose(mantissa * 32, (mantissa * 32).round())


def test_an_extreme_update_saturates_and_underflows() -> None:
    key = build(replace(UPDATE, recipe="extreme")).arguments["key"][:71].double().abs()
    assert (key > 464).any()
    assert (key < 2.0**-10).any()
    assert key.isfinite().all()


def test_a_pool_that_is_written_starts_as_random_bytes() -> None:
    problem = build(UPDATE)
    for cache in problem.outputs.values():
        assert cache.contiguous().view(torch.uint8).unique().numel() == 256
    assert not torch.equal(*(cache.view(torch.uint8) for cache in problem.outputs.values()))
