"""One tensor's loads and stores against what the contract says of each of its elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..building.poison import is_unwritten
from ..execution.tracing import Bools, Ints
from .reads_memory import Memory, Region
from .reads_rights import Rights
from .reads_words import Words, more

_ONCE = "which is to be written once"


@dataclass(frozen=True)
class Elements:
    """The elements of one tensor; every array has its shape."""

    region: Region
    rights: Rights
    words: Words
    loads: Bools  # loaded at all
    stores: Ints  # how often

    @staticmethod
    def of(region: Region, rights: Rights, memory: Memory, words: Words) -> Elements:
        loads, stores = (
            np.bincount(touches[region.name].elements, minlength=region.tensor.numel()).reshape(region.shape)
            for touches in (memory.loads, memory.stores)
        )
        return Elements(region, rights, words, loads > 0, stores)

    def touched(self) -> Iterator[str]:
        """What was loaded or stored and should not have been."""
        wanted, may_read = self._spread(self.rights.stores), self._spread(self.rights.may_read)
        yield from self._say((self.stores > 0) & ~wanted, "stores to", "which is not to be written")
        yield from self._say((self.stores > 1) & wanted, "stores more than once to", _ONCE)
        yield from self._say(self.loads & ~may_read, "reads", self.rights.forbidden)

    def untouched(self) -> Iterator[str]:
        """What was not loaded or stored and should have been."""
        wanted, must_read = self._spread(self.rights.stores), self._spread(self.rights.must_read)
        if wanted.any():
            yield from self._say((self.stores == 0) & wanted & self._is_left(), "never stores to", _ONCE)
        yield from self._say(must_read & ~self.loads, "never reads", self.rights.needed)

    def _spread(self, rights: Bools | bool) -> Bools:
        return np.broadcast_to(np.asarray(rights), self.region.shape)

    def _is_left(self) -> Bools:
        """Where nobody wrote, so far as the value says: torch may write as well, and is not seen."""
        problem, tensor = self.words.problem, self.region.tensor
        if self.region.name in problem.pristine:
            return np.ones(self.region.shape, dtype=bool)
        if problem.outputs:
            return np.asarray(is_unwritten(tensor).numpy())
        return np.asarray(tensor.float().isnan().numpy())  # what merge_states returns came from torch.empty

    def _say(self, wrong: Bools, verb: str, why: str) -> Iterator[str]:
        """The first of the wrong elements, and how many there are; slots rather than elements in a cache."""
        if not wrong.any():
            return
        name = self.region.name
        place = self.words.element(name, tuple(int(part) for part in np.argwhere(wrong)[0]))
        in_slots = name.endswith("_cache")
        count = int(np.count_nonzero(wrong.reshape(*wrong.shape[:2], -1).any(axis=2) if in_slots else wrong))
        yield f"{name}: {verb} {place}, {why}{more(count, 'slots' if in_slots else 'elements')}"
