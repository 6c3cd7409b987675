"""The layers of one step, as plain cases: one for each cache group that a case has.

Engines that mix full attention with windows keep a pool, a block table and a slot mapping for each kind of layer, over
the same requests. What belongs to one group must never be used for another.
"""

from __future__ import annotations

import random
from dataclasses import replace

from .case import Case, Spec

NARROWEST = 3  # windows of one key ask for kernels of their own
LARGEST_DOUBLED = 32


def layers_of(case: Case) -> tuple[Case, ...]:
    """The case itself, and with `cache_groups` of 2 the layer of the other group.

    That one has the same requests; pages of another size, a window where the case has none and none where it has one,
    and values, pages and slots of its own. Its page size follows from the case's alone: cases that share a compile key
    share that of their other groups.
    """
    plain = replace(case, cache_groups=1)
    if case.cache_groups == 1:
        return (plain,)
    drawn = random.Random(f"{case.seed}:cache group")
    spec = replace(case.spec, block_size=_other_page(case.spec), sliding_window=_other_window(case, drawn))
    return plain, replace(plain, spec=spec, seed=drawn.getrandbits(32))


def _other_page(spec: Spec) -> int:
    return 2 * spec.block_size if spec.block_size <= LARGEST_DOUBLED else spec.block_size // 2


def _other_window(case: Case, drawn: random.Random) -> int | None:
    """Odd, and up to the longest request: Triton compiles anew for multiples of 16."""
    if case.spec.sliding_window is not None:
        return None
    return NARROWEST + 2 * drawn.randrange(max(1, max(case.batch.seq_lens, default=0) // 2))
