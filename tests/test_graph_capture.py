"""One captured step serves every mix that fits into its bucket: capture one profile, replay the opposite ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from pageproof import optimized, reference
from pageproof.optimized import Batch, Capacity, Rules, Scales

pytestmark = pytest.mark.gpu

NUM_TOKENS, NUM_REQUESTS, SEQ_LEN, BLOCK_SIZE = 256, 12, 3072, 16
NUM_KV_HEADS, GROUP, HEAD_SIZE = 2, 3, 64
NUM_BLOCKS = NUM_REQUESTS * SEQ_LEN // BLOCK_SIZE + 1
KV_LORA_RANK, ROPE = 128, 32

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


@dataclass
class Bucket:
    """Persistent buffers of one token bucket, refilled between replays as an engine does."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator("cuda").manual_seed(7))

    def __post_init__(self) -> None:
        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device="cuda")

        heads = NUM_KV_HEADS * GROUP
        self.q = zeros(NUM_TOKENS, heads, HEAD_SIZE, dtype=self.dtype)
        self.key = zeros(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE, dtype=self.dtype)
        self.value = zeros(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE, dtype=self.dtype)
        self.q_latent = zeros(NUM_TOKENS, heads, KV_LORA_RANK, dtype=self.dtype)
        self.q_pe = zeros(NUM_TOKENS, heads, ROPE, dtype=self.dtype)
        self.latent_cache = zeros(NUM_BLOCKS, BLOCK_SIZE, KV_LORA_RANK + ROPE, dtype=self.dtype)
        self.k_cache = zeros(NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE, dtype=self.kv_dtype)
        self.v_cache = torch.zeros_like(self.k_cache)
        self.slot_mapping = zeros(NUM_TOKENS, dtype=torch.int64)
        cu_seqlens_q = zeros(NUM_REQUESTS + 1, dtype=torch.int32)
        table = zeros(NUM_REQUESTS, SEQ_LEN // BLOCK_SIZE, dtype=torch.int32)
        self.batch = Batch(cu_seqlens_q, zeros(NUM_REQUESTS, dtype=torch.int32), table)
        ones = torch.ones(NUM_KV_HEADS, device="cuda")
        self.scales = Scales(k=ones * 0.37, v=ones * 1.9) if self.kv_dtype == torch.float8_e4m3fn else None
        slopes = torch.linspace(0.01, 0.3, heads, device="cuda")
        sinks = torch.linspace(-2.0, 3.0, heads, device="cuda")
        plain = Rules(HEAD_SIZE**-0.5)
        self.layers = [plain, Rules(HEAD_SIZE**-0.5, sliding_window=100, softcap=5.0, alibi_slopes=slopes, sinks=sinks)]

    def fill(self, tensor: Tensor) -> None:
        values = torch.randn(tensor.shape, generator=self.generator, device="cuda")
        tensor.copy_(values.to(tensor.dtype))

    def load(self, requests: list[tuple[int, int]]) -> None:
        """A new step: other values everywhere, other pages, padding rows and unused table entries poisoned."""
        for tensor in (self.q, self.key, self.value, self.q_latent, self.q_pe, self.latent_cache):
            self.fill(tensor)
        for cache in (self.k_cache, self.v_cache):
            self.fill(cache)
        requests = requests + [(0, 0)] * (NUM_REQUESTS - len(requests))
        lengths = torch.tensor([query_len for query_len, _ in requests])
        rows = int(lengths.sum())
        self.batch.cu_seqlens_q.copy_(torch.cat([torch.zeros(1), lengths.cumsum(0)]))
        self.batch.seq_lens.copy_(torch.tensor([seq_len for _, seq_len in requests]))
        pages = torch.randperm(NUM_BLOCKS - 1, generator=self.generator, device="cuda") + 1
        self.batch.block_table.copy_(pages.view(NUM_REQUESTS, -1))
        slots = []
        for request, (query_len, seq_len) in enumerate(requests):
            used = -(-seq_len // BLOCK_SIZE)
            self.batch.block_table[request, used:] = 2_147_480_000
            positions = torch.arange(seq_len - query_len, seq_len, device="cuda")
            places = self.batch.block_table[request, (positions // BLOCK_SIZE).clamp(min=0)] * BLOCK_SIZE
            slots.append(torch.where(positions >= 0, places + positions % BLOCK_SIZE, -1))
        self.slot_mapping.fill_(-1)
        self.slot_mapping[:rows] = torch.cat(slots)
        for tensor in (self.q, self.key, self.value, self.q_latent, self.q_pe):
            tensor[rows:] = float("nan")

    def step(self) -> list[Tensor]:
        """What an engine captures: plan once, then per layer a KV update and attention, and MLA beside them."""
        plan = optimized.make_plan(self.batch, Capacity(NUM_TOKENS, NUM_REQUESTS, SEQ_LEN))
        results: list[Tensor] = []
        for rules in self.layers:
            optimized.update_kv_cache(
                self.key, self.value, self.k_cache, self.v_cache, self.slot_mapping, scales=self.scales
            )
            results += optimized.attention(
                self.q, self.k_cache, self.v_cache, self.batch, rules, scales=self.scales, plan=plan
            )
            results += optimized.mla_attention(
                self.q_latent, self.q_pe, self.latent_cache, self.batch, rules, plan=plan
            )
        results += optimized.merge_states(results[0], results[1], results[4], results[5])
        return results

    def expected(self) -> list[Tensor]:
        """The same step by the reference, in float64, on clones of the caches."""
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        results: list[Tensor] = []
        for rules in self.layers:
            reference.update_kv_cache(self.key, self.value, k_cache, v_cache, self.slot_mapping, scales=self.scales)
            for operation, queries, caches in (
                (reference.attention, (self.q,), (k_cache, v_cache)),
                (reference.mla_attention, (self.q_latent, self.q_pe), (self.latent_cache,)),
            ):
                width = (caches[1] if len(caches) == 2 else queries[0]).shape[-1]
                out = torch.empty((*queries[0].shape[:2], width), dtype=torch.float64, device="cuda")
                lse = torch.empty(queries[0].shape[:2], dtype=torch.float64, device="cuda")
                scales = self.scales if len(caches) == 2 else None
                results += operation(*queries, *caches, self.batch, rules, scales=scales, out=out, lse=lse)
        results += reference.merge_states(results[0], results[1], results[4], results[5])
        return [*results, k_cache, v_cache]


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


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


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
    bucket = Bucket(dtype, kv_dtype)
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
    bucket = Bucket(torch.float16, torch.float8_e4m3fn)
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
    bucket = Bucket(torch.bfloat16, torch.bfloat16)
    bucket.load(MIXES["mixed"])
    bucket.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bucket.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
