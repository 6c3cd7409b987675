"""What the kernels for Hopper are compiled for, beside AttentionSizes."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 64  # 16-bit columns of a swizzled row, 128 bytes: what one copy brings, and what tiles are padded to
SWIZZLE_ROWS = 8  # after which the swizzle repeats: the fewest slots of a page that a copy brings

CONSUMERS = 2  # warp groups of prefill that attend, each with rows of its own
ORDERS = ("forwards", "backwards", "snake")


@dataclass(frozen=True)
class PrefillTile:
    """Rows (token, head) of one consumer x keys, and how they are brought."""

    rows: int
    keys: int
    stages: int  # tiles of keys, and as many of values, that shared memory holds
    box_slots: int  # slots of one page that one copy brings: a power of two that divides block_size
    order: str  # one of ORDERS: in which programs take the work

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order: found {self.order!r}, expected one of {', '.join(ORDERS)}")


# Absorbed MLA. The smallest tile that a warp group multiplies: one of 64 keys and 576 columns takes 72 KiB.
MLA_ROWS = 64  # (token, head) pairs
MLA_KEYS = 64
MLA_RANK, MLA_ROPE = 512, 64  # columns of every published model with latent attention
