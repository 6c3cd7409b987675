"""The distinct steps of a case that ran, and what the reference says of them: it is asked once for many steps.

Until then a step waits with its memory as it was built and with a plain call's outputs, to which its replay is held bit
for bit. So no answer is in memory before the candidate has run all steps that it is of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..bound.evaluate import Expected
from ..bound.statistics import why_not_generic
from ..bound.together import footprint
from ..candidate import NumericContract
from ..compare import Ratios
from ..questions import Question, Reply, ask_together
from .buffers import InMemory
from .complaints import Kept
from .replay import Replay

WAITING_BYTES = 1 << 30  # of one case's steps that wait, and of what their evaluation will take, roughly


@dataclass
class Known:
    """A distinct step, as far as it is the same each time that it comes. Lists are by layer."""

    replay: Replay  # the first one
    memory: list[InMemory]  # as built
    plain: Kept  # a plain call's outputs
    expected: list[Expected] = field(default_factory=list)  # once the reference was asked

    @property
    def bytes(self) -> int:
        return sum(footprint(layer.problem) for layer in self.memory)

    def as_built(self) -> list[InMemory]:
        """The memory, whatever the candidate has done to it since."""
        for layer in self.memory:
            layer.problem.guards.put_back()
        return self.memory


class Answers:
    """What the reference says of the steps of a case; `contracts` are by layer."""

    def __init__(self, contracts: Sequence[NumericContract]) -> None:
        self._contracts = contracts
        self._waiting: list[Known] = []
        self.ratios: dict[str, float] = {}

    def wait(self, known: Known) -> None:
        """The step ran, and is held to the bits of a plain call."""
        self._waiting.append(known)

    @property
    def bytes(self) -> int:
        """What the waiting steps take, and their evaluation will, roughly."""
        return sum(known.bytes for known in self._waiting)

    @property
    def is_due(self) -> bool:
        """Whether what waits takes as much memory as it may."""
        return self.bytes > WAITING_BYTES

    def questions(self) -> list[Question]:
        """Of all steps that wait, their layers one after the other."""
        return [question for known in self._waiting for question in self._about(known)]

    def hear(self, replies: Sequence[Reply]) -> list[Known]:
        """The replies to these. Steps that have to be looked at one by one, in order; the others agree."""
        heard, waiting = iter(replies), self._waiting
        self._waiting = []
        return [known for known in waiting if not self._agrees(known, [next(heard) for _ in self._contracts])]

    def settle(self, *, before: int | None = None) -> list[Known]:
        """Ask of the steps that wait, all or those that ran before the replay of this number; hear the replies."""
        later = [known for known in self._waiting if before is not None and known.replay.number >= before]
        self._waiting = [known for known in self._waiting if all(known is not other for other in later)]
        doubtful = self.hear(ask_together(self.questions()))
        self._waiting = later
        return doubtful

    def ask(self, known: Known) -> None:
        """Of one step alone, unless its answer is there already."""
        if not known.expected:
            known.expected = [reply.expected for reply in ask_together(self._about(known))]

    def _about(self, known: Known) -> list[Question]:
        layers = zip(known.as_built(), self._contracts, known.plain.tensors(), strict=True)
        return [
            Question(
                problem=memory.problem, contract=contract, actual=outputs, generic=_is_generic(known, index, contract)
            )
            for index, (memory, contract, outputs) in enumerate(layers)
        ]

    def _agrees(self, known: Known, replies: Sequence[Reply]) -> bool:
        known.expected = [reply.expected for reply in replies]
        for reply in replies:
            if reply.ratios is None:
                return False
            self.keep(reply.ratios)
        return True

    def keep(self, ratios: Ratios) -> None:
        """The largest ones of the case."""
        self.ratios.update({name: max(ratio, self.ratios.get(name, 0.0)) for name, ratio in ratios})


def _is_generic(known: Known, layer: int, contract: NumericContract) -> bool:
    """Whether roundings are independent; rewritten slots hold what the case does not say."""
    return not known.replay.step.rewrites and why_not_generic(known.memory[layer].problem.case, contract) is None
