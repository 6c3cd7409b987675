"""Several attention problems as one: on a GPU an evaluation costs its launches, however many rows it is of.

Problems of one kernel, the steps of a case or the cases of a compile key, have all requests and all rows as one,
problem after problem, and their pools are further blocks of one pool. What they differ in beyond that, windows,
softcaps, scales, slopes and sinks, is given to each chunk's requests as their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...reference.casting import per_query_head
from ...reference.chunks import Request
from ...reference.problem import Batch, Rules, Scales
from ...reference.rows import Rows, as_bytes
from ..case import Spec

if TYPE_CHECKING:
    from ..building.problem import Problem

OUT_BYTES = 128  # of an evaluation, for each element of out

_ROWS = ("q", "q_nope", "q_pe")
_CACHES = ("k_cache", "v_cache", "latent_cache")


@dataclass(frozen=True)
class Own:
    """What requests have of their own, by problem; float64 but for slopes and sinks. One row more is padding's."""

    problems: Tensor  # [num_requests] int32
    softcap: Tensor | None  # [num_problems + 1]
    alibi_slopes: Tensor | None  # [num_problems + 1, num_query_heads]
    sinks: Tensor | None  # likewise; none, -inf, for padding
    q: Tensor | None  # scales [num_problems + 1, num_kv_heads or 1]
    k: Tensor | None
    v: Tensor | None

    def put_in(self, rows: Rows) -> Rows:
        """The rows, made without any of this, with what is their requests' own."""
        mine = self.problems[rows.requests]
        return replace(
            rows,
            softcap=None if self.softcap is None else self.softcap[mine][:, None, None, None, None],
            alibi_slopes=None if self.alibi_slopes is None else self.alibi_slopes[mine],
            sinks=None if self.sinks is None else self.sinks[mine],
            q=rows.q if self.q is None else rows.q * self.q[mine][:, None, :, None, None],
            k=rows.k if self.k is None else rows.k * self.k[mine][:, None, :, None],
            v=rows.v if self.v is None else rows.v * self.v[mine][:, None, :, None],
        )


@dataclass(frozen=True)
class Part:
    """What the reference is asked at once.

    With `own`, `arguments` say only whether there are windows, a softcap, scales, slopes and sinks; what they are,
    `requests` and `own` say.
    """

    arguments: dict[str, Any]
    requests: Sequence[Request] | None = None  # None: the host does not know them
    own: Own | None = None

    def common(self, scales: Scales) -> Scales | None:
        """The scales that all requests share."""
        return scales if self.own is None else None

    def with_own(self, rows: Rows) -> Rows:
        return rows if self.own is None else self.own.put_in(rows)


@dataclass(frozen=True)
class Together:
    """Attention problems of one kernel, their rows one after the other."""

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
    """Problems of one kernel (`kernel_of`), with the lengths that their cases say.

    Where the keys are made by weights of each one's own, every problem is a part, of the rows of all.
    """
    outs = [problem.arguments["out"] for problem in problems]
    num_tokens = tuple(len(out) for out in outs)
    given = [problem.arguments for problem in problems]
    rows: dict[str, Any] = {name: joined([each[name] for each in given]) for name in _ROWS if name in given[0]}
    query_bias = _wide([each["rules"].query_bias for each in given])
    requests = _requests(problems)
    starts = _starts(problems, requests)
    if "w_uk" in given[0]:
        parts = [
            Part({**each, **rows, "batch": batch, "rules": replace(each["rules"], query_bias=query_bias)}, mine)
            for each, (batch, mine) in zip(given, _batches(problems, requests, starts), strict=True)
        ]
    else:
        rows |= {name: joined([each[name] for each in given]) for name in _CACHES if name in given[0]}
        rules = replace(given[0]["rules"], query_bias=query_bias)
        arguments = {**given[0], **rows, "batch": _batch(problems, starts), "rules": rules}
        parts = [Part(arguments, [request for mine in requests for request in mine], _own(given, starts[2]))]
    out = outs[0].new_empty((sum(num_tokens), *outs[0].shape[1:]))
    lse = given[0]["lse"].new_empty(out.shape[:2])
    return Together(num_tokens, tuple(parts), out, lse, _out_scale(given, outs))


def kernel_of(spec: Spec) -> Spec:
    """The spec without what problems that are put together may differ in; whether there is a window or a cap stays."""
    return replace(
        spec,
        sliding_window=spec.sliding_window and 1,
        right_window=None if spec.right_window is None else 0,
        softcap=spec.softcap and 1.0,
        query_bias="none" if spec.query_bias == "none" else "dense",
        bias_width=0,
    )


def is_exact(spec: Spec) -> bool:
    """Whether the outputs are caches, which the reference updates at next to no cost."""
    return spec.operation.startswith("update_")


def footprint(problem: Problem) -> int:
    """Bytes, roughly: its memory, what is remembered of it, its part of the pools put together, and the evaluation."""
    rows = problem.arguments.get("out", problem.arguments.get("out_a"))
    watched = sum(watch.memory.nbytes for watch in problem.guards.watches)
    return 3 * watched + (0 if rows is None else OUT_BYTES * rows.numel())


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other, in memory of their own; float8 as well."""
    return torch.cat([as_bytes(tensor) for tensor in tensors]).view(tensors[0].dtype)


def _wide(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One below the other, filled up with zeros to one width; None where nobody has any."""
    found = [tensor for tensor in tensors if tensor is not None]
    width = max((tensor.shape[1] for tensor in found), default=0)
    return torch.cat([pad(each, (0, width - each.shape[1])) for each in found]) if found else None


def _requests(problems: Sequence[Problem]) -> list[list[Request]]:
    """Each problem's, by the rows of all; the padding rows of each are those of one more, without a key."""
    found, row, index = [], 0, 0
    for problem in problems:
        batch, rules = problem.case.batch, problem.arguments["rules"]
        mine = []
        lengths = zip(batch.query_lens, batch.seq_lens, strict=True)
        for query_len, seq_len in (*lengths, (batch.padding_tokens, 0)):
            mine.append(Request(index, row, query_len, seq_len, rules))
            row, index = row + query_len, index + 1
        found.append(mine)
    return found


def _starts(problems: Sequence[Problem], requests: Sequence[Sequence[Request]]) -> Tensor:
    """[4, num_requests + 1] int32, in one transfer: first rows, keys, problems, the first block of each one's pool.

    Padding, which by its problem has no sink, is of none.
    """
    columns, block, row = [], 0, 0
    for number, (problem, mine) in enumerate(zip(problems, requests, strict=True)):
        columns += [(each.first_token, each.seq_len, number, block) for each in mine[:-1]]
        columns.append((mine[-1].first_token, 0, len(problems), 0))
        block += _num_blocks(problem)
        row = mine[-1].first_token + mine[-1].query_len
    array = np.array([*columns, (row, 0, 0, 0)], dtype=np.int32).T.copy()
    return torch.from_numpy(array).to(problems[0].arguments["out"].device, non_blocking=True)


def _num_blocks(problem: Problem) -> int:
    return next(len(problem.arguments[name]) for name in _CACHES if name in problem.arguments)


def _batch(problems: Sequence[Problem], starts: Tensor) -> Batch:
    """All requests. Entries that mean nothing may overflow here."""
    tables = [problem.arguments["batch"].block_table for problem in problems]
    width = max(table.shape[1] for table in tables)
    table = torch.cat([pad(each, (0, width - each.shape[1], 0, 1)) for each in tables])  # a row for the padding
    first_rows, seq_lens, _, blocks = starts
    return Batch(first_rows, seq_lens[:-1], table + blocks[:-1, None])


def _batches(
    problems: Sequence[Problem], requests: Sequence[Sequence[Request]], starts: Tensor
) -> Iterator[tuple[Batch, list[Request]]]:
    """Each problem's own requests, by the rows of all; its padding, which has no keys, is left out."""
    first = 0
    for problem, mine in zip(problems, requests, strict=True):
        own = [replace(request, index=request.index - first) for request in mine[:-1]]
        batch = problem.arguments["batch"]
        yield replace(batch, cu_seqlens_q=starts[0, first : first + len(mine)]), own
        first += len(mine)


def _own(given: Sequence[dict[str, Any]], problems: Tensor) -> Own:
    rules: list[Rules] = [each["rules"] for each in given]
    scales: list[Scales] = [each.get("scales") or Scales() for each in given]

    def scale(of: Callable[[Scales], Tensor | None]) -> Tensor | None:
        found = _by_problem([None if (one := of(each)) is None else one.reshape(-1) for each in scales])
        return None if found is None else found.double()

    k = scale(lambda each: each.k)
    return Own(
        problems=problems[:-1],
        softcap=_softcaps(rules, problems.device),
        alibi_slopes=_by_problem([each.alibi_slopes for each in rules]),
        sinks=_by_problem([each.sinks for each in rules], padding=-torch.inf),
        q=scale(lambda each: each.q),
        k=k,
        v=k if "latent_cache" in given[0] else scale(lambda each: each.v),  # one scale for a whole latent row
    )


def _by_problem(values: Sequence[Tensor | None], padding: float = 1.0) -> Tensor | None:
    """[num_problems + 1, ...]: everyone's, and `padding`; None where nobody has any."""
    found = [value for value in values if value is not None]
    return torch.stack([*found, torch.full_like(found[0], padding)]) if found else None


def _softcaps(rules: Sequence[Rules], device: torch.device) -> Tensor | None:
    """[num_problems + 1] float64; any number for padding."""
    found = [each.softcap for each in rules if each.softcap is not None]
    return torch.tensor([*found, 1.0], dtype=torch.float64).to(device, non_blocking=True) if found else None


def _out_scale(given: Sequence[dict[str, Any]], outs: Sequence[Tensor]) -> Tensor | None:
    """[num_tokens, num_query_heads, 1]."""
    found = []
    for each, out in zip(given, outs, strict=True):
        scale = per_query_head((each.get("scales") or Scales()).out, out.shape[1])
        if scale is not None:
            found.append(scale.expand(*out.shape[:2], 1))
    return torch.cat(found) if found else None
