"""One run of what was captured, and how what is wrong with it is told."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..verdict import Outcome
from .captures import Captured
from .complaints import Complaint
from .sequence import Step


@dataclass(frozen=True)
class Replay:
    """A step, and in what it ran."""

    number: int  # how many ran before it
    step: Step
    last: Step  # what the buffers held before
    taken: Captured

    def blamed(self, found: Complaint, mode: str, replays: int) -> Complaint:
        """The complaint with which replay of how many it was, and what had changed."""
        step, taken = self.step, self.taken
        batch = step.case.batch
        rows = f"{sum(batch.query_lens)} tokens in a bucket of {batch.num_tokens} and {batch.num_requests} requests"
        captured = "captured" if taken.kind == mode else f"dispatched to {taken.kind}, captured"
        lines = [
            f"mode {mode}, replay {self.number + 1} of {replays} ({step.profile}: {rows}), "
            f"after {self.last.profile}, {captured} on {taken.step.profile}; "
            f"{_changed(self.last, step)} changed; a plain call agrees",
            found.outcome.value if not found.reason else f"{found.outcome.value}: {found.reason}",
        ]
        return replace(found, outcome=Outcome.REPLAY_DIFFERS, reason="\n".join(lines))


def _changed(before: Step, after: Step) -> str:
    old, new = before.case, after.case
    parts = {
        "query lengths": old.batch.query_lens != new.batch.query_lens,
        "sequence lengths": old.batch.seq_lens != new.batch.seq_lens,
        "pages and slots": old.seed != new.seed,
        "values": old.seed != new.seed or before.rewrites != after.rewrites,
    }
    return ", ".join(name for name, differs in parts.items() if differs) or "nothing"
