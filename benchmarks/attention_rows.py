"""The rows of the attention benchmark as data: shapes, rules and goals. attention_work.py counts what each costs.

Lengths are (new tokens, keys with the new ones) of every request. A goal holds for the machine on which it was set
(`REFERENCE`), and is scaled by what the run measures in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pageproof.oracle import BatchShape, Case, Spec

Lengths = tuple[tuple[int, int], ...]

SECTIONS = ("decode", "prefill", "mixed", "mla", "update", "features", "models")
LONGEST = 262144  # keys that a captured graph has room for in the decode rows: its block table is as wide
LONGEST_MIXED = 65536
MOST_REQUESTS = 128  # of a mixed batch's bucket

REFERENCE = {"copy_gbps": 4276.0, "matmul_tflops": 695.0}  # one NVIDIA H200, torch 2.11, Triton 3.6, bfloat16


@dataclass(frozen=True, kw_only=True)
class Goal:
    """At most `us`, at least `tflops`, or at least `of_ceiling` of what the row's floor allows: one of them."""

    us: float | None = None
    tflops: float | None = None
    of_ceiling: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One batch. Its graph is captured for `tokens` and `requests`; those that are not in `lengths` are padding."""

    name: str
    section: str
    spec: Spec
    lengths: Lengths
    tokens: int = 0  # of the bucket; 0: as many as there are
    requests: int = 0
    keys: int = 0  # that the block table has room for
    goal: Goal | None = None

    def case(self) -> Case:
        """The row as a case of the oracle, which builds and judges it. No poison: not every peer bears it."""
        query_lens, seq_lens = (tuple(column) for column in zip(*self.lengths, strict=True))
        padding = (0,) * max(0, self.requests - len(self.lengths))
        width = -(-max(seq_lens) // self.spec.block_size)
        batch = BatchShape(
            query_lens=query_lens + padding,
            seq_lens=seq_lens + padding,
            padding_tokens=max(0, self.tokens - sum(query_lens)),
            table_slack=max(0, -(-self.keys // self.spec.block_size) - width),
        )
        return Case(spec=self.spec, batch=batch, poison="")


LLAMA_3_8B = Spec(num_kv_heads=8, group_size=4, head_size=128, head_size_v=128)
MLA = Spec(operation="mla_attention", num_kv_heads=1, group_size=128, head_size=512, head_size_v=512, rope_head_size=64)
DECOMPRESSED = replace(MLA, operation="mla_attention_decompressed", nope_head_size=128, head_size_v=128)

DECODES = {  # requests, keys: goal in us
    (1, 4096): 12, (1, 16384): 25, (1, 65536): 72, (1, 262144): 258, (8, 16384): 132, (32, 4096): 132,
    (64, 8192): 485, (128, 4096): 485, (256, 2048): 490,
}  # fmt: skip
PREFILLS = {(1, 16384): 600, (1, 4096): 520, (8, 2048): 500}  # requests, tokens: goal in TFLOP/s
MLA_DECODES = {(1, 8192): 22, (16, 8192): 78, (64, 4096): 135, (128, 4096): 255}
MIXED: dict[str, tuple[Lengths, int, float]] = {  # lengths, bucket, goal in us
    "mixed-16384+512": (((1, 16384), (512, 512)), 1024, 35),
    "mixed-32768+512": (((1, 32768), (512, 512)), 1024, 52),
    "mixed-65536+512": (((1, 65536), (512, 512)), 1024, 85),
    "mixed-65536+4": (((1, 65536), (4, 4)), 8, 75),
    "mixed-64x4096+16x4@4096+2x2048": (((1, 4096),) * 64 + ((4, 4096),) * 16 + ((2048, 2048),) * 2, 8192, 420),
}
FEATURES: dict[str, dict[str, object]] = {
    "plain": {}, "softcap": {"softcap": 50.0}, "window-1024": {"sliding_window": 1024}, "sinks": {"sinks": True},
    "alibi": {"alibi": True},
}  # fmt: skip
MODELS: dict[str, Spec] = {
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b-tp8": replace(LLAMA_3_8B, num_kv_heads=1, group_size=8),
    "qwen3-30b-a3b": replace(LLAMA_3_8B, num_kv_heads=4, group_size=8),
    "gemma-2-9b-window": Spec(
        num_kv_heads=8, group_size=2, head_size=256, head_size_v=256, softcap=50.0, sliding_window=4096
    ),
    "gemma-2-9b-full": Spec(num_kv_heads=8, group_size=2, head_size=256, head_size_v=256, softcap=50.0),
    "gpt-oss-window": Spec(num_kv_heads=8, group_size=8, sinks=True, sliding_window=128),
    "gpt-oss-full": Spec(num_kv_heads=8, group_size=8, sinks=True),
    "mistral-7b": replace(LLAMA_3_8B, sliding_window=4096),
    "deepseek-v2-lite": replace(MLA, group_size=16),
    "deepseek-v3": MLA,
}


def all_rows() -> list[Row]:
    return [*_decode(), *_prefill(), *_mixed(), *_mla(), *_update(), *_features(), *_models()]


def _decode() -> Iterator[Row]:
    for (requests, keys), goal in DECODES.items():
        name = f"decode-{requests}x{keys}"
        yield _row(name, "decode", LLAMA_3_8B, ((1, keys),) * requests, keys=LONGEST, goal=Goal(us=goal))
    for tokens in (2, 4, 8, 16):
        name = f"verify-32x{tokens}@4096"
        yield _row(name, "decode", LLAMA_3_8B, ((tokens, 4096),) * 32, keys=LONGEST)


def _prefill() -> Iterator[Row]:
    for (requests, tokens), goal in PREFILLS.items():
        name = f"prefill-{requests}x{tokens}"
        yield _row(name, "prefill", LLAMA_3_8B, ((tokens, tokens),) * requests, goal=Goal(tflops=goal))
    yield _row("prefill-2048@16384", "prefill", LLAMA_3_8B, ((2048, 16384),))


def _mixed() -> Iterator[Row]:
    for name, (lengths, tokens, goal) in MIXED.items():
        requests = min(tokens, MOST_REQUESTS)
        row = _row(name, "mixed", LLAMA_3_8B, lengths, keys=LONGEST_MIXED, goal=Goal(us=goal))
        yield replace(row, tokens=tokens, requests=requests)


def _mla() -> Iterator[Row]:
    for (requests, keys), goal in MLA_DECODES.items():
        yield _row(f"mla-{requests}x{keys}", "mla", MLA, ((1, keys),) * requests, goal=Goal(us=goal))
    for heads in (16, 128):
        spec = replace(MLA, group_size=heads)
        yield _row(f"mla-verify-32x4@4096-{heads}h", "mla", spec, ((4, 4096),) * 32)
    few = replace(MLA, group_size=16)
    yield _row("mla-64x4096-16h", "mla", few, ((1, 4096),) * 64)
    yield _row("mla-prefill-absorbed-1x2048-16h", "mla", few, ((2048, 2048),))
    yield _row("mla-prefill-decompressed-1x2048-16h", "mla", replace(DECOMPRESSED, group_size=16), ((2048, 2048),))


def _update() -> Iterator[Row]:
    update, float8 = replace(LLAMA_3_8B, operation="update_kv_cache"), {"kv_dtype": "float8_e4m3fn", "scales": "tensor"}
    mla = replace(MLA, operation="update_mla_cache")
    goal = Goal(of_ceiling=0.85)
    yield _row("update-1", "update", update, ((1, 4096),))
    yield _row("update-128", "update", update, ((1, 1024),) * 128)
    yield _row("update-8192", "update", update, ((8192, 8192),), goal=goal)
    yield _row("update-8192-fp8", "update", replace(update, **float8), ((8192, 8192),), goal=goal)
    yield _row("update-mla-8192", "update", mla, ((8192, 8192),), goal=goal)
    yield _row("update-mla-8192-fp8", "update", replace(mla, **float8), ((8192, 8192),), goal=goal)


def _features() -> Iterator[Row]:
    for name, rules in FEATURES.items():
        spec = replace(LLAMA_3_8B, **rules)
        yield _row(f"features-prefill-{name}", "features", spec, ((4096, 4096),))
        yield _row(f"features-decode-{name}", "features", spec, ((1, 4096),) * 32)


def _models() -> Iterator[Row]:
    for name, spec in MODELS.items():
        yield _row(f"{name}-decode", "models", spec, ((1, 8192),) * 32)
        yield _row(f"{name}-prefill", "models", spec, ((8192, 8192),) if not spec.is_mla else ((2048, 2048),))


def _row(
    name: str, section: str, spec: Spec, lengths: Lengths, *, keys: int = 0, goal: Goal | None = None
) -> Row:  # fmt: skip
    return Row(name=name, section=section, spec=spec, lengths=lengths, keys=keys, goal=goal)


def varied(row: Row, *, dtype: str, kv_dtype: str, page: int) -> Row | None:
    """The row in other formats and with another page; None where it is of another format by name."""
    if kv_dtype and row.spec.kv_dtype:
        return None
    changes: dict[str, object] = {"dtype": dtype, "block_size": page}
    words = [] if dtype == "bfloat16" else [dtype]
    if kv_dtype:
        changes |= {"kv_dtype": kv_dtype, "scales": "tensor"}
        words.append(f"kv-{kv_dtype}")
    words += [] if page == 16 else [f"page-{page}"]
    goal = None if words else row.goal  # a goal is one of the plain row
    return replace(row, name="/".join([row.name, *words]), spec=replace(row.spec, **changes), goal=goal)


def tiny(row: Row) -> Row:
    """The same kind of row, small enough for the interpreter. Nothing that is measured on it means anything."""
    spec = row.spec
    sizes: dict[str, object] = {"num_kv_heads": 1, "group_size": 2, "head_size": 16, "head_size_v": 16}
    if spec.is_mla:
        sizes |= {"head_size": 32, "head_size_v": 32, "rope_head_size": 16}
    if spec.operation == "mla_attention_decompressed":
        sizes |= {"head_size_v": 16, "nope_head_size": 16}
    if spec.sliding_window is not None:
        sizes["sliding_window"] = 5
    lengths = tuple(_short(*request) for request in _some(row.lengths))
    count, tokens = len(lengths), sum(new for new, _ in lengths)
    bucket = {"tokens": 32, "requests": count + 1} if row.tokens else {}
    keys = 64 if row.keys else 0
    assert tokens <= 32, f"{row.name}: {tokens} tokens of the tiny row do not fit into its bucket"
    return replace(
        row, spec=replace(spec, dtype="float16", **sizes), lengths=lengths, keys=keys, goal=None, **bucket
    )  # fmt: skip


def _some(lengths: Lengths) -> Sequence[tuple[int, int]]:
    """The first and the last request: a mixed batch stays one."""
    return lengths if len(lengths) <= 2 else (lengths[0], lengths[-1])


def _short(new: int, keys: int) -> tuple[int, int]:
    return (new if new <= 4 else 12), (new if new <= 4 else 12) if new == keys else 33
