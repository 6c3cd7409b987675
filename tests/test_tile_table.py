"""Tiles fit into the shared memory of every architecture in the table, for every size, and sm_90 has the measured ones.

By `shared_bytes`, which says how it compares with what Triton takes; compiling for all of these would take minutes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pageproof.optimized.tile_table import (
    ARCHITECTURES,
    MEASURED,
    Architecture,
    Need,
    Operands,
    Tiles,
    choose_tiles,
    nearest_architecture,
    shared_bytes,
)

PADDED = (16, 32, 64, 128, 256)  # head sizes 16 to 256
REGIMES = {"prefill": True, "decode": False}
DEVICES = [name for name in ARCHITECTURES if name != "interpreter"]


def attention(prefill: bool, itemsize: int, key: int, value: int, *, loaded: bool = True) -> Need:
    return Need(prefill, Operands.LOADED if loaded else Operands.COMPUTED, itemsize, key, value, group=4)


def absorbed(prefill: bool, itemsize: int, group: int, *, rank: int = 512, loaded: bool = True) -> Need:
    return Need(prefill, Operands.LATENT if loaded else Operands.CAST_LATENT, itemsize, rank + 64, rank, group)


def all_needs(prefill: bool) -> Iterator[Need]:
    for itemsize in (2, 4):
        for loaded in (True, False):
            for key in PADDED:
                for value in PADDED:
                    yield attention(prefill, itemsize, key, value, loaded=loaded)
            for group in (1, 16, 128):
                for rank in (64, 128, 256, 512):
                    yield absorbed(prefill, itemsize, group, rank=rank, loaded=loaded)
        yield attention(prefill, itemsize, 128 + 64, 128, loaded=False)  # decompressed MLA


@pytest.mark.parametrize("prefill", REGIMES.values(), ids=REGIMES)
@pytest.mark.parametrize("name", DEVICES)
def test_every_choice_fits(name: str, prefill: bool) -> None:
    device = ARCHITECTURES[name]
    for need in all_needs(prefill):
        assert shared_bytes(device, choose_tiles(name, need), need) <= device.shared_memory, need


@pytest.mark.parametrize(
    ("need", "tiles", "found"),
    [
        (attention(True, 2, 128, 128), Tiles(128, 64, 8, 3), 131_072),
        (attention(False, 2, 128, 128), Tiles(16, 64, 4, 3, wide_m=64), 114_688),
        (absorbed(True, 2, 128), Tiles(64, 64, 8, 2), 229_376),
    ],
    ids=["prefill", "decode", "latent"],
)
def test_the_bytes_are_those_that_triton_takes_for_the_measured_tiles(need: Need, tiles: Tiles, found: int) -> None:
    assert shared_bytes(ARCHITECTURES["sm_90"], tiles, need) == found


@pytest.mark.parametrize(
    ("need", "tiles"),
    [
        (attention(True, 2, 128, 128), Tiles(128, 64, 8, 3)),
        (attention(False, 2, 128, 128), Tiles(16, 64, 4, 3, wide_m=64)),
        (attention(True, 2, 256, 256), Tiles(32, 32, 4, 2)),
        (attention(True, 2, 64, 64, loaded=False), Tiles(64, 64, 4, 2)),
        (attention(True, 2, 64, 32), Tiles(32, 64, 4, 2)),
        (attention(False, 2, 256, 256), Tiles(16, 32, 4, 2)),
        (attention(True, 4, 64, 64), Tiles(32, 32, 4, 2)),
        (absorbed(True, 2, 16), Tiles(64, 64, 8, 2)),
        (absorbed(False, 2, 128), Tiles(64, 64, 8, 2)),
        (absorbed(False, 2, 16), Tiles(16, 32, 4, 3)),
        (absorbed(True, 4, 16), Tiles(16, 16, 4, 2)),
        (absorbed(False, 2, 128, loaded=False), Tiles(16, 16, 4, 2)),
    ],
)
def test_an_h200_has_the_tiles_that_were_measured(need: Need, tiles: Tiles) -> None:
    assert choose_tiles("sm_90", need) == tiles


def test_wide_products_need_64_columns() -> None:
    """Triton 3.6 computes others wrongly on sm_90."""
    for need in all_needs(prefill=True):
        tiles = choose_tiles("sm_90", need)
        if tiles.block_m >= 64:
            assert min(tiles.block_n, need.value_columns) >= 64, need


def test_a_table_whose_first_rows_do_not_fit_has_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    need = attention(True, 2, 128, 128)
    for shared_memory, tiles in (
        (131_072, MEASURED[0].tiles),
        (131_071, Tiles(64, 64, 4, 2)),
        (1, Tiles(16, 16, 4, 2)),
    ):
        monkeypatch.setitem(ARCHITECTURES, "small", Architecture(shared_memory, MEASURED))
        assert choose_tiles("small", need) == tiles


@pytest.mark.parametrize(
    ("name", "shared_memory", "nearest"),
    [
        ("sm_90", 232_448, "sm_90"),
        ("sm_103", 232_448, "sm_100"),
        ("sm_120", 101_376, "sm_86"),
        ("sm_87", 166_912, "sm_80"),
        ("hip", 65_536, "gfx9"),
        ("hip", 163_840, "sm_86"),
        ("sm_75", 49_152, "gfx9"),
    ],
)
def test_an_unknown_device_has_the_largest_tiles_that_fit_it(name: str, shared_memory: int, nearest: str) -> None:
    assert nearest_architecture(name, shared_memory) == nearest
