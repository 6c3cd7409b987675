"""What the Hopper prefill is compiled for, beside AttentionSizes."""

from __future__ import annotations

from dataclasses import dataclass

ORDERS = ("forwards", "backwards", "snake")
COLUMNS = 64  # 16-bit columns of a swizzled row, 128 bytes: what one copy brings, and what tiles are padded to
CONSUMERS = 2  # warp groups that attend, each with rows of its own


@dataclass(frozen=True)
class HopperTile:
    """Rows (token, head) of one consumer x keys, and how they are brought."""

    rows: int
    keys: int
    stages: int  # tiles of keys, and as many of values, that shared memory holds
    box_slots: int  # slots of one page that one copy brings: a power of two that divides block_size
    order: str  # one of ORDERS: in which programs take the work

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order: found {self.order!r}, expected one of {', '.join(ORDERS)}")
