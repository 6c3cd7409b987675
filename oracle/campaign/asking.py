"""What a worker asks the judge, and what it makes of an answer that did not come."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..candidate import Candidate
from ..case import Case
from ..judging import judge as plain_judge
from ..judging_many import judge_many
from ..verdict import ORACLE_FAILED, Outcome, Verdict
from .messages import Setup

Judge = Callable[[Case, Candidate, torch.device | str], Verdict]

OUT_OF_MEMORY = "out of device memory, beside the other workers' cases"
FULL_SHARE = 8  # a device with less than this part of its memory free is full


def load_judge(path: str) -> Judge:
    module, _, name = path.partition(":")
    judge: Judge = getattr(importlib.import_module(module, __package__), name)
    return judge


@dataclass(kw_only=True)
class Asking:
    """One candidate on one device, before one judge."""

    candidate: Candidate
    target: str  # what the candidate was found by
    device: torch.device
    judge: Judge

    @staticmethod
    def of(candidate: Candidate, setup: Setup) -> Asking:
        device, judge = torch.device(setup.device), load_judge(setup.judge)
        return Asking(candidate=candidate, target=setup.target, device=device, judge=judge)

    @property
    def may_ask_together(self) -> bool:
        """Whether the judge is the one of which `judge_many` says the same, sooner."""
        return self.judge is plain_judge

    def alone(self, case: Case) -> Verdict:
        """The judge's, asked once more where there was no device memory; then nothing is known of the case."""
        for _ in range(2):
            try:
                verdict, whose = self.judge(case, self.candidate, self.device), "the candidate"
            except torch.OutOfMemoryError as error:
                verdict, whose = self.crash(case, error), "the oracle"
            except Exception as error:
                return self.crash(case, error)
            if not _ran_out_of_memory(verdict):
                return replace(verdict, target=self.target)
            torch.cuda.empty_cache()
        if whose == "the candidate" and not self._device_is_full():
            return replace(verdict, target=self.target)  # it asked for too much, and that is its own fault
        return self._say(Outcome.NOT_JUDGED, case, f"{OUT_OF_MEMORY} ({whose}'s request)")

    def together(
        self, batch: Sequence[tuple[int, Case]], take_off: Callable[[Case, int], None]
    ) -> Iterator[tuple[int, Verdict]]:
        """(place in the batch, verdict) of all, as soon as they are known; take_off(case, position) before each.

        Raises what the judge raises.
        """
        cases = [case for _, case in batch]

        def at(index: int) -> None:
            take_off(cases[index], batch[index][0])

        for index, verdict in judge_many(cases, self.candidate, self.device, at=at):
            if _ran_out_of_memory(verdict):
                torch.cuda.empty_cache()
                yield index, self.alone(verdict.case)
            else:
                yield index, replace(verdict, target=self.target)

    def crash(self, case: Case, error: Exception) -> Verdict:
        """An error that left the judge: the oracle's own, unless the device failed after the candidate had run."""
        lines = "".join(traceback.format_exception(error))
        whose = "the device failed" if "CUDA error" in str(error) else ORACLE_FAILED
        return self._say(Outcome.CRASHED, case, f"{whose}:\n{lines}")

    def device_is_lost(self) -> bool:
        """Whether CUDA no longer works in this process; an illegal access is for good."""
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.device)
            return bool((torch.ones(8, device=self.device) * 2).sum().item() != 16.0)
        except Exception:
            return True

    def _say(self, outcome: Outcome, case: Case, reason: str) -> Verdict:
        return Verdict(outcome=outcome, case=case, candidate=self.candidate.name, target=self.target, reason=reason)

    def _device_is_full(self) -> bool:
        """Whether other processes hold so much of the device that a modest request may fail."""
        if self.device.type != "cuda":
            return False
        free, total = torch.cuda.mem_get_info(self.device)
        return free < total // FULL_SHARE


def _ran_out_of_memory(verdict: Verdict) -> bool:
    """In torch's words, or Triton's, which has no exception of its own for it."""
    words = "OutOfMemoryError", "Triton Error [CUDA]: out of memory"
    return verdict.outcome is Outcome.CRASHED and any(each in verdict.reason for each in words)
