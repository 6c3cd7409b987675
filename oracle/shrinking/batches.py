"""Smaller cases for the kernels that are compiled already: the batch, the data, and numbers that are no constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from ..case import MODES, RECIPES, REPLAYS, BatchShape, Case
from .reducing import Trials, fewest, first_of, lowest

Request = tuple[int, int]  # (new tokens, keys)

EDGES = (16, 32, 64, 128, 256, 1024, 4096)  # where tiles and splits of kernels end
_LENGTHS = ("query_lens", "seq_lens")


def smaller(case: Case) -> Trials[Case]:
    """The case with as little in it as its compile key allows."""
    for step in (_fewer_requests, _plainer_data, _shorter_together, _shorter_one_by_one, _narrower):
        case = yield from step(case)
    return case


def requests_of(case: Case) -> list[Request]:
    return list(zip(case.batch.query_lens, case.batch.seq_lens, strict=True))


def with_requests(case: Case, requests: Sequence[Request]) -> Case:
    return case.with_batch(query_lens=tuple(n for n, _ in requests), seq_lens=tuple(length for _, length in requests))


def _fewer_requests(case: Case) -> Trials[Case]:
    kept = yield from fewest(requests_of(case), lambda requests: with_requests(case, requests))
    return with_requests(case, kept)


def _plainer_data(case: Case) -> Trials[Case]:
    """Nothing extra in the batch, normal values, seed 0, a plain call, only the answer checked, nothing poisoned."""
    plain = _plain_parts(case)

    def case_with(kept: Sequence[str]) -> Case:
        return _with_parts(case, {name: value for name, value in plain.items() if name not in kept})

    case = case_with((yield from fewest(list(plain), case_with)))
    for name in _extras(case.batch):
        held = getattr(case.batch, name)
        less = yield from lowest(held, (1,), partial(_with_extra, case, name))
        case = _with_extra(case, name, less)
    case = _with_poison(case, (yield from fewest(case.poison, partial(_with_poison, case))))
    if case.mode != MODES[0]:
        case = _with_replays(
            case, (yield from lowest(case.replays, range(1, case.replays), partial(_with_replays, case)))
        )
    simpler = RECIPES[: RECIPES.index(case.recipe)]
    return _with_recipe(case, (yield from first_of(simpler, case.recipe, partial(_with_recipe, case))))


def _with_extra(case: Case, name: str, number: int) -> Case:
    return case.with_batch(**{name: number})


def _with_poison(case: Case, tiers: Sequence[str]) -> Case:
    return replace(case, poison="".join(tiers))


def _with_replays(case: Case, replays: int) -> Case:
    return replace(case, replays=replays)


def _with_recipe(case: Case, name: str) -> Case:
    return replace(case, recipe=name)


def _with_width(case: Case, name: str, width: int) -> Case:
    return case.with_spec(**{name: width})


def _plain_parts(case: Case) -> dict[str, Any]:
    """What is not as plain as it could be, by name, and how it would be."""
    plain = {"recipe": RECIPES[0], "mode": MODES[0], "cache_groups": 1, "check": "answer", "poison": "", "seed": 0}
    parts = {name: value for name, value in plain.items() if getattr(case, name) != value}
    return parts | {name: getattr(BatchShape(), name) for name in _extras(case.batch)}


def _with_parts(case: Case, parts: dict[str, Any]) -> Case:
    batch = {name: value for name, value in parts.items() if hasattr(case.batch, name)}
    if "mode" in parts:  # a plain call has neither replays nor layers
        parts = {**parts, "replays": REPLAYS, "cache_groups": 1}
    return replace(case, **{name: parts[name] for name in parts if name not in batch}).with_batch(**batch)


def _extras(batch: BatchShape) -> list[str]:
    """What the batch has beside its requests: padding rows, unused columns and the like."""
    names = [item.name for item in fields(batch) if item.name not in _LENGTHS]
    return [name for name in names if getattr(batch, name) != getattr(BatchShape(), name)]


def edges(case: Case) -> list[int]:
    """Lengths at which something ends: nothing, one token, pages, windows, tiles and splits, and their neighbours."""
    spec = case.spec
    ends = (spec.block_size, *(window for window in (spec.sliding_window, spec.right_window) if window), *EDGES)
    return sorted({0, 1, 2, *(end + delta for end in ends for delta in (-1, 0, 1))})


def _shorter_together(case: Case) -> Trials[Case]:
    """No request longer than a few keys, and none with more than a few new tokens."""
    requests = requests_of(case)
    if len(requests) < 2:
        return case

    def no_longer(keys: int) -> Case:
        return with_requests(case, [(min(n, keys) if n <= length else n, min(length, keys)) for n, length in requests])

    case = no_longer((yield from lowest(max(length for _, length in requests), edges(case), no_longer)))
    requests = requests_of(case)

    def no_wider(tokens: int) -> Case:
        return with_requests(case, [(min(n, tokens), length) for n, length in requests])

    return no_wider((yield from lowest(max(n for n, _ in requests), edges(case)[1:], no_wider)))


def _shorter_one_by_one(case: Case) -> Trials[Case]:
    for index in range(case.batch.num_requests):
        case = yield from _shorter_request(case, index)
    return case


def _shorter_request(case: Case, index: int) -> Trials[Case]:
    """New tokens with their keys, then keys alone, then new tokens alone; a request with more keys than tokens does
    not become one with fewer."""
    requests, steps = requests_of(case), edges(case)
    n, length = requests[index]

    def case_with(request: Request) -> Case:
        return with_requests(case, [*requests[:index], request, *requests[index + 1 :]])

    context = length - n
    if context >= 0:
        n = yield from lowest(n, steps[1:], lambda tokens: case_with((tokens, tokens + context)))
        length = n + context
    fewest_keys = n if context >= 0 else 0
    keys = [step for step in (fewest_keys, *steps) if step >= fewest_keys]
    length = yield from lowest(length, keys, lambda keys: case_with((n, keys)))
    n = yield from lowest(n, steps[1:], lambda tokens: case_with((tokens, length)))
    return case_with((n, length))


def _narrower(case: Case) -> Trials[Case]:
    """Windows together with the lengths beyond them, then windows and the bias alone."""
    spec, requests = case.spec, requests_of(case)
    window = spec.sliding_window
    if window is not None:

        def nearer(width: int) -> Case:
            cut = window - width
            shorter = [(n, max(min(n, length), length - cut)) for n, length in requests]
            return with_requests(case, shorter).with_spec(sliding_window=width)

        case = nearer((yield from lowest(window, edges(case)[1:], nearer)))
    for name in ("sliding_window", "right_window", "bias_width"):
        width = getattr(case.spec, name)
        if width:
            steps = edges(case) if name == "right_window" else edges(case)[1:]
            case = _with_width(case, name, (yield from lowest(width, steps, partial(_with_width, case, name))))
    return case
