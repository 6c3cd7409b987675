"""Campaigns: all pairs of features first, then random cases grouped by compile key, over worker processes.

summary = campaign.run(campaign.Options(target="ours", seconds=60))
"""

from .runner import run
from .summary import Options, Summary

__all__ = ["Options", "Summary", "run"]
