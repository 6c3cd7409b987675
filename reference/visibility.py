"""Which keys a token may see: the causal rule and the windows, once for tensors and once for ranges of ints."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .problem import Rules


@dataclass(frozen=True)
class Limits:
    """What ends the keys that requests see, [G, 1] int64 each; None where the rules have no such window."""

    seq_lens: Tensor
    sliding_windows: Tensor | None
    right_windows: Tensor | None


def visible_keys(positions: Tensor, keys: Tensor, limits: Limits, *, causal: bool) -> Tensor:
    """Whether the token at each position may see each key, before the query bias hides more.

    positions [G, T] and keys [G, L], of at least 0, are int64; the answer is [G, T, L] bool.
    """
    p = positions[:, :, None]
    j = keys[:, None, :]
    visible = (j < limits.seq_lens[:, None]).expand(-1, positions.shape[1], -1)
    if causal:
        visible = visible & (j <= p)
    if limits.sliding_windows is not None:
        visible = visible & (p - j < limits.sliding_windows[:, None])
    if limits.right_windows is not None:
        visible = visible & (j - p <= limits.right_windows[:, None])
    return visible


def key_range(first: int, last: int, seq_len: int, rules: Rules) -> tuple[int, int]:
    """The half-open range of keys outside of which no token at positions first..last sees anything.

    Everything inside is not visible to everyone: this only says what need not be gathered.
    """
    start, stop = 0, seq_len
    if rules.sliding_window is not None:
        start = max(start, first - rules.sliding_window + 1)
    if rules.causal:
        stop = min(stop, last + 1)
    if rules.right_window is not None:
        stop = min(stop, last + rules.right_window + 1)
    return start, max(start, stop)
