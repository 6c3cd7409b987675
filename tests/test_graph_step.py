"""Our operators in an emulated capture: one captured step serves every mix of its bucket, bit for bit as eagerly."""

from __future__ import annotations

import pytest
import torch

from pageproof.optimized import interpreter
from pageproof.oracle.execution.graphs.emulation import EmulatedBackend
from pageproof.oracle.execution.graphs.interface import capture

from .graph_bucket import Bucket, Sizes, same_bits

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels are compiled here, not interpreted")

SIZES = Sizes(
    num_tokens=20,
    num_requests=3,
    seq_len=64,
    block_size=16,
    num_kv_heads=1,
    group=2,
    head_size=16,
    kv_lora_rank=16,
    rope=16,
)
MIXES = {
    "decode": [(1, 60), (1, 1), (1, 33)],
    "prefill": [(17, 40), (3, 3)],
    "speculative": [(4, 60), (4, 4)],
    "mixed": [(1, 64), (2, 20), (17, 18)],
    "empty": [],
    "full": [(20, 64)],
}


def test_one_capture_serves_every_mix() -> None:
    backend = EmulatedBackend()
    bucket = Bucket(torch.float16, torch.float8_e4m3fn, SIZES, backend.device)
    bucket.load(MIXES["decode"])
    backend.warm_up(bucket.step)
    with capture(backend, backend.new_pool()) as graph:
        results = bucket.step()
    for name, requests in MIXES.items():
        bucket.load(requests)
        before = [cache.clone() for cache in (bucket.k_cache, bucket.v_cache)]
        graph.replay()
        replayed = [tensor.clone() for tensor in (*results, bucket.k_cache, bucket.v_cache)]
        for cache, values in zip((bucket.k_cache, bucket.v_cache), before, strict=True):
            cache.copy_(values)
        eager = [*bucket.step(), bucket.k_cache, bucket.v_cache]
        assert all(map(same_bits, replayed, eager)), name
    assert graph.replays == len(MIXES)
