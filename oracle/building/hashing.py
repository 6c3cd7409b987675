"""Numbers from a seed, a name and an index: the same bits on every device, because only integers are hashed.

Element i of the stream (seed, name) is lowbias32(i * multiplier + offset), all modulo 2**32, where multiplier
and offset come from the seed and the name. A normal value is the sum of the hash's two signed 16-bit halves,
times a number that float32 multiplies exactly. No log, no cosine, no state: any part of a stream can be made
anywhere, and a digest proves that two machines made the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Terms = tuple[Tensor, Tensor]

_MASK = 2**32 - 1
# lowbias32 of C. Wellons' hash prospector: a bijection of 32 bits whose avalanche bias is about 0.17%.
_FIRST = 0x7FEB352D
_SECOND = 0x846CA68B
# Two halves of +-2**15 have a standard deviation of 26755 together: this makes it 1.02, and the range +-2.5.
NORMAL_UNIT = 1.25 * 2.0**-15


def stream_key(seed: int, name: str) -> tuple[int, int]:
    """The (odd multiplier, offset) of one stream."""
    drawn = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn[:4], "little") | 1, int.from_bytes(drawn[4:], "little")


def host_hashes(seed: int, name: str, count: int) -> NDArray[np.uint32]:
    """The first `count` elements of a stream, on the host; `hashed` makes the same ones on a device."""
    multiplier, offset = stream_key(seed, name)
    x = np.arange(count, dtype=np.uint32) * np.uint32(multiplier) + np.uint32(offset)
    x ^= x >> np.uint32(16)
    x *= np.uint32(_FIRST)
    x ^= x >> np.uint32(15)
    x *= np.uint32(_SECOND)
    x ^= x >> np.uint32(16)
    return x


def host_choice(seed: int, name: str, choices: int) -> int:
    """One number in 0 .. choices - 1."""
    return int(host_hashes(seed, name, 1)[0]) % choices


def host_normals(hashes: NDArray[np.uint32]) -> NDArray[np.float32]:
    """What `normals` makes of the same hashes."""
    signed = hashes.view(np.int32)
    halves = (signed >> 16) + ((signed << np.int32(16)) >> 16)
    return halves.astype(np.float32) * np.float32(NORMAL_UNIT)


def index_terms(
    seed: int, name: str, rows: NDArray[np.int64], width: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Two vectors whose outer sum is what `mix_` hashes for elements row * width + column of a stream.

    They are made on the host so that a device needs one launch for the indices of a tensor.
    """
    multiplier, offset = stream_key(seed, name)
    step = np.uint64(multiplier * width & _MASK)  # the product wraps at 2**64, which keeps its low 32 bits
    row_terms = (rows.astype(np.uint64) * step + np.uint64(offset)).astype(np.uint32)
    column_terms = np.arange(width, dtype=np.uint32) * np.uint32(multiplier)
    return row_terms.view(np.int32), column_terms.view(np.int32)


def hashed(terms: Sequence[Terms]) -> Tensor:
    """The hashes of several tensors in one pass: one flat int32 buffer, to be taken apart by `split`."""
    sizes = [rows.numel() * columns.numel() for rows, columns in terms]
    buffer = torch.empty(sum(sizes), dtype=torch.int32, device=terms[0][0].device)
    for part, (rows, columns) in zip(split(buffer, terms), terms, strict=True):
        torch.add(rows[:, None], columns[None, :], out=part)
    return mix_(buffer)


def split(flat: Tensor, terms: Sequence[Terms]) -> list[Tensor]:
    """The part of each tensor as a view [rows, width]."""
    shapes = [(rows.numel(), columns.numel()) for rows, columns in terms]
    parts = torch.split(flat, [rows * width for rows, width in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def mix_(x: Tensor) -> Tensor:
    """lowbias32 of an int32 tensor, contiguous, in place; int32 products wrap on every device."""
    low, high = _halves(x)
    low.bitwise_xor_(high)  # x ^ (x >> 16), in one launch
    x.mul_(_signed(_FIRST))
    shifted = x >> 15
    x.bitwise_xor_(shifted.bitwise_and_((1 << 17) - 1))  # the shift of a negative int32 keeps its sign
    x.mul_(_signed(_SECOND))
    low.bitwise_xor_(high)
    return x


def normals(hashes: Tensor) -> Tensor:
    """float32 values of mean 0, standard deviation 1.02, within +-2.5 (triangular), one for each hash."""
    low, high = _halves(hashes)
    return (high * NORMAL_UNIT).add_(low, alpha=NORMAL_UNIT)  # float32 is exact in both


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The signed low and high 16 bits of int32 elements, where they lie: every host and device is little-endian."""
    halves = x.view(torch.int16)
    return halves[..., 0::2], halves[..., 1::2]


def digest(tensor: Tensor) -> str:
    """16 hexadecimal digits over the bytes of a tensor's elements, its strides left aside."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=8).hexdigest()


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value
