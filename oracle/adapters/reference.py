"""The reference as a candidate: float64 inside, one cast at the end. It must agree with itself on everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...reference.attention import attention
from ...reference.kv_cache import update_kv_cache, update_mla_cache
from ...reference.merge import merge_states
from ...reference.mla import mla_attention, mla_attention_decompressed
from ..candidate import NumericContract
from ..case import Case

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "mla_attention": mla_attention,
    "mla_attention_decompressed": mla_attention_decompressed,
    "update_kv_cache": update_kv_cache,
    "update_mla_cache": update_mla_cache,
    "merge_states": merge_states,
}


class Reference:
    """Declares float32 arithmetic with libm's functions, which float64 is well inside of."""

    name = "reference"

    def declines(self, case: Case) -> str | None:
        return None

    def contract(self, case: Case) -> NumericContract:
        return NumericContract(u_score=2.0**-24, u_value=2.0**-24, tanh="libm", tile_keys=2**20, late_sink=False)

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        return _OPERATIONS[operation](**arguments)
