"""What the operations are given: a batch, the rules of its attention, the scales of its number formats.

Every dataclass checks what it can see on the host when it is made; what lies on a device (lengths, page
ids, slots) is looked at only by `validation.check_batch_values`, because looking there synchronises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import bad_type, bad_value, check_tensor

FLOAT8 = torch.float8_e4m3fn
SMALLEST_FLOAT32, LARGEST_FLOAT32 = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Batch:
    """Which tokens belong to which request, and where each request's keys lie.

    A request's `seq_len` counts its keys: the context that is already cached and its new tokens. Token t of
    a request with n new tokens and L keys stands at position p = L - n + t.
    """

    cu_seqlens_q: Tensor  # [num_requests + 1] int32, starts at 0, never falls
    seq_lens: Tensor  # [num_requests] int32
    block_table: Tensor  # [num_requests, max_blocks] int32; entries through which no key may be read are arbitrary

    def __post_init__(self) -> None:
        check_tensor("block_table", self.block_table, dims=2, dtypes=(torch.int32,))
        device = self.block_table.device
        check_tensor("seq_lens", self.seq_lens, dims=1, dtypes=(torch.int32,), device=device)
        check_tensor("cu_seqlens_q", self.cu_seqlens_q, dims=1, dtypes=(torch.int32,), device=device)
        num_requests = self.seq_lens.shape[0]
        if self.cu_seqlens_q.shape[0] != num_requests + 1:
            found = f"shape {tuple(self.cu_seqlens_q.shape)}"
            raise bad_value("cu_seqlens_q", found, f"({num_requests + 1},): one more than seq_lens")
        if self.block_table.shape[0] != num_requests:
            found = f"shape {tuple(self.block_table.shape)}"
            raise bad_value("block_table", found, f"({num_requests}, max_blocks): a row for each of seq_lens")
        for name, tensor in (("cu_seqlens_q", self.cu_seqlens_q), ("seq_lens", self.seq_lens)):
            if tensor.shape[0] > 1 and tensor.stride(0) != 1:
                raise bad_value(name, f"stride {tensor.stride(0)}", "a contiguous tensor")
        if self.block_table.shape[1] > 1 and self.block_table.stride(1) != 1:
            raise bad_value("block_table", f"strides {self.block_table.stride()}", "a last dimension with stride 1")

    @property
    def num_requests(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def max_blocks(self) -> int:
        return self.block_table.shape[1]

    @property
    def device(self) -> torch.device:
        return self.block_table.device


@dataclass(frozen=True)
class Rules:
    """How a score is made and which keys a token may see. `None` means off; there is no other way to say off.

    The score of query q at position p and key j is built in this order:
    softmax_scale * <q, k_j>, softcap, ALiBi, query bias, visibility (causal, windows), and the sink joins the
    denominator last.
    """

    softmax_scale: float
    causal: bool = True  # key j is visible iff j <= p
    sliding_window: int | None = None  # visible iff p - j < sliding_window: it counts the token itself
    right_window: int | None = None  # non-causal only: visible iff j - p <= right_window
    softcap: float | None = None  # s <- softcap * tanh(s / softcap)
    alibi_slopes: Tensor | None = None  # [num_query_heads] float32: s <- s + slope * (j - p)
    sinks: Tensor | None = None  # [num_query_heads] float32: one more logit, in the denominator only
    query_bias: Tensor | None = None  # [num_tokens, bias_width] float32, finite or -inf, added to new keys' scores

    def __post_init__(self) -> None:
        _check_number("softmax_scale", self.softmax_scale)
        if not isinstance(self.causal, bool):
            raise bad_type("causal", self.causal, "a bool")
        _check_window("sliding_window", self.sliding_window, smallest=1, hint="; None means no window")
        _check_window("right_window", self.right_window, smallest=0, hint="; None means no window")
        if self.right_window is not None and self.causal:
            raise bad_value("right_window", self.right_window, "None beside causal=True, which ends at the token")
        if self.softcap is not None:
            _check_number("softcap", self.softcap)
            if self.softcap <= 0:
                raise bad_value("softcap", self.softcap, "a positive number; None means no softcap")
        for name, tensor, dims in (
            ("alibi_slopes", self.alibi_slopes, 1),
            ("sinks", self.sinks, 1),
            ("query_bias", self.query_bias, 2),
        ):
            if tensor is not None:
                check_tensor(name, tensor, dims=dims, dtypes=(torch.float32,))
                if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                    raise bad_value(name, f"strides {tensor.stride()}", "a last dimension with stride 1")


@dataclass(frozen=True)
class Scales:
    """What one unit of a float8 tensor is worth; read on the device when a kernel runs, so also at replay.

    Each is float32, either one element (per tensor) or [num_kv_heads] (per kv head; a query head takes its
    kv head's). `k` serves the whole row of an MLA cache, which has no `v`.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    out: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("q", "k", "v", "out"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            label = f"scales.{name}"
            check_tensor(label, tensor, dtypes=(torch.float32,))
            if tensor.dim() > 1 or tensor.numel() == 0:
                raise bad_value(label, f"shape {tuple(tensor.shape)}", "one element, or [num_kv_heads]")
            if tensor.dim() == 1 and tensor.shape[0] > 1 and tensor.stride(0) != 1:
                raise bad_value(label, f"stride {tensor.stride(0)}", "a contiguous tensor")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad_type(name, value, "a number")
    if not (value == 0 or SMALLEST_FLOAT32 <= abs(value) <= LARGEST_FLOAT32):
        raise bad_value(name, value, "a finite number that float32 holds")


def _check_window(name: str, value: object, *, smallest: int, hint: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_type(name, value, "an int or None")
    if not smallest <= value < 2**31:
        raise bad_value(name, value, f"an int32 of at least {smallest}{hint}")
