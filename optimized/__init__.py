"""The operations of the contract as Triton kernels: same names and meaning as `pageproof.reference`.

Safe under graph capture: work lists are planned on the device, grids are persistent, nothing that a host sees at
capture decides anything. Without a GPU the same kernels run through Triton's interpreter (TRITON_INTERPRET=1).

`attention_with_kv_update` is two of them as one operator; `make_plan` is asked once per step and shared by its layers.
"""

from ..reference.problem import Batch, Rules, Scales
from .attention import attention
from .fused import attention_with_kv_update
from .kv_cache import update_kv_cache, update_mla_cache
from .merge import merge_states
from .mla import mla_attention, mla_attention_decompressed
from .plan import Capacity, Plan, make_plan

__all__ = [
    "Batch",
    "Capacity",
    "Plan",
    "Rules",
    "Scales",
    "attention",
    "attention_with_kv_update",
    "make_plan",
    "merge_states",
    "mla_attention",
    "mla_attention_decompressed",
    "update_kv_cache",
    "update_mla_cache",
]
