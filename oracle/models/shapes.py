"""Shapes of decoders by name, and small ones of the same structure.

Every figure is the model's own `config.json` (Hugging Face: meta-llama/Meta-Llama-3-8B, Qwen/Qwen3-30B-A3B,
deepseek-ai/DeepSeek-V2-Lite), but for the MLP of the two mixtures of experts. It is one dense MLP of the width that is
active for a token: 8 experts of 768; 6 routed and 2 shared ones of 1408. A router picks experts by comparing values,
so one rounding may exchange an expert, and no tolerance could be given for two right runs that round differently.
What this leaves out of a step is the experts' weights that a batch reads beyond one token's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """One decoder. Heads and sizes are counts of elements."""

    hidden_size: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int  # 1 for MLA, whose heads share one latent row
    head_size: int  # of q and k; for MLA the part without a position, before it is absorbed
    head_size_v: int
    intermediate_size: int
    vocabulary: int
    rope_theta: float
    rms_norm_eps: float
    block_size: int = 16
    head_norms: bool = False  # RMSNorm over each query and key head
    kv_lora_rank: int = 0  # 0: grouped heads; else MLA
    rope_head_size: int = 0  # MLA: the rotated part of q, and the one that all heads share of k

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank > 0

    @property
    def softmax_scale(self) -> float:
        """Of the decompressed head."""
        return float((self.head_size + self.rope_head_size) ** -0.5)

    @property
    def value_row(self) -> int:
        """Elements of one head of attention's output."""
        return self.kv_lora_rank or self.head_size_v

    @property
    def rotated_size(self) -> int:
        """Elements of a head that rotary embedding turns."""
        return self.rope_head_size or self.head_size

    def with_layers(self, num_layers: int) -> ModelShape:
        if num_layers < 1:
            raise ValueError(f"num_layers: found {num_layers}, expected at least 1")
        return replace(self, num_layers=num_layers)

    def tiny(self) -> ModelShape:
        """Two layers of the same structure that an interpreter gets through: a quarter of the ratios, small sizes."""
        kv_heads = max(1, self.num_kv_heads // 4)
        return replace(
            self,
            hidden_size=64,
            num_layers=2,
            num_query_heads=kv_heads * max(2, self.num_query_heads // self.num_kv_heads // 4),
            num_kv_heads=kv_heads,
            head_size=16,
            head_size_v=16,
            intermediate_size=96,
            vocabulary=128,
            kv_lora_rank=32 if self.is_mla else 0,
            rope_head_size=16 if self.is_mla else 0,
        )


SHAPES = {
    "llama-3-8b": ModelShape(
        hidden_size=4096,
        num_layers=32,
        num_query_heads=32,
        num_kv_heads=8,
        head_size=128,
        head_size_v=128,
        intermediate_size=14336,
        vocabulary=128256,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
    ),
    "qwen3-30b-a3b": ModelShape(
        hidden_size=2048,
        num_layers=48,
        num_query_heads=32,
        num_kv_heads=4,
        head_size=128,
        head_size_v=128,
        intermediate_size=8 * 768,
        vocabulary=151936,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        head_norms=True,
    ),
    "deepseek-v2-lite": ModelShape(
        hidden_size=2048,
        num_layers=27,
        num_query_heads=16,
        num_kv_heads=1,
        head_size=128,
        head_size_v=128,
        intermediate_size=(6 + 2) * 1408,
        vocabulary=102400,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        kv_lora_rank=512,
        rope_head_size=64,
    ),
}


def shape_of(name: str) -> ModelShape:
    if name not in SHAPES:
        raise ValueError(f"model: found {name!r}, expected one of {', '.join(SHAPES)}")
    return SHAPES[name]
