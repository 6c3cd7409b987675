"""On a GPU the reference gives the CPU's answer, and writes the CPU's bytes."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from pageproof.reference import Batch, Rules, Scales, attention, mla_attention_decompressed, update_kv_cache

from .reference_cases import Problem, close, draw

DEVICE = torch.device("cuda")
FLOAT8 = torch.float8_e4m3fn


def moved(value: Tensor) -> Tensor:
    """The same values with the same strides in a copy of the storage."""
    storage = value.untyped_storage()
    flat = torch.empty(0, dtype=value.dtype).set_(storage).to(DEVICE)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


def fields_on_gpu(group: Batch | Rules) -> dict[str, Tensor]:
    values = {item.name: getattr(group, item.name) for item in fields(group)}
    return {name: moved(value) for name, value in values.items() if isinstance(value, Tensor)}


def on_gpu(problem: Problem) -> Problem:
    return replace(
        problem,
        q=moved(problem.q),
        k_cache=moved(problem.k_cache),
        v_cache=moved(problem.v_cache),
        batch=replace(problem.batch, **fields_on_gpu(problem.batch)),
        rules=replace(problem.rules, **fields_on_gpu(problem.rules)),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(800, 820))
def test_attention_agrees_with_the_cpu(seed: int) -> None:
    problem = draw(seed)
    out, lse = attention(*problem.arguments)
    gpu_out, gpu_lse = attention(*on_gpu(problem).arguments, validate=True)
    close(gpu_out.cpu(), out)
    close(gpu_lse.cpu(), lse)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FLOAT8])
def test_narrow_formats_agree_with_the_cpu(dtype: torch.dtype) -> None:
    """All but the rare value that stands within 1e-12 of a tie between two neighbours."""
    for seed in range(820, 826):
        problem = draw(seed)
        problem = replace(
            problem, q=problem.q.to(dtype), k_cache=problem.k_cache.to(dtype), v_cache=problem.v_cache.to(dtype)
        )
        shape = (*problem.q.shape[:2], problem.v_cache.shape[3])
        out, _ = attention(*problem.arguments, out=torch.empty(shape, dtype=dtype))
        gpu_out, _ = attention(*on_gpu(problem).arguments, out=torch.empty(shape, dtype=dtype, device=DEVICE))
        assert float((gpu_out.cpu().double() != out.double()).double().mean().nan_to_num(0.0)) < 1e-3


@pytest.mark.gpu
def test_decompressed_mla_agrees_with_the_cpu() -> None:
    problem = draw(830)
    generator = torch.Generator().manual_seed(0)
    q_nope, q_pe, cache, w_uk, w_uv = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in (
            (problem.q.shape[0], 4, 5),
            (problem.q.shape[0], 4, 3),
            (*problem.k_cache.shape[:2], 11),
            (4, 5, 8),
            (4, 6, 8),
        )
    )
    rules = Rules(softmax_scale=0.3, sliding_window=problem.rules.sliding_window)
    gpu_batch = on_gpu(problem).batch
    out, lse = mla_attention_decompressed(q_nope, q_pe, cache, w_uk, w_uv, problem.batch, rules)
    on_device = (tensor.to(DEVICE) for tensor in (q_nope, q_pe, cache, w_uk, w_uv))
    gpu_out, gpu_lse = mla_attention_decompressed(*on_device, gpu_batch, rules)
    close(gpu_out.cpu(), out)
    close(gpu_lse.cpu(), lse)


@pytest.mark.gpu
@pytest.mark.parametrize("scale_shape", [(), (1,), (3,)])
def test_float8_updates_write_the_cpus_bytes(scale_shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(4000, 3, 8, generator=generator) * 50
    scale = torch.rand(scale_shape, generator=generator) + 0.1
    slots = torch.randperm(5000, generator=generator)[:4000] - 500
    pools = []
    for device in (torch.device("cpu"), DEVICE):
        cache = torch.zeros(1250, 4, 3, 8, dtype=torch.uint8, device=device).view(FLOAT8)
        scales = Scales(k=scale.to(device), v=scale.to(device))
        rows = key.to(device)
        update_kv_cache(rows, rows, cache, cache.clone(), slots.to(device), scales=scales, validate=True)
        pools.append(cache.view(torch.uint8).cpu())
    assert int(pools[0].count_nonzero()) > 1000
    assert torch.equal(*pools)
