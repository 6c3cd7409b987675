"""A kernel in float32 torch that keeps to the arithmetic its contract declares, and seeded faults in it.

Online softmax over tiles of keys, exp with its declared error, P rounded to the declared format, splits merged
by their lse, the sink first or last. It shares no code with the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pageproof.oracle.candidate import NumericContract
from pageproof.oracle.case import Case

LOG2E = math.log2(math.e)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Simulated:
    """A candidate for the attention operations. `fault` names what is wrong with it; "" is a right kernel."""

    arithmetic: NumericContract = field(default_factory=NumericContract)
    fault: str = ""
    seed: int = 0
    tensor_core: bool = False  # sums of products as a tensor core makes them, to the bits of u_score and u_value

    @property
    def name(self) -> str:
        return f"simulated, {self.fault}" if self.fault else "simulated"

    def declines(self, case: Case) -> str | None:
        return None

    def contract(self, case: Case) -> NumericContract:
        return self.arithmetic

    def call(self, operation: str, arguments: dict[str, Any]) -> None:
        out, lse, batch = (arguments[name] for name in ("out", "lse", "batch"))
        starts = batch.cu_seqlens_q.tolist()
        for request, seq_len in enumerate(batch.seq_lens.tolist()):
            first, stop = starts[request], starts[request + 1]
            if stop == first:
                continue
            step = _Step(self, operation, arguments, request, seq_len, first, stop)
            o, row_lse = step.answer()
            if self.fault == "last token not written":
                stop -= 1
            if self.fault == "empty rows left as they were" and bool((row_lse == -math.inf).all()):
                continue
            out[first:stop] = step.cast(o[: stop - first])
            lse[first:stop] = row_lse[: stop - first] * (LOG2E if self.fault == "lse in base 2" else 1.0)
        out[starts[-1] :] = torch.zeros_like(out[starts[-1] :])
        lse[starts[-1] :] = -math.inf

    def exp(self, x: Tensor) -> Tensor:
        """exp, wrong by up to the declared error, but for exp(0), which everything computes right."""
        generator = torch.Generator().manual_seed(self.seed + x.numel())
        jitter = torch.where(x == 0, 0.0, 2 * torch.rand(x.shape, generator=generator) - 1)
        return torch.exp(x) * (1 + 0.9 * self.arithmetic.exp_error * jitter)


def add_aligned(total: Tensor, products: Tensor, u: float) -> Tensor:
    """total [H, T, N] float32 plus products [H, T, 16, N] float64 in one step of a tensor core.

    All addends are cut to the lowest bit that the largest of them has in a significand of 1 - log2(u) bits, and
    the sum is cut to float32: neither is rounded to nearest.
    """
    addends = torch.cat((total.double()[:, :, None], products), dim=2)
    exponent = torch.frexp(addends.abs().amax(dim=2, keepdim=True)).exponent
    bit = u * torch.exp2(exponent.double() - 1)
    exact = ((addends / bit).trunc() * bit).sum(dim=2)
    rounded = exact.float()
    outwards = rounded.double().abs() > exact.abs()
    return torch.where(outwards, torch.nextafter(rounded, torch.zeros(())), rounded)


class _Step:
    """One request's rows: T tokens, H query heads, L keys. Scores are [H, T, L]."""

    def __init__(
        self,
        kernel: Simulated,
        operation: str,
        arguments: dict[str, Any],
        request: int,
        seq_len: int,
        first: int,
        stop: int,
    ) -> None:
        self.kernel, self.arithmetic, self.fault = kernel, kernel.arithmetic, kernel.fault
        self.rules, self.batch, self.scales = arguments["rules"], arguments["batch"], arguments.get("scales")
        self.arguments, self.request, self.seq_len = arguments, request, max(seq_len, 0)
        self.out_dtype, self.num_heads = arguments["out"].dtype, arguments["out"].shape[1]
        self.first, self.stop = first, stop
        self.positions = seq_len - (stop - first) + torch.arange(stop - first)
        self.keys = torch.arange(self.seq_len)
        self.num_kv_heads = 1
        q = arguments["q"] if operation == "attention" else torch.cat((arguments["q_nope"], arguments["q_pe"]), 2)
        self.q = q[first:stop].float()
        getattr(self, "_load_" + operation)()

    def answer(self) -> tuple[Tensor, Tensor]:
        scores = self.scores()
        self.v = torch.where((scores > -math.inf).flatten(0, 1).any(0).view(-1, 1, 1), self.v, 0.0)
        size = self.arithmetic.split_keys or max(1, self.seq_len)
        parts = []
        for number, start in enumerate(range(0, max(1, self.seq_len), size)):
            has_sink = number == 0 or self.fault == "sink in every split"
            parts.append(self.online_softmax(scores[..., start : start + size], self.v[start : start + size], has_sink))
        o, lse = parts[0] if len(parts) == 1 else self.merge(parts)
        if self.rules.sinks is not None and self.arithmetic.late_sink:
            o, lse = self.add_sink(o, lse)
        value_scale = None if self.fault == "value scale left out" else self.value_scale
        return o.permute(1, 0, 2) * self.per_head(value_scale)[:, None], lse.T

    def cast(self, o: Tensor) -> Tensor:
        if self.scales is not None and self.scales.out is not None:
            o = o / self.per_head(self.scales.out)[:, None]
        return (o.clamp(-448, 448) if self.out_dtype == torch.float8_e4m3fn else o).to(self.out_dtype)

    # Operands: k [L, Hkv, D] and v [L, Hkv, Dv] as stored, in float32; scales are factors of the results.

    def _load_attention(self) -> None:
        self.k, self.v = self.gather(self.arguments["k_cache"]), self.gather(self.arguments["v_cache"])
        self.num_kv_heads = self.k.shape[1]
        self.value_scale = self.scales.v if self.scales is not None else None

    def _load_mla_attention(self) -> None:
        self.k = self.gather(self.arguments["latent_cache"])[:, None]
        self.v = self.k[..., : self.arguments["q_nope"].shape[2]]
        self.value_scale = self.scales.k if self.scales is not None else None

    def _load_mla_attention_decompressed(self) -> None:
        """K and V are made in float32 and rounded to q's format, as the contract's key_dtype and value_dtype say."""
        w_uk, w_uv = self.arguments["w_uk"].float(), self.arguments["w_uv"].float()
        row = self.gather(self.arguments["latent_cache"])
        latent, k_pe = row[:, : w_uk.shape[2]], row[:, w_uk.shape[2] :]
        narrow = DTYPES[self.arithmetic.p_dtype]
        k_nope = torch.einsum("lc,hnc->lhn", latent, w_uk).to(narrow).float()
        self.k = torch.cat((k_nope, k_pe[:, None].expand(-1, self.num_heads, -1)), 2)
        self.v = torch.einsum("lc,hvc->lhv", latent, w_uv).to(narrow).float()
        self.num_kv_heads = self.num_heads
        self.value_scale = self.scales.k if self.scales is not None else None

    def gather(self, cache: Tensor) -> Tensor:
        block_size = cache.shape[1]
        columns = self.keys // block_size
        blocks = self.batch.block_table[self.request][columns].long()
        if self.fault == "page of the neighbour":
            blocks = torch.where(columns == columns.max(), self.batch.block_table[self.request][0].long(), blocks)
        elements = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
        rows = elements[blocks.clamp(0, cache.shape[0] - 1), self.keys % block_size]
        return rows.view(cache.dtype).float()

    def dot(self, a: Tensor, b: Tensor, u: float, start: Tensor | None = None) -> Tensor:
        """start + a @ b: [H, T, K], [H, K, N] to [H, T, N]."""
        if not self.kernel.tensor_core:
            return a @ b if start is None else start + a @ b
        total = torch.zeros(*a.shape[:2], b.shape[2]) if start is None else start
        for first in range(0, a.shape[2], 16):
            products = a[:, :, first : first + 16, None].double() * b[:, None, first : first + 16].double()
            total = add_aligned(total, products, u)
        return total

    def per_head(self, scale: Tensor | None) -> Tensor:
        """[H]: the factor of each query head."""
        if scale is None:
            return torch.ones(self.num_heads)
        scale = scale.reshape(-1)
        return scale[torch.arange(self.num_heads) * scale.numel() // self.num_heads]

    # Scores

    def scores(self) -> Tensor:
        rules, fault = self.rules, self.fault
        heads = torch.arange(self.num_heads)
        kv_heads = heads * self.num_kv_heads // self.num_heads
        if fault == "query heads mapped round robin":
            kv_heads = heads % self.num_kv_heads
        k, self.v = self.k[:, kv_heads], self.v[:, kv_heads]
        k = torch.where(k.isfinite(), k, 0.0)
        factor = self.per_head(None)
        if self.scales is not None:
            factor = self.per_head(self.scales.q) * self.per_head(self.scales.k)
            if fault == "key scale squared":
                factor = factor * self.per_head(self.scales.k)
        x = self.dot(self.q.transpose(0, 1), k.permute(1, 2, 0), self.arithmetic.u_score)
        x = x * (factor * rules.softmax_scale)[:, None, None]
        bias = self.bias()
        if rules.softcap is None or fault == "softcap left out":
            s = x + bias
        elif fault == "softcap after the bias":
            s = self.softcap(x + bias)
        else:
            s = self.softcap(x) + bias
        return torch.where(self.visible(), s, -math.inf)

    def softcap(self, x: Tensor) -> Tensor:
        cap = self.rules.softcap
        if self.arithmetic.tanh == "libm":
            return cap * torch.tanh(x / cap)
        return cap * (1 - 2 / (self.kernel.exp(2 * x / cap) + 1))

    def bias(self) -> Tensor:
        bias = torch.zeros(self.num_heads, len(self.positions), self.seq_len)
        if self.rules.alibi_slopes is not None:
            origin = 0 if self.fault == "ALiBi from key 0" else self.positions[:, None]
            bias = self.rules.alibi_slopes[:, None, None] * (self.keys - origin).float()
        if self.rules.query_bias is not None:
            entries = self.rules.query_bias[self.first : self.stop]
            columns = self.keys - (self.seq_len - len(self.positions))
            columns = columns - 1 if self.fault == "query bias one key late" else columns
            inside = (columns >= 0) & (columns < entries.shape[1])
            values = entries[:, columns.clamp(0, entries.shape[1] - 1)] if entries.shape[1] else 0.0
            bias = bias + torch.where(inside, torch.as_tensor(values).nan_to_num(nan=0.0, neginf=-math.inf), 0.0)
        return bias

    def visible(self) -> Tensor:
        """[T, L] bool, wrong as the fault says."""
        rules, fault = self.rules, self.fault
        distance = self.positions[:, None] - self.keys
        visible = (self.keys >= 0).expand_as(distance)
        if rules.causal:
            visible = visible & (distance >= (-1 if fault == "causal mask off by one" else 0))
        if rules.sliding_window is not None:
            wider = {"window one key wider": 1, "window one key narrower": -1}.get(fault, 0)
            visible = visible & (distance < rules.sliding_window + wider)
        if rules.right_window is not None:
            visible = visible & (-distance <= rules.right_window)
        if fault == "last key dropped":
            visible = visible & (self.keys != self.seq_len - 1)
        if fault == "first key of a tile dropped":
            visible = visible & (self.keys != self.arithmetic.tile_keys)
        return visible

    # Softmax: everything [H, T] or [H, T, *]

    def online_softmax(self, scores: Tensor, v: Tensor, has_sink: bool) -> tuple[Tensor, Tensor]:
        heads, rows = scores.shape[:2]
        maximum = torch.full((heads, rows), 0.0 if self.fault == "running maximum starts at 0" else -math.inf)
        total = torch.zeros(heads, rows)
        values = torch.zeros(heads, rows, v.shape[2])
        takes_all = torch.zeros(heads, 1, dtype=torch.bool)
        if self.rules.sinks is not None and has_sink and not self.arithmetic.late_sink:
            sink = self.sink()[:, None]
            takes_all = sink == math.inf
            maximum = torch.where(takes_all, -math.inf, sink).expand(heads, rows)
            total = maximum.isfinite().float()
        size = self.arithmetic.tile_keys
        for start in range(0, scores.shape[2], size):
            tile = scores[..., start : start + size]
            highest = torch.maximum(maximum, tile.amax(2))
            shift = torch.where(highest.isfinite(), highest, 0.0)
            p = self.weights(tile, shift)
            rescale = self.kernel.exp(maximum - shift)
            narrow = p.to(DTYPES[self.arithmetic.p_dtype]).float()
            total = total * rescale + (narrow if self.arithmetic.cast_denominator else p).sum(2)
            if self.fault == "no rescale of the accumulator":
                rescale = torch.ones_like(rescale)
            tile_values = v[start : start + size].transpose(0, 1)
            values = self.dot(narrow, tile_values, self.arithmetic.u_value, values * rescale[..., None])
            maximum = highest
        o = values / torch.where(total > 0, total, 1.0)[..., None]
        lse = torch.where(takes_all, math.inf, maximum + torch.log(total))
        return torch.where(takes_all[..., None], 0.0, o), lse

    def weights(self, tile: Tensor, shift: Tensor) -> Tensor:
        if self.arithmetic.exponent_roundings == 3:
            return self.kernel.exp((tile * LOG2E - (shift * LOG2E)[..., None]) / LOG2E)
        return self.kernel.exp(tile - shift[..., None])

    def merge(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        o, lse = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
        total = torch.logsumexp(lse, 0)
        weights = self.kernel.exp(lse - torch.where(total.isfinite(), total, 0.0))
        weights = torch.where(lse == math.inf, 1.0, torch.where((total == math.inf) & (lse < math.inf), 0.0, weights))
        if self.fault == "splits averaged":
            weights = torch.full_like(weights, 1 / len(parts))
        return (weights[..., None] * o).sum(0), total

    def add_sink(self, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.logaddexp(lse, self.sink()[:, None].expand_as(lse))
        keep = torch.where(total == -math.inf, 0.0, self.kernel.exp(lse - total))
        return torch.where(total == math.inf, 0.0, keep)[..., None] * o, total

    def sink(self) -> Tensor:
        sinks = self.rules.sinks
        if self.fault == "sink left out":
            return torch.full_like(sinks, -math.inf)
        return sinks + math.log(2) if self.fault == "sink doubled" else sinks
