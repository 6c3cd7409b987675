"""The kernels of this project as a candidate."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ..candidate import NumericContract
from ..case import FLOAT8, Case


class Ours:
    """`pageproof.optimized`, or a copy of it under another name (a mutant)."""

    def __init__(self, package: ModuleType | None = None, name: str = "ours") -> None:
        if package is None:
            from ... import optimized as package
        self.package = package
        self.name = name

    def notes(self) -> list[str]:
        """What a reader of results should know about where the kernels run."""
        from ...optimized import interpreter

        return interpreter.probe() or ["kernels are compiled"]

    def declines(self, case: Case) -> str | None:
        """Nothing: the kernels claim the whole contract."""
        return None

    def contract(self, case: Case) -> NumericContract:
        """float32 everywhere except the operands of the two products, which are in q's format."""
        from ...optimized import launch, tuning

        spec = case.spec
        arithmetic = _arithmetic(case)
        is_decompressed = spec.operation == "mla_attention_decompressed"
        shape = launch.Shape(
            num_kv_heads=spec.num_kv_heads,
            group=spec.group_size,
            head_size=spec.nope_head_size if is_decompressed else spec.head_size,
            head_size_v=spec.head_size if spec.operation == "mla_attention" else spec.head_size_v,
            block_size=spec.block_size,
            arithmetic=launch.TORCH_DTYPES[arithmetic],
            rope_size=spec.rope_head_size,
            computed_operands=spec.operation != "attention" or spec.kv_dtype == FLOAT8,
        )
        tiles = [shape.tiles(prefill=prefill) for prefill in (True, False)]
        # A float32 product is a chain of fused multiply-adds; the tensor cores' sums truncate.
        u_sum = 2.0**-24 if arithmetic == "float32" else 2.0**-23
        return NumericContract(
            p_dtype=arithmetic,
            u_score=u_sum,
            u_value=u_sum,
            key_dtype=arithmetic if is_decompressed else "",
            value_dtype=arithmetic if is_decompressed else "",
            tanh="series",
            exponent_roundings=3,  # log2(e) is folded into the softmax scale
            tile_keys=min(tile.block_n for tile in tiles),
            split_keys=tuning.plan_limits().split_base,
        )

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        return getattr(self.package, operation)(**arguments)


def _arithmetic(case: Case) -> str:
    """The format of tl.dot's operands. float8 queries are widened to float16, or to the projections' format."""
    spec = case.spec
    if spec.q_dtype == FLOAT8 and spec.operation != "mla_attention_decompressed":
        return "float16"
    return spec.dtype
