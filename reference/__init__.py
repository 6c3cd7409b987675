"""What attention over a paged KV cache means: pure PyTorch, float64 inside, slow and evident."""

from .attention import attention
from .kv_cache import update_kv_cache, update_mla_cache
from .merge import merge_states
from .mla import mla_attention, mla_attention_decompressed
from .problem import Batch, Rules, Scales

__all__ = [
    "Batch",
    "Rules",
    "Scales",
    "attention",
    "merge_states",
    "mla_attention",
    "mla_attention_decompressed",
    "update_kv_cache",
    "update_mla_cache",
]
