"""Stands for the namespace `pageproof` in a plain checkout, whose packages lie at the top of the repository."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2])]
