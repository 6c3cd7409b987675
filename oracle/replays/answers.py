"""The distinct steps of a case that ran, and what the reference says of them: it is asked once for many steps.

Until then a step waits with its memory as it was built and with a plain call's outputs, which its replay has met bit
for bit. So no answer is in memory before the candidate has run all steps that it is of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..bound.evaluate import Expected, evaluate, evaluate_together
from ..bound.statistics import why_not_generic
from ..bound.together import footprint, is_exact
from ..candidate import NumericContract
from ..compare import Ratios, ratios_by_case
from .buffers import InMemory
from .complaints import Kept, end_to_end
from .replay import Replay

WAITING_BYTES = 1 << 30  # of steps that wait, and of what their evaluation will take, roughly


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
        """The step ran, and its outputs are those of a plain call."""
        self._waiting.append(known)

    @property
    def is_due(self) -> bool:
        """Whether what waits takes as much memory as it may."""
        return sum(known.bytes for known in self._waiting) > WAITING_BYTES

    def settle(self) -> list[Known]:
        """Ask of all steps that wait. Those that have to be looked at one by one, in order; the others agree."""
        waiting, self._waiting = self._waiting, []
        doubtful: list[Known] = []
        for group, layer, whole in self._asked(waiting):
            outputs = end_to_end([known.plain for known in group], layer)
            num_tokens = [known.replay.step.case.batch.num_tokens for known in group]
            by_step = [None] * len(group) if outputs is None else ratios_by_case(outputs, whole, num_tokens)
            for known, ratios in zip(group, by_step, strict=True):
                if ratios is None:
                    doubtful.append(known)
                else:
                    self.keep(ratios)
        return [known for known in waiting if any(known is other for other in doubtful)]

    def ask(self, known: Known) -> None:
        """Of one step alone, unless its answer is there already."""
        if known.expected:
            return
        if is_exact(known.replay.step.case.spec):
            layers = zip(known.as_built(), self._contracts, strict=True)
            known.expected = [evaluate(layer.problem, contract) for layer, contract in layers]
        else:
            list(self._asked([known]))

    def keep(self, ratios: Ratios) -> None:
        """The largest ones of the case."""
        self.ratios.update({name: max(ratio, self.ratios.get(name, 0.0)) for name, ratio in ratios})

    def _asked(self, steps: Sequence[Known]) -> Iterator[tuple[list[Known], int, Expected]]:
        """(steps, a layer, what it should have given in all of them); each of the steps is told its own part."""
        for known in steps:
            known.as_built()
        for layer, contract in enumerate(self._contracts):
            for generic in (True, False):
                group = [known for known in steps if _is_generic(known, layer, contract) is generic]
                if group:
                    problems = [known.memory[layer].problem for known in group]
                    whole = evaluate_together(problems, contract, generic=generic)
                    _tell(group, whole)
                    yield group, layer, whole


def _tell(group: Sequence[Known], whole: Expected) -> None:
    first = 0
    for known in group:
        stop = first + known.replay.step.case.batch.num_tokens
        known.expected.append(whole.rows(first, stop))
        first = stop


def _is_generic(known: Known, layer: int, contract: NumericContract) -> bool:
    """Whether roundings are independent; rewritten slots hold what the case does not say."""
    return not known.replay.step.rewrites and why_not_generic(known.memory[layer].problem.case, contract) is None
