"""The generator is what it says it is, on the host and on a device, and never drifts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from pageproof.oracle.building import pinned
from pageproof.oracle.building.hashing import hashed, host_hashes, host_normals, index_terms, normals, stream_key


def lowbias32(x: int) -> int:
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ x >> shift) * multiplier % 2**32
    return x


def test_host_and_device_hash_as_the_definition_does() -> None:
    rows = np.array([0, 1, 5, 2**21 + 3], dtype=np.int64)
    row_terms, column_terms = (torch.from_numpy(term) for term in index_terms(3, "k", rows, 2049))
    found = hashed([(row_terms, column_terms)] * 2)
    multiplier, offset = stream_key(3, "k")
    indices = [[row * 2049 + column for column in range(2049)] for row in rows.tolist()]
    expected = [[lowbias32((index * multiplier + offset) % 2**32) for index in row] for row in indices]
    assert np.array_equal(found.numpy().view(np.uint32).reshape(2, 4, 2049), np.array([expected] * 2, dtype=np.uint32))
    assert np.array_equal(host_hashes(3, "k", 4098), np.array(expected[0] + expected[1], dtype=np.uint32))
    assert np.array_equal(host_normals(host_hashes(3, "k", 2049)), normals(found[:2049]).numpy())


def test_normal_values_are_nearly_normal() -> None:
    values = host_normals(host_hashes(1, "q", 400_000)).astype(np.float64)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1.02) < 0.01
    assert np.abs(values).max() <= 2.5
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01
    # Enough bits that a product in a narrower format than float32 shows.
    assert np.mean(values.astype(np.float32).view(np.uint32) & 0x1FFF != 0) > 0.5


def test_streams_differ_by_seed_and_by_name() -> None:
    streams = [host_hashes(seed, name, 1000) for seed, name in itertools.product((0, 1), ("q", "k"))]
    for one, other in itertools.combinations(streams, 2):
        assert not np.intersect1d(one, other).size > 2


def test_no_bit_has_moved() -> None:
    assert pinned.drift("cpu") is None


def test_a_moved_bit_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(pinned.CASES))
    changed = replace(pinned.CASES[name], seed=pinned.CASES[name].seed + 1)
    monkeypatch.setitem(pinned.CASES, name, changed)
    assert f"case {name!r}" in str(pinned.drift("cpu"))


@pytest.mark.gpu
def test_no_bit_differs_on_a_gpu() -> None:
    assert pinned.drift("cuda") is None
