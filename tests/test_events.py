"""Boundary events are what their names say, and what a campaign may see of them was enumerated beforehand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pageproof.oracle.campaign.event_pairs import EventCounter, Reachable, reachable
from pageproof.oracle.campaign.events import CASE_NAMES, NAMES, NONE, Requests, occurs, of_case
from pageproof.oracle.campaign.lengths import COMPILED, INTERPRETED, SPLITS, Sizes
from pageproof.oracle.campaign.pairs import Model
from pageproof.oracle.campaign.parameters import BY_NAME
from pageproof.oracle.campaign.sampler import random_group
from pageproof.oracle.case import BatchShape, Case, Spec

PAGES = tuple(sorted({int(value) for value in (*BY_NAME["block_size"].values, *BY_NAME["block_size"].extra)}))


def events(n: int, length: int, split: int = NONE, shared: int = 0, requests: int = 1, **spec: object) -> set[str]:
    """The names that hold for a request of n new tokens and so many keys."""
    case = Case(
        spec=Spec(**spec),  # type: ignore[arg-type]
        batch=BatchShape(query_lens=(n,) * requests, seq_lens=(length,) * requests, shared_blocks=shared),
    )
    found = of_case(case, split)
    assert found is not None
    assert found.shape == (len(NAMES), 1)  # those that are alike once
    return {name for name, holds in zip(NAMES, found[:, 0], strict=True) if holds}


@pytest.mark.parametrize(
    ("request_of", "holds", "does_not"),
    [
        (dict(n=0, length=0), {"padding request"}, {"idle request", "no keys", "seq_len % 16 = 0"}),
        (dict(n=0, length=16), {"idle request"}, {"padding request", "seq_len % 16 = 0", "no context"}),
        (dict(n=1, length=0), {"no keys", "one new token"}, {"no context", "rows before the first key"}),
        (dict(n=1, length=1), {"one key", "no context"}, {"context % 16 = 0"}),
        (dict(n=3, length=2), {"rows before the first key"}, {"no context", "new tokens cross a page"}),
        (dict(n=2, length=49, block_size=48), {"new tokens cross a page", "seq_len % page = 1", "context % page = -1"},
         {"context % page = 0", "seq_len % page = -1"}),
        (dict(n=2, length=50, block_size=48), {"context % page = 0"}, {"new tokens cross a page"}),
        (dict(n=2, length=3, block_size=2), {"new tokens cross a page"}, {"context % page = 1", "seq_len % page = 1"}),
        (dict(n=17, length=17), {"new tokens % 16 = 1", "seq_len % 16 = 1"}, {"new tokens % 32 = 1"}),
        (dict(n=1, length=65, split=64), {"context % split = 0", "seq_len % split = 1", "two splits"}, {"one split"}),
        (dict(n=1, length=64, split=64), {"one split", "seq_len % split = 0"}, {"two splits"}),
        (dict(n=1, length=129, split=64), {"many splits"}, {"two splits"}),
        (dict(n=1, length=129), set(), {"many splits", "one split", "context % split = 0"}),
        (dict(n=1, length=100, split=64, sliding_window=36), {"a split left of the window", "window edge % split = 0"},
         {"window reaches the first key"}),
        (dict(n=1, length=100, split=64, sliding_window=37), {"window edge % 64 = -1"}, {"a split left of the window"}),
        (dict(n=1, length=11, sliding_window=10), {"context = window", "seq_len = window + 1"},
         {"window reaches the first key"}),
        (dict(n=1, length=10, sliding_window=10), {"context = window - 1", "seq_len = window",
         "window reaches the first key"}, {"context = window"}),
        (dict(n=2, length=13, sliding_window=10), {"context = window + 1"}, {"window ends within the new tokens"}),
        (dict(n=2, length=13, sliding_window=1), {"window ends within the new tokens"}, {"context = window"}),
        (dict(n=3, length=9, causal=False, right_window=1), {"right window ends before the last key"},
         {"right window ends at the last key"}),
        (dict(n=3, length=9, causal=False, right_window=2), {"right window ends at the last key"},
         {"right window ends before the last key"}),
        (dict(n=3, length=9, query_bias="tree", bias_width=2), {"bias narrower than the new tokens"},
         {"bias as wide as the new tokens", "bias wider than the new tokens"}),
        (dict(n=3, length=9, query_bias="tree", bias_width=3), {"bias as wide as the new tokens"}, set()),
        (dict(n=3, length=9, query_bias="tree", bias_width=4), {"bias wider than the new tokens"}, set()),
        (dict(n=1, length=17, shared=1, requests=2), {"shared pages"}, {"shared pages only"}),
        (dict(n=1, length=16, shared=1, requests=2), {"shared pages", "shared pages only"}, set()),
        (dict(n=1, length=16, shared=1), set(), {"shared pages"}),
    ],
)  # fmt: skip
def test_an_event_is_what_its_name_says(request_of: dict[str, int], holds: set[str], does_not: set[str]) -> None:
    assert holds | does_not <= set(NAMES)
    found = events(**request_of)  # type: ignore[arg-type]
    assert holds <= found
    assert not does_not & found


def test_residues_are_those_of_python() -> None:
    generator = random.Random(0)
    for _ in range(300):
        page, split = generator.choice((8, 48)), generator.choice((64, 256))
        n, length = generator.randint(1, 130), generator.randint(0, 600)
        window = generator.randint(1, 200)
        found = events(n, length, split, block_size=page, sliding_window=window)
        context = length - n
        measures = {"context": context, "seq_len": length, "window edge": context - window + 1}
        for (measure, value), modulus in itertools.product(measures.items(), (page, 16, 32, 64, 128, split)):
            named = {page: "page", split: "split"}.get(modulus, str(modulus))
            if modulus == split == 64:
                named = "64"
            for residue, rest in (("0", 0), ("1", 1), ("-1", modulus - 1)):
                assert (f"{measure} % {named} = {residue}" in found) == (value > 0 and value % modulus == rest)


def test_counters_of_several_processes_add_up() -> None:
    cases = [
        Case(batch=BatchShape(query_lens=(1, n), seq_lens=(17, 16 + n), padding_tokens=n % 2)) for n in range(1, 20)
    ]
    whole, parts = EventCounter(), [EventCounter(), EventCounter()]
    for index, case in enumerate(cases):
        whole.add(case, 64)
        parts[index % 2].add(case, 64)
    assert parts[0] != whole
    parts[0].merge(parts[1])
    assert parts[0] == whole
    assert whole.cases["padding tokens"] == 10
    assert whole.cases["one new token"] == 19  # a case counts once, however many of its requests have the event


def test_a_pair_of_events_is_one_of_the_same_request() -> None:
    both = Case(batch=BatchShape(query_lens=(1, 5), seq_lens=(32, 21)))
    counter = EventCounter()
    counter.add(both)
    first, second, third = (NAMES.index(name) for name in ("one new token", "seq_len % 32 = 0", "context % 16 = 0"))
    assert counter.together[first, second]
    assert counter.together[third, third]
    assert not counter.together[first, third]


def test_other_operations_have_no_events() -> None:
    counter = EventCounter()
    for operation in ("update_kv_cache", "merge_states"):
        counter.add(Case(spec=Spec(operation=operation), batch=BatchShape(query_lens=(1,), seq_lens=(16,))))
    assert counter == EventCounter()


def small_world() -> Iterator[Requests]:
    """Every request of up to 40 keys and 18 new tokens on pages of 8, with every window, bias, and shared page."""
    n, length = (grid.ravel() for grid in np.meshgrid(np.arange(19), np.arange(41)))
    for window in range(44):
        yield Requests(new_tokens=n, seq_lens=length, page=8, window=np.full_like(n, window))
        for right, bias, shared in itertools.product(range(-1, 20), range(20), (0, 8, 16)):
            alone = sum((right >= 0, bias > 0, shared > 0)) == 1
            if alone or (right in (-1, 0, 3, 16) and bias in (0, 1, 18)):
                changes = {"right_window": right, "bias_width": bias, "shared_keys": shared}
                yield Requests(new_tokens=n, seq_lens=length, page=8, window=window, **changes)


def test_what_is_reachable_is_what_every_small_request_has() -> None:
    """The enumeration looks at edges only; within small sizes, looking at everything finds no more and no less."""
    together = np.zeros((len(NAMES), len(NAMES)), dtype=bool)
    for requests in small_world():
        found = occurs(requests).astype(np.float32)
        together |= found @ found.T > 0
    enumerated = reachable((8,), 18, 40)
    either = np.tril(together, -1)
    assert [(NAMES[a], NAMES[b]) for a, b in np.argwhere(either & ~enumerated.together)] == []
    assert [(NAMES[a], NAMES[b]) for a, b in np.argwhere(enumerated.together & ~either)] == []
    assert enumerated.num_pairs > 800


@pytest.fixture(scope="module", params=[(INTERPRETED, 64, 800), (COMPILED, 256, 60)], ids=["interpreted", "compiled"])
def drawn(request: pytest.FixtureRequest) -> tuple[EventCounter, Reachable]:
    """What the cases of a short campaign have, and what was enumerated for their sizes."""
    sizes: Sizes
    sizes, split, groups = request.param
    counter = EventCounter()
    for index in range(groups):
        for case in random_group(5, index, replace(sizes, cases_per_key=min(20, sizes.cases_per_key))).cases(
            Model(extra=True), sizes
        ):
            counter.add(case, split)
    return counter, reachable(PAGES, sizes.tokens, max(sizes.keys, 2 * max(SPLITS) + 1), split)


def test_nothing_is_seen_that_was_not_enumerated(drawn: tuple[EventCounter, Reachable]) -> None:
    counter, enumerated = drawn
    beyond = np.tril(counter.together, -1) & ~enumerated.together
    assert [(NAMES[a], NAMES[b]) for a, b in np.argwhere(beyond)] == []
    assert set(counter.cases) <= {*enumerated.events, *CASE_NAMES}


def test_a_short_campaign_sees_nearly_every_event(drawn: tuple[EventCounter, Reachable]) -> None:
    counter, enumerated = drawn
    assert len(enumerated.missing_events(counter)) <= 3
    assert len(enumerated.missing_pairs(counter)) < enumerated.num_pairs // 4
