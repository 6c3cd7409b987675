"""An element's place in the words of its batch: request, token, position, head, dim; or block, offset, slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..reference.problem import Batch, Rules
from ..reference.visibility import key_range

if TYPE_CHECKING:
    from .building.problem import Problem


def locate(problem: Problem, output: str, index: tuple[int, ...]) -> str:
    """Where `index` of this output lies. Reads a few lengths from the device, so it is for failures only."""
    if output.endswith("_cache"):
        return _in_cache(problem, output, index)
    words = []
    if "batch" in problem.arguments:
        words += _in_batch(problem.arguments["batch"], problem.arguments["rules"], index[0])
    else:
        words.append(f"token {index[0]}")
    spec = problem.case.spec
    words.append(f"query head {index[1]} (kv head {index[1] // spec.group_size})")
    if len(index) > 2:
        words.append(f"dim {index[2]}")
    return ", ".join(words)


def _in_batch(batch: Batch, rules: Rules, token: int) -> list[str]:
    starts, seq_lens = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()
    if token >= starts[-1]:
        return [f"padding row {token - starts[-1]} after the batch's {starts[-1]} tokens"]
    request = next(number for number, stop in enumerate(starts[1:]) if token < stop)
    query_len, seq_len = starts[request + 1] - starts[request], seq_lens[request]
    row = token - starts[request]
    position = seq_len - query_len + row
    first, stop = key_range(position, position, seq_len, rules)
    keys = f"sees keys {first}..{stop - 1}" if stop > first else "sees no key"
    if stop > first and rules.query_bias is not None:
        keys += " at most"
    return [f"request {request}", f"token {row} of {query_len} at position {position} of {seq_len} keys", keys]


def _in_cache(problem: Problem, output: str, index: tuple[int, ...]) -> str:
    block, offset = index[:2]
    slot = block * problem.pristine[output].shape[1] + offset
    words = [f"block {block}, offset {offset} (slot {slot})"]
    if len(index) > 3:
        words.append(f"kv head {index[2]}")
    words.append(f"dim {index[-1]}")
    rows = (problem.arguments["slot_mapping"] == slot).nonzero().flatten().tolist()
    words.append(f"written from row {rows[0]}" if rows else "no row is mapped here, so it had to stay as it was")
    return ", ".join(words)
