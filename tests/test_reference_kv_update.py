"""A cache update writes exactly the rows it was given, in the right format, and no other byte of the pool."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pageproof.reference import Scales, update_kv_cache, update_mla_cache

FLOAT8 = torch.float8_e4m3fn
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCKS, BLOCK_SIZE, HEADS, SIZE, SIZE_V = 5, 4, 3, 6, 4

# A pool of bytes and the two caches in it, as [num_blocks, block_size, num_kv_heads, size].
Pool = tuple[Tensor, Tensor, Tensor]


def packed(dtype: torch.dtype) -> Pool:
    k_shape, v_shape = (BLOCKS, BLOCK_SIZE, HEADS, SIZE), (BLOCKS, BLOCK_SIZE, HEADS, SIZE_V)
    k_count, v_count = (torch.Size(shape).numel() for shape in (k_shape, v_shape))
    pool = garbage((k_count + v_count,), dtype)
    return pool, pool[:k_count].view(k_shape), pool[k_count:].view(v_shape)


def interleaved(dtype: torch.dtype) -> Pool:
    pool = garbage((BLOCKS, BLOCK_SIZE, HEADS, SIZE + SIZE_V), dtype)
    return pool, pool[..., :SIZE], pool[..., SIZE:]


def head_major(dtype: torch.dtype) -> Pool:
    pool = garbage((BLOCKS, HEADS, BLOCK_SIZE, SIZE + SIZE_V + 1), dtype)
    return pool, pool[..., :SIZE].transpose(1, 2), pool[..., SIZE + 1 :].transpose(1, 2)


def size_major(dtype: torch.dtype) -> Pool:
    """Not even the head size is contiguous, and pages come in reverse of nothing in particular."""
    pool = garbage((2, SIZE, HEADS, BLOCK_SIZE + 1, BLOCKS), dtype)
    caches = pool.permute(0, 4, 3, 2, 1)[:, :, :BLOCK_SIZE]
    return pool, caches[0], caches[1][..., :SIZE_V]


LAYOUTS: list[Callable[[torch.dtype], Pool]] = [packed, interleaved, head_major, size_major]


def garbage(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bytes, NaN patterns among them."""
    generator = torch.Generator().manual_seed(1)
    integers = INTEGERS[dtype.itemsize]
    info = torch.iinfo(integers)
    return torch.randint(info.min, info.max, shape, generator=generator, dtype=integers).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


def rows(count: int, size: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(count, HEADS, size, generator=torch.Generator().manual_seed(count + size)) * 3
    values[0, 0, 0], values[1, 0, 0], values[2, 1, 0] = float("nan"), -0.0, float("inf")
    return values.to(dtype)


SLOTS = [7, -1, 0, 19, 8, -5, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mapped_rows_move_bit_for_bit_and_nothing_else_changes(layout: Callable, dtype: torch.dtype) -> None:
    pool, k_cache, v_cache = layout(dtype)
    key, value = rows(9, SIZE, dtype), rows(9, SIZE_V, dtype)  # two rows of padding
    update_kv_cache(key, value, k_cache, v_cache, torch.tensor(SLOTS), validate=True)
    expected_pool, expected_k, expected_v = layout(dtype)
    for i, slot in enumerate(SLOTS):
        if slot >= 0:
            bits(expected_k)[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = bits(key)[i]
            bits(expected_v)[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = bits(value)[i]
    assert torch.equal(bits(pool), bits(expected_pool))


def nearest_float8(value: float) -> float:
    """By search over all 256 patterns; the even one of two equally near."""
    grid = torch.arange(256, dtype=torch.uint8).view(FLOAT8).double().tolist()
    if value != value:
        return value
    value = max(-448.0, min(448.0, value))
    near = sorted((abs(entry - value), pattern % 2, pattern) for pattern, entry in enumerate(grid) if entry == entry)
    return grid[near[0][2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scaled", ["not", "per tensor", "per head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float8_store_divides_clamps_and_rounds_to_even(layout: Callable, scaled: str, dtype: torch.dtype) -> None:
    scales = {
        "not": None,
        "per tensor": Scales(k=torch.tensor(0.3), v=torch.tensor([0.007])),
        "per head": Scales(k=torch.tensor([0.3, 0.1, 0.7]), v=torch.tensor([0.007, 3.3, 0.01])),
    }[scaled]
    pool, k_cache, v_cache = layout(FLOAT8)
    key, value = rows(7, SIZE, dtype), rows(7, SIZE_V, dtype)
    update_kv_cache(key, value, k_cache, v_cache, torch.tensor(SLOTS), scales=scales, validate=True)
    expected_pool, expected_k, expected_v = layout(FLOAT8)
    for source, cache, scale in ((key, expected_k, scales and scales.k), (value, expected_v, scales and scales.v)):
        factors = torch.ones(HEADS) if scale is None else scale.expand(HEADS)
        for i, slot in enumerate(SLOTS):
            if slot < 0:
                continue
            quotient = source[i].float() / factors[:, None]
            wanted = torch.tensor([[nearest_float8(x) for x in head] for head in quotient.tolist()]).to(FLOAT8)
            written = cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE]
            bits(written).copy_(bits(torch.where(quotient == 0, quotient, wanted.float()).to(FLOAT8)))
    same_nan = pool.view(FLOAT8).float().isnan() & expected_pool.float().isnan()
    assert bool(((bits(pool) == bits(expected_pool)) | same_nan).all())
    untouched = torch.ones(BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    untouched[[slot for slot in SLOTS if slot >= 0]] = False
    fresh_k = layout(FLOAT8)[1]
    kept = untouched.view(BLOCKS, BLOCK_SIZE)
    assert torch.equal(bits(k_cache)[kept], bits(fresh_k)[kept])


def test_the_quotient_is_divided_not_multiplied_by_a_reciprocal() -> None:
    """On quotients near ties the two land on different values."""
    scales = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.1
    grid = torch.arange(8, 126, dtype=torch.uint8).view(FLOAT8).float()
    key = (grid[1:] + grid[:-1]) / 2 * scales[:, None]
    cache = torch.zeros(1, 1, 64, key.shape[1]).to(FLOAT8)
    store = Scales(k=scales, v=scales)
    update_kv_cache(key[None], key[None], cache.clone(), cache, torch.tensor([0]), scales=store)
    divided, multiplied = key / scales[:, None], key * (1 / scales)[:, None]
    assert int((divided.to(FLOAT8).float() != multiplied.to(FLOAT8).float()).sum()) > 100
    assert torch.equal(bits(cache[0, 0]), bits(divided.to(FLOAT8)))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FLOAT8])
def test_mla_row_is_latent_then_k_pe_with_one_scale(cache_dtype: torch.dtype) -> None:
    buffer = garbage((BLOCKS, BLOCK_SIZE, 16), cache_dtype)
    cache = buffer[..., 2:12]
    before = bits(buffer).clone()
    latent, k_pe = rows(7, 7, torch.bfloat16)[:, 0], rows(7, 3, torch.bfloat16)[:, 0]
    scales = Scales(k=torch.tensor([0.3])) if cache_dtype == FLOAT8 else None
    update_mla_cache(latent, k_pe, cache, torch.tensor(SLOTS), scales=scales, validate=True)
    for i, slot in enumerate(SLOTS):
        if slot < 0:
            continue
        row = torch.cat((latent[i], k_pe[i]))
        if scales is not None:
            row = (row.float() / scales.k).clamp(-448, 448).to(FLOAT8)
        written = cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE]
        assert torch.equal(written.float().nan_to_num(nan=1e9), row.float().nan_to_num(nan=1e9))
        before[slot // BLOCK_SIZE, slot % BLOCK_SIZE, 2:12] = bits(written)
    assert torch.equal(bits(buffer), before)


def test_nothing_to_write() -> None:
    cache = garbage((2, 4, 1, 3), torch.float32)
    before = bits(cache).clone()
    for slots in ([], [-1, -9]):
        key = torch.zeros(2, 1, 3)
        update_kv_cache(key, key, cache, cache, torch.tensor(slots, dtype=torch.int64), validate=True)
    assert torch.equal(bits(cache), before)
