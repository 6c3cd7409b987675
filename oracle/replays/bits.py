"""What has to have certain bits after a replay, whatever the reference says: most replays are looked at no closer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .answers import Known
from .captures import Captured
from .complaints import Complaint, Kept, Outputs, bytes_of, forms_of, in_layer, other_bits


@dataclass(frozen=True)
class Seen:
    """Tensors by layer, the bytes that they have and those that they have to have."""

    what: str  # is wrong if they differ
    tensors: Sequence[Outputs]
    found: Tensor  # as of `bytes_of`
    wanted: Tensor

    def complaint(self, known: Known) -> Complaint | None:
        """Of the first layer whose bytes are others."""
        sizes = [sum(tensor.nbytes for tensor in layer.values()) for layer in self.tensors]
        parts = zip(self.tensors, self.found.split(sizes), self.wanted.split(sizes), strict=True)
        for index, (layer, found, wanted) in enumerate(parts):
            complaint = other_bits(layer, found, wanted, known.memory[index].problem, self.what)
            if complaint is not None:
                return in_layer(complaint, known.memory[index], index)
        return None


@dataclass(frozen=True)
class _Held:
    """Results of a replay, which stay what they are until their capture runs again."""

    taken: Captured
    results: Tensor  # their bytes, in memory of their own


class Bits:
    """Looks at one replay after the other."""

    def __init__(self) -> None:
        self._held: _Held | None = None

    def after(self, taken: Captured, known: Known) -> tuple[Kept, list[Seen]]:
        """The outputs, to be those of a plain call, and results of the tail, which has to have seen finished ones.

        And results of the step before, if it ran in an earlier capture: a replay leaves alone what was kept while it
        was captured. Not the other way: what a graph captured later holds may lie where an earlier one has its
        scratch.
        """
        runner, held = taken.runner, self._held
        outputs, results = bytes_of(*runner.outputs), bytes_of(*runner.results)
        self._held = _Held(taken, results)
        seen = [
            Seen("other bits than a plain call's", runner.outputs, outputs, known.plain.bytes),
            Seen("what reads the outputs", runner.results, results, outputs),
        ]
        if held is not None and held.taken.number < taken.number:
            what, kept = "results of another graph, held during this replay", held.taken.runner.results
            seen.append(Seen(what, kept, bytes_of(*kept), held.results))
        return Kept(outputs, forms_of(runner.outputs)), seen
