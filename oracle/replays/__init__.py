"""Cases in a mode other than eager: a step captured or compiled once, and run again on one batch after the other."""

from __future__ import annotations

from .judging import Judgement, Replayed, run_replays

__all__ = ["Judgement", "Replayed", "run_replays"]
