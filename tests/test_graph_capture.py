"""One captured step serves every mix that fits into its bucket: capture one profile, replay the opposite ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .graph_bucket import Bucket, Sizes, same_bits

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")

NUM_TOKENS, NUM_REQUESTS, SEQ_LEN = 256, 12, 3072
SIZES = Sizes(
    num_tokens=NUM_TOKENS,
    num_requests=NUM_REQUESTS,
    seq_len=SEQ_LEN,
    block_size=16,
    num_kv_heads=2,
    group=3,
    head_size=64,
    kv_lora_rank=128,
    rope=32,
)

# (query length, sequence length) of each request; the rest of the bucket's requests are padding.
MIXES: dict[str, list[tuple[int, int]]] = {
    "decode": [(1, 300 + 97 * i) for i in range(NUM_REQUESTS)],
    "prefill": [(100, 100), (100, 1500), (56, 700)],
    "speculative": [(5, 40 * i + 5) for i in range(NUM_REQUESTS)],
    "mixed": [(1, 3072), (4, 900), (64, 64), (1, 1), (16, 257), (17, 256), (0, 0), (90, 2000)],
    "empty": [],
    "full": [(NUM_TOKENS, SEQ_LEN)],
    "full of requests": [(21, 21 + 200 * i) for i in range(NUM_REQUESTS)],
    "one token": [(1, 2)],
    "longer than its keys": [(7, 3), (20, 5)],
}


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts every capture and replay that really happens."""
    counts: Counter[str] = Counter()
    for method in ("capture_begin", "replay"):
        original = getattr(torch.cuda.CUDAGraph, method)

        def counted(
            self: object,
            *args: object,
            method: str = method,
            original: Callable[..., None] = original,
            **kwargs: object,
        ) -> None:
            counts[method] += 1
            original(self, *args, **kwargs)

        monkeypatch.setattr(torch.cuda.CUDAGraph, method, counted)
    return counts


def capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles; a kernel may not be loaded for the first time inside a capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def close(actual: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(
        actual.double(), wanted.double(), rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize("captured_mix", ["decode", "prefill", "empty", "full"])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-5),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.float16, torch.float8_e4m3fn, 4e-3),
    ],
    ids=["float32", "bfloat16", "float8"],
)
def test_one_capture_serves_every_mix(
    captured_mix: str, dtype: torch.dtype, kv_dtype: torch.dtype, tolerance: float, captures: Counter[str]
) -> None:
    bucket = Bucket(dtype, kv_dtype, SIZES, DEVICE)
    bucket.load(MIXES[captured_mix])
    graph, results = capture(bucket.step)
    for name, requests in MIXES.items():
        bucket.load(requests)
        expected = bucket.expected()
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        rows = int(bucket.batch.cu_seqlens_q[-1])
        replayed = [result.clone() for result in results]
        for index, (actual, wanted) in enumerate(zip(replayed, expected, strict=False)):
            close(actual, wanted, tolerance, f"{name}, result {index}")
            padding = actual[rows:]
            assert bool((padding == (0.0 if actual.dim() == 3 else -torch.inf)).all()), f"{name}: padding rows"
        assert same_bits(bucket.k_cache, expected[-2]), f"{name}: the key pool"
        assert same_bits(bucket.v_cache, expected[-1]), f"{name}: the value pool"
        eager = bucket.step()
        assert all(map(same_bits, eager, replayed)), f"{name}: eager and replayed bits differ"
    assert captures == {"capture_begin": 1, "replay": len(MIXES)}


def test_a_replay_reads_scales_and_rules_on_the_device() -> None:
    bucket = Bucket(torch.float16, torch.float8_e4m3fn, SIZES, DEVICE)
    bucket.load(MIXES["decode"])
    graph, results = capture(bucket.step)
    assert bucket.scales is not None
    assert bucket.scales.k is not None
    sinks = bucket.layers[1].sinks
    assert sinks is not None
    bucket.scales.k.mul_(1.7)
    sinks.add_(1.0)
    bucket.load(MIXES["mixed"])
    expected = bucket.expected()
    graph.replay()
    for index, (actual, wanted) in enumerate(zip(results, expected, strict=False)):
        close(actual, wanted, 4e-3, f"result {index}")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_in_a_step_synchronises() -> None:
    bucket = Bucket(torch.bfloat16, torch.bfloat16, SIZES, DEVICE)
    bucket.load(MIXES["mixed"])
    bucket.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bucket.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
