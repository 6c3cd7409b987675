"""What replays left, by value: the device is asked later, and about many at once, whether it is what it has to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..building.guards import Guards, difference
from ..verdict import Outcome
from .answers import Known
from .bits import Seen
from .complaints import Complaint, Kept
from .replay import Replay

WAITING_BYTES = 1 << 29  # of what one case's replays left


@dataclass(frozen=True)
class Look:
    """At one replay. Lists are by layer."""

    replay: Replay
    known: Known
    guards: Sequence[Guards]
    outputs: Kept
    seen: Sequence[Seen]
    small: list[Tensor]  # what the small memories held: `Guards.small_now`

    @property
    def bytes(self) -> int:
        """What is kept for it alone: what the memories held, what they had to hold, and the bytes that were seen."""
        held = sum(small.nbytes + layer.small.nbytes for small, layer in zip(self.small, self.guards, strict=True))
        return held + sum(each.found.nbytes for each in self.seen)

    @property
    def is_urgent(self) -> bool:
        """Large memories are not copied: what they hold is gone with the next replay."""
        return any(layer.large for layer in self.guards)

    @property
    def has_another_form(self) -> bool:
        """Than a plain call's outputs: bytes then say nothing."""
        return self.outputs.forms != self.known.plain.forms

    def difference(self) -> Tensor:
        """[] bool on the device: whether any byte is another one than it has to be, if the form is the same."""
        held = [(small, layer.small) for small, layer in zip(self.small, self.guards, strict=True) if len(small)]
        large = [pair for layer in self.guards for pair in layer.large_pairs()]
        return difference([*large, *held, *((each.found, each.wanted) for each in self.seen)])

    def put_back(self) -> None:
        """Make the memories what they were after this replay, outputs aside."""
        for layer, small in zip(self.guards, self.small, strict=True):
            layer.put(small)

    def wrong_bits(self) -> Complaint | None:
        """Of what was seen, the first that has not the bits that it has to have."""
        if self.has_another_form:
            return Complaint(outcome=Outcome.DIFFERS, reason="outputs of another form than a plain call's")
        return next(filter(None, (each.complaint(self.known) for each in self.seen)), None)


class Looks:
    """Those of which nothing is known yet, in order."""

    def __init__(self) -> None:
        self._looks: list[Look] = []
        self._flags: list[Tensor] = []

    def add(self, look: Look) -> None:
        """One whose form is what it has to be."""
        self._looks.append(look)
        self._flags.append(look.difference())

    def __len__(self) -> int:
        return len(self._looks)

    @property
    def bytes(self) -> int:
        """What is kept of them."""
        return sum(look.bytes for look in self._looks)

    @property
    def are_due(self) -> bool:
        """Whether the device has to be asked before the next replay."""
        return any(look.is_urgent for look in self._looks) or self.bytes > WAITING_BYTES

    def difference(self) -> Tensor | None:
        """[] bool on the device: whether something in any of them is not what it has to be. None: there are none."""
        return torch.stack(self._flags).any() if self._flags else None

    def changed(self) -> list[Look]:
        """Those in which something is not; the others are done with. Waits for the device."""
        looks, flags = self._looks, self._flags
        self.clear()
        answers = torch.stack(flags).tolist() if flags else []
        return [look for look, changed in zip(looks, answers, strict=True) if changed]

    def clear(self) -> None:
        """All are done with."""
        self._looks, self._flags = [], []
