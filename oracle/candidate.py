"""What the oracle asks of an implementation, and what an implementation declares of its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .case import DTYPES, FLOAT8, MODES, Case
from .execution.dispatch import FULL, PIECEWISE, dispatch, without_padding

if TYPE_CHECKING:
    from ..reference.problem import Batch

TANH_KINDS = ("libm", "exp", "series", "approx")
FORMATS = (*DTYPES, FLOAT8)


@dataclass(frozen=True, kw_only=True)
class NumericContract:
    """The arithmetic that a kernel declares; the error bound is computed from it and from nothing else.

    Unit roundoffs are relative: 2**-24 float32, 2**-11 float16 and tf32, 2**-8 bfloat16, 2**-4 e4m3.
    """

    p_dtype: str = "float32"  # the format that the probabilities are cast to before P @ V
    u_score: float = 2.0**-23  # unit roundoff of one addition inside q @ k; 2**-23 truncating, 2**-24 to nearest
    u_value: float = 2.0**-23  # the same inside P @ V
    u_sum: float = 2.0**-24  # the same inside the row sum of P
    tf32: bool = False  # q @ k and P @ V round float32 operands to tf32
    key_dtype: str = ""  # the format K is rounded to once more after it was dequantised or projected; "": none
    value_dtype: str = ""  # V likewise
    exp_error: float = 2.0**-22  # largest relative error of exp
    tanh: str = "exp"  # libm | exp (built on exp) | series (the same, and its series near 0) | approx (the hardware's)
    exponent_roundings: int = 1  # 1: subtract, then times log2(e); 3: the scale and log2(e) folded together
    tile_keys: int = 16  # keys per step of the online softmax; fewer is the safe side
    split_keys: int | None = None  # keys per split whose partial results are merged; None: never split
    u_partial: float = 2.0**-24  # format of the partial results
    late_sink: bool = True  # the sink joins after the last key rather than as the first running maximum
    cast_denominator: bool = False  # the denominator sums the cast P

    def __post_init__(self) -> None:
        for name, known in (("p_dtype", FORMATS), ("key_dtype", ("", *FORMATS)), ("value_dtype", ("", *FORMATS))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: found {getattr(self, name)!r}, expected one of {', '.join(filter(None, known))}"
                )
        if self.tanh not in TANH_KINDS:
            raise ValueError(f"tanh: found {self.tanh!r}, expected one of {', '.join(TANH_KINDS)}")


class Candidate(Protocol):
    """An implementation under judgement.

    One attribute is optional. `modes: tuple[str, ...]`: the execution modes in which its calls may run, of
    `case.MODES`; without it only "eager". Whoever names "full" or "piecewise" says that a call may be captured once
    and replayed on other values, and that a replay has the bits of a plain call on buffers of the same size.
    "full_and_piecewise" says less than "full": only of batches of one query length, and of captures of such with at
    least that length.

    Three methods are optional. `notes() -> list[str]`: lines about where it runs, printed when a campaign starts.
    `plan_of(case) -> dict[str, int]`: how it lays out its launches for this case, as counts under names of its own;
    a campaign counts how many different ones it saw, and for each name how often it was not 0. By arithmetic on the
    host, without a device. `split_keys` among the names, where it is there, says after how many keys splits end.
    `dispatch(query_lens: tuple[int, ...], captured_query_len: int) -> str`: in mode "full_and_piecewise" which capture
    takes a batch, "full" or "piecewise", by the query lengths of its requests, padding ones left out, and by that of
    the requests that the full one was captured for. The oracle expects the choice of `execution.dispatch.dispatch`,
    which is made where there is no such method.
    `make_plan(batch, capacity) -> object`: what the layers of one step share, made on the device from the batch's
    lengths; capacity is the buffers' (num_tokens, num_requests, seq_len). Attention gets it as the argument `plan`.
    """

    name: str

    def declines(self, case: Case) -> str | None:
        """Why this case is outside of what the implementation offers, or None."""

    def contract(self, case: Case) -> NumericContract:
        """The arithmetic that the implementation uses for this case."""

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        """Run one operation of the contract; `arguments` are its keyword arguments, `out` and `lse` included.

        merge_states returns its (out, lse); what the others return is not looked at.
        """


def modes_of(candidate: Candidate) -> tuple[str, ...]:
    """The execution modes that it offers."""
    return tuple(getattr(candidate, "modes", MODES[:1]))


def why_declined(candidate: Candidate, case: Case) -> str | None:
    """Why the case is outside of what the candidate offers, its execution mode included; None if it is not."""
    offered = modes_of(candidate)
    if case.mode not in offered:
        return f"mode {case.mode}: {candidate.name} offers {', '.join(offered)}"
    return candidate.declines(case)


def plan_of(candidate: Candidate, case: Case) -> dict[str, int]:
    """What the candidate says of its launches for this case; nothing if it says nothing."""
    ask = getattr(candidate, "plan_of", None)
    return {} if ask is None else dict(ask(case))


def dispatch_of(candidate: Candidate, query_lens: tuple[int, ...], captured_query_len: int) -> str:
    """Which capture the candidate gives a batch to; the oracle's choice if it makes none. ValueError for neither."""
    ask = getattr(candidate, "dispatch", dispatch)
    chosen: str = ask(without_padding(query_lens), captured_query_len)
    if chosen not in (FULL, PIECEWISE):
        raise ValueError(f"dispatch: found {chosen!r}, expected {FULL!r} or {PIECEWISE!r}")
    return chosen


def plan_for(candidate: Candidate, batch: Batch, capacity: tuple[int, int, int]) -> dict[str, Any]:
    """Attention's argument `plan` for all layers of a step; nothing if the candidate plans inside of its calls."""
    make = getattr(candidate, "make_plan", None)
    return {} if make is None else {"plan": make(batch, capacity)}
