"""A decoder's step around a candidate's operators, in every execution mode: docs/step.md."""

from __future__ import annotations

from .buffers import Bucket, Buffers, Request, random_caches
from .runners import RUNNERS
from .shapes import SHAPES, ModelShape, shape_of
from .step import ModelStep
from .weights import Weights, random_weights

__all__ = [
    "RUNNERS",
    "SHAPES",
    "Bucket",
    "Buffers",
    "ModelShape",
    "ModelStep",
    "Request",
    "Weights",
    "random_caches",
    "random_weights",
    "shape_of",
]
