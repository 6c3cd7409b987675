"""The kernels of this project as a candidate."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..candidate import NumericContract
from ..case import ATTENTION_OPERATIONS, FLOAT8, MODES, Case

if TYPE_CHECKING:
    from ...optimized.tile_table import Operands
    from ...optimized.tuning import PlanLimits
    from ...reference.problem import Batch

DEVICE = torch.device("cuda")  # the one that a worker is set to; not looked at where kernels are interpreted
SPLIT_LEVELS, WHOLE = 16, 1 << 30  # as in optimized/kernels/plan.py


class Ours:
    """`pageproof.optimized`, or a copy of it under another name (a mutant)."""

    modes = MODES

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
        from ...optimized import shapes, tuning

        spec = case.spec
        arithmetic = _arithmetic(case)
        is_decompressed = spec.operation == "mla_attention_decompressed"
        shape = shapes.Shape(
            num_kv_heads=spec.num_kv_heads,
            group=spec.group_size,
            head_size=spec.nope_head_size if is_decompressed else spec.head_size,
            head_size_v=spec.head_size if spec.operation == "mla_attention" else spec.head_size_v,
            block_size=spec.block_size,
            arithmetic=shapes.TORCH_DTYPES[arithmetic],
            architecture=tuning.architecture(DEVICE),
            operands=_operands(case),
            rope_size=spec.rope_head_size,
        )
        # Those of the kernels for Hopper have as many keys as those of decode, or more.
        tiles = [shapes.tiles(shape, prefill=prefill) for prefill in (True, False)]
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

    def plan_of(self, case: Case) -> dict[str, int]:
        """What the plan kernel writes for this case, by its rules (optimized/kernels/plan.py).

        Items of the prefill and decode lists, the most splits of one request, splits of which no row sees a key,
        rows whose partial results are merged, rows of partial results, keys of a split, and how many doublings of
        the shortest split that is; the most tokens of a request of the decode list.
        """
        from ...optimized.tuning import plan_limits, plan_programs, request_programs

        if case.spec.operation not in ATTENTION_OPERATIONS:
            return {}
        limits, window = plan_limits(), case.spec.sliding_window
        live = [(n, keys) for n, keys in zip(case.batch.query_lens, case.batch.seq_lens, strict=True) if n]
        short = [(n, keys) for n, keys in live if n <= limits.decode_tokens]
        heads = {"num_query_heads": case.spec.num_query_heads, "num_kv_heads": case.spec.num_kv_heads}
        share = request_programs(case.spec.operation, **heads)
        split_keys = _split_keys(short, limits, share, plan_programs(DEVICE))
        splits = [(n, keys, max(1, -(-keys // split_keys))) for n, keys in short]
        divided = [(n, keys, count) for n, keys, count in splits if count > 1]
        first_keys = (0 if window is None else max(0, keys - n - window + 1) for n, keys, _ in divided)
        return {
            "prefill_tiles": sum(-(-n // limits.tile_tokens) for n, _ in live if n > limits.decode_tokens),
            "decode_splits": sum(count for _, _, count in splits),
            "most_splits": max((count for _, _, count in splits), default=0),
            "empty_splits": sum(first // split_keys for first in first_keys),
            "merged_rows": sum(n for n, _, _ in divided),
            "partial_rows": sum(n * count for n, _, count in divided),
            "most_decode_tokens": max((n for n, _ in short), default=0),
            "split_keys": split_keys,
            "split_doublings": (split_keys // limits.split_base).bit_length() - 1,
        }

    def make_plan(self, batch: Batch, capacity: tuple[int, int, int]) -> Any:
        package: Any = self.package
        return package.make_plan(batch, capacity)

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        return getattr(self.package, operation)(**arguments)


def _split_keys(requests: list[tuple[int, int]], limits: PlanLimits, request_programs: int, programs: int) -> int:
    """The split, in doublings of the base, with which the programs are done first; 2**30 keys are never split."""
    widths = [limits.split_base << level for level in range(SPLIT_LEVELS - 1)] + [WHOLE]
    all_keys, longest = sum(keys for _, keys in requests), max((keys for _, keys in requests), default=0)

    def cost(width: int) -> int:
        length = min(width, max(longest, 1))
        splits = sum(max(1, -(-keys // width)) for _, keys in requests)
        rounds = -(-all_keys * request_programs // (programs * length))
        return rounds * length + limits.split_cost * -(-splits * request_programs // programs)

    fitting = (
        width
        for width in widths
        if sum(n * -(-keys // width) for n, keys in requests if keys > width) <= limits.partial_rows
    )
    return min(fitting, key=cost)


def _arithmetic(case: Case) -> str:
    """The format of tl.dot's operands. float8 queries are widened to float16, or to the projections' format."""
    spec = case.spec
    if spec.q_dtype == FLOAT8 and spec.operation != "mla_attention_decompressed":
        return "float16"
    return spec.dtype


def _operands(case: Case) -> Operands:
    from ...optimized.tile_table import Operands

    is_cast = case.spec.kv_dtype == FLOAT8
    if case.spec.operation == "mla_attention":
        return Operands.CAST_LATENT if is_cast else Operands.LATENT
    return Operands.COMPUTED if is_cast or case.spec.operation != "attention" else Operands.LOADED
