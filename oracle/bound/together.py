"""Several attention problems as one: on a GPU an evaluation costs its launches, however many rows it is of.

The steps of a case in a mode other than eager have one spec, one size of pool and one width of block table. As one
problem they have all requests and all rows, step after step, and their pools are further blocks of one pool. What the
steps differ in beyond that, scales, slopes and sinks, is given to each chunk's requests as their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...reference.casting import per_query_head
from ...reference.problem import Batch, Rules, Scales
from ...reference.rows import Rows, as_bytes

if TYPE_CHECKING:
    from ..building.problem import Problem

_ROWS = ("q", "q_nope", "q_pe")
_CACHES = ("k_cache", "v_cache", "latent_cache")


@dataclass(frozen=True)
class Own:
    """What requests have of their own, by step; float64 but for slopes and sinks. One row more is that of padding."""

    steps: Tensor  # [num_requests] int32
    alibi_slopes: Tensor | None  # [num_steps + 1, num_query_heads]
    sinks: Tensor | None  # likewise; none, -inf, for padding
    q: Tensor | None  # scales [num_steps + 1, num_kv_heads or 1]
    k: Tensor | None
    v: Tensor | None

    def put_in(self, rows: Rows) -> Rows:
        """The rows, made without any of this, with what is their requests' own."""
        steps = self.steps[rows.requests]
        return replace(
            rows,
            alibi_slopes=None if self.alibi_slopes is None else self.alibi_slopes[steps],
            sinks=None if self.sinks is None else self.sinks[steps],
            q=rows.q if self.q is None else rows.q * self.q[steps][:, None, :, None, None],
            k=rows.k if self.k is None else rows.k * self.k[steps][:, None, :, None],
            v=rows.v if self.v is None else rows.v * self.v[steps][:, None, :, None],
        )


@dataclass(frozen=True)
class Part:
    """What the reference is asked at once.

    With `own`, `arguments` say only whether there are scales, slopes and sinks; their values are `own`'s.
    """

    arguments: dict[str, Any]
    own: Own | None = None

    def common(self, scales: Scales) -> Scales | None:
        """The scales that all requests share."""
        return scales if self.own is None else None

    def with_own(self, rows: Rows) -> Rows:
        return rows if self.own is None else self.own.put_in(rows)


@dataclass(frozen=True)
class Together:
    """Attention problems of one spec, their rows one after the other."""

    num_tokens: tuple[int, ...]  # of each problem
    parts: tuple[Part, ...]  # every row is in one of them, or is padding
    out: Tensor  # [num_tokens, num_query_heads, head_size_v]: shape, dtype and device of all outputs; nothing in it
    lse: Tensor  # [num_tokens, num_query_heads]: the same
    out_scale: Tensor | None  # that out is divided by, broadcast over it


def alone(problem: Problem) -> Together:
    """One problem as it is."""
    arguments = problem.arguments
    out, lse = arguments["out"], arguments["lse"]
    scales = arguments.get("scales") or Scales()
    return Together((len(out),), (Part(arguments),), out, lse, per_query_head(scales.out, out.shape[1]))


def together(problems: Sequence[Problem]) -> Together:
    """Problems of one spec, one pool size and one table width, with the lengths that their cases say.

    Where the keys are made by weights of each step's own, every step is a part, of the rows of all.
    """
    outs = [problem.arguments["out"] for problem in problems]
    num_tokens = tuple(len(out) for out in outs)
    requests = _requests(problems)
    given = [problem.arguments for problem in problems]
    rows: dict[str, Any] = {name: joined([each[name] for each in given]) for name in _ROWS if name in given[0]}
    biases = [each["rules"].query_bias for each in given]
    query_bias = None if biases[0] is None else joined(biases)
    if "w_uk" in given[0]:
        parts = [
            Part({**each, **rows, "batch": batch, "rules": replace(each["rules"], query_bias=query_bias)})
            for each, batch in zip(given, _batches(problems, requests), strict=True)
        ]
    else:
        rows |= {name: joined([each[name] for each in given]) for name in _CACHES if name in given[0]}
        rules = replace(given[0]["rules"], query_bias=query_bias)
        arguments = {**given[0], **rows, "batch": _batch(problems, requests), "rules": rules}
        parts = [Part(arguments, _own(given, requests[2]))]
    out = outs[0].new_empty((sum(num_tokens), *outs[0].shape[1:]))
    lse = given[0]["lse"].new_empty(out.shape[:2])
    return Together(num_tokens, tuple(parts), out, lse, _out_scale(given, outs))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other, in memory of their own; float8 as well."""
    return torch.cat([as_bytes(tensor) for tensor in tensors]).view(tensors[0].dtype)


def _requests(problems: Sequence[Problem]) -> Tensor:
    """[4, num_requests + 1] int32, in one transfer: first rows, keys, steps, and the first block of each one's pool.

    The padding rows of a step are those of one more request, without a key and, by its step, without a sink.
    """
    columns, block = [], 0
    for step, problem in enumerate(problems):
        batch = problem.case.batch
        columns += [(n, length, step, block) for n, length in zip(batch.query_lens, batch.seq_lens, strict=True)]
        columns.append((batch.padding_tokens, 0, len(problems), 0))
        block += _num_blocks(problem)
    array = np.array([*columns, (0, 0, 0, 0)], dtype=np.int32).T.copy()
    array[0] = np.cumsum(array[0]) - array[0]
    return torch.from_numpy(array).to(problems[0].arguments["out"].device, non_blocking=True)


def _num_blocks(problem: Problem) -> int:
    return next(len(problem.arguments[name]) for name in _CACHES if name in problem.arguments)


def _batch(problems: Sequence[Problem], requests: Tensor) -> Batch:
    """All requests. Entries that mean nothing may overflow here."""
    tables = []
    for problem in problems:
        table = problem.arguments["batch"].block_table
        tables += [table, table.new_zeros((1, table.shape[1]))]
    starts, seq_lens, _, blocks = requests
    return Batch(starts, seq_lens[:-1], torch.cat(tables) + blocks[:-1, None])


def _batches(problems: Sequence[Problem], requests: Tensor) -> list[Batch]:
    """Each step's own requests, by the rows of all."""
    batches, first = [], 0
    for problem in problems:
        batch = problem.arguments["batch"]
        batches.append(replace(batch, cu_seqlens_q=requests[0, first : first + batch.num_requests + 1]))
        first += batch.num_requests + 1
    return batches


def _own(given: Sequence[dict[str, Any]], steps: Tensor) -> Own:
    rules: list[Rules] = [each["rules"] for each in given]
    scales: list[Scales] = [each.get("scales") or Scales() for each in given]

    def scale(of: Callable[[Scales], Tensor | None]) -> Tensor | None:
        found = _by_step([None if (one := of(each)) is None else one.reshape(-1) for each in scales])
        return None if found is None else found.double()

    k = scale(lambda each: each.k)
    return Own(
        steps=steps[:-1],
        alibi_slopes=_by_step([each.alibi_slopes for each in rules]),
        sinks=_by_step([each.sinks for each in rules], padding=-torch.inf),
        q=scale(lambda each: each.q),
        k=k,
        v=k if "latent_cache" in given[0] else scale(lambda each: each.v),  # one scale for a whole latent row
    )


def _by_step(values: Sequence[Tensor | None], padding: float = 1.0) -> Tensor | None:
    """[num_steps + 1, ...]: everyone's, and `padding`; None where nobody has any."""
    found = [value for value in values if value is not None]
    return torch.stack([*found, torch.full_like(found[0], padding)]) if found else None


def _out_scale(given: Sequence[dict[str, Any]], outs: Sequence[Tensor]) -> Tensor | None:
    """[num_tokens, num_query_heads, 1]."""
    found = []
    for each, out in zip(given, outs, strict=True):
        scale = per_query_head((each.get("scales") or Scales()).out, out.shape[1])
        if scale is not None:
            found.append(scale.expand(*out.shape[:2], 1))
    return torch.cat(found) if found else None
