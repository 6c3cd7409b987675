"""Where each element of a tensor lies: the strides of token buffers and caches, packed or odd.

| cache layout | memory, from the outermost dimension to the innermost |
|---|---|
| NHD | page, slot, head, element |
| HND | page, head, slot, element |
| head_major | head, page, slot, element |
| slot_major | slot, page, head, element |
| transposed | page, head, element, slot: the last dimension is not contiguous |
| interleaved | NHD, every page K's half and then V's |
| sliced | NHD, every row K's part and then V's; for MLA a part of a wider row |

Whatever the layout, the shapes are those of the contract. With odd strides there are gaps in every dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from ..case import Case
from .guards import extent

_ORDERS = {"HND": "PHSE", "head_major": "HPSE", "slot_major": "SPHE", "transposed": "PHES"}
_USUAL_ORDER = "PSHE"  # page, slot, head, element
_REST_OF_ROW = 80  # what lies beside a sliced latent row: 576 elements within 656, for one
_FAR = 2**31
_STRIDE_OF_SIZE_ONE = 1_000_003  # a dimension of one element may carry any stride


@dataclass(frozen=True)
class Layout:
    """How one tensor lies in its memory: shape and strides in elements, and where its first element is."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = 0

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + extent(self.shape, self.strides)

    def view(self, memory: Tensor, base: int) -> Tensor:
        return memory.as_strided(self.shape, self.strides, base + self.start)

    def with_odd_singles(self) -> Layout:
        """Strides that mean nothing, in the dimensions where no stride means anything (never the last)."""
        inner = zip(self.shape[:-1], self.strides[:-1], strict=True)
        strides = tuple(_STRIDE_OF_SIZE_ONE if n == 1 else stride for n, stride in inner)
        return Layout(self.shape, strides + self.strides[-1:], self.start)


def row_layout(case: Case, shape: tuple[int, ...], *, misaligned: bool = False) -> Layout:
    """[tokens, heads, dim] or [tokens, dim]. Odd: a slice of wider rows, as of a fused projection.

    Misaligned rows are of an odd width and start one element late, so that no row lies on 16 bytes.
    """
    heads, dim = prod(shape[1:-1]), shape[-1]
    pad = (3 if misaligned else 16) if case.spec.odd_strides else 0
    head_stride = dim + (pad if misaligned else 0)
    token_stride = heads * head_stride + 2 * pad
    strides = (token_stride, head_stride, 1) if len(shape) == 3 else (token_stride, 1)
    if not case.spec.odd_strides:
        return Layout(shape, strides)
    return Layout(shape, strides, int(misaligned)).with_odd_singles()


def cache_layouts(case: Case, num_blocks: int, sizes: Sequence[int]) -> list[list[Layout]]:
    """The layouts of k_cache and v_cache, or of latent_cache, grouped by the memory they lie in."""
    spec = case.spec
    pads = (16, 5) if spec.odd_strides else (0, 0)
    if spec.cache_layout == "interleaved":
        wide = _strides(case, num_blocks, (2 * spec.block_size, max(sizes)), pads[0])
        groups = [[(size, wide, half * (wide[0] // 2)) for half, size in enumerate(sizes)]]
    elif spec.cache_layout == "sliced":
        row = sum(sizes) + (_REST_OF_ROW if spec.is_mla else 0)
        wide = _strides(case, num_blocks, (spec.block_size, row), pads[1])
        groups = [[(size, wide, sum(sizes[:part])) for part, size in enumerate(sizes)]]
    else:
        apart = zip(sizes, pads, strict=False)
        groups = [[(size, _strides(case, num_blocks, (spec.block_size, size), pad), 0)] for size, pad in apart]
    return [[_cache(case, num_blocks, *part) for part in group] for group in groups]


def _cache(case: Case, num_blocks: int, size: int, strides: tuple[int, ...], start: int) -> Layout:
    """[num_blocks, block_size, num_kv_heads, size], or without heads."""
    heads = () if case.spec.is_mla else (case.spec.num_kv_heads,)
    layout = Layout((num_blocks, case.spec.block_size, *heads, size), strides, start)
    return layout.with_odd_singles() if case.spec.odd_strides else layout


def _strides(case: Case, num_blocks: int, page: tuple[int, int], pad: int) -> tuple[int, ...]:
    """Of page, slot, head (not for MLA) and element; `page`: its slots, and the elements of a row.

    Pages that are far apart spread the whole pool over three halves of 2**31 elements.
    """
    sizes = {"P": num_blocks, "S": page[0], "H": case.spec.num_kv_heads, "E": page[1]}
    dimensions = _USUAL_ORDER.replace("H", "") if case.spec.is_mla else _USUAL_ORDER
    order = [name for name in _ORDERS.get(case.spec.cache_layout, _USUAL_ORDER) if name in dimensions]
    strides: dict[str, int] = {}
    step = 1
    for place in range(len(order) - 1, -1, -1):
        name = order[place]
        if name == "P" and case.spec.far_pages:
            copies = prod(sizes[outer] for outer in order[: place + 1])
            step = max(step, _FAR * 3 // (2 * copies) // 16 * 16 + pad)
        strides[name] = step
        step = step * sizes[name] + pad
    return tuple(strides[name] for name in dimensions)
