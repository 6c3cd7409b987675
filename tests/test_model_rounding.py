"""The tolerance of a whole step: right runs stay inside of it, and wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pageproof.oracle.adapters.ours import Ours
from pageproof.oracle.adapters.reference import Reference
from pageproof.oracle.execution.graphs.interface import Backend
from pageproof.oracle.models import SHAPES, Bucket, ModelShape, Request, Weights
from pageproof.oracle.models.rounding import error_variance, tolerance

from .graph_backends import KERNEL_BACKENDS
from .model_steps import BUCKET, LONGEST, load, step_of, weights_of

MODELS = sorted(SHAPES)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REQUESTS: list[Request] = [(1, 70), (5, 20), (2, 2)]
EXACT = Bucket(num_tokens=8, num_requests=3, seq_len=LONGEST)  # without a row of padding


@torch.no_grad()
def hidden_of(
    shape: ModelShape, weights: Weights, *, candidate: Any, bucket: Bucket = BUCKET, dtype: torch.dtype | None = None
) -> Tensor:
    """The last hidden states of the requests' rows in float64; `dtype`: the step runs in it on the same values."""
    step = step_of(shape, weights, bucket, candidate)
    if dtype is not None:
        caches = [{name: cache.to(dtype) for name, cache in layer.items()} for layer in step.caches]
        step = replace(step, weights=_cast(weights, dtype), caches=caches)
    load(step, REQUESTS, seed=3)
    return step()[1]["hidden"][: EXACT.num_tokens].double()


def _cast(weights: Weights, dtype: torch.dtype) -> Weights:
    layers = [{name: tensor.to(dtype) for name, tensor in layer.items()} for layer in weights.layers]
    embedding, norm = weights.embedding.to(dtype), weights.final_norm.to(dtype)
    return replace(weights, embedding=embedding, layers=layers, final_norm=norm)


@pytest.mark.parametrize("make_backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_rounding_errors_have_the_size_that_is_derived(
    model: str, dtype: torch.dtype, make_backend: Callable[[], Backend]
) -> None:
    """Of one run, against the same step in float64."""
    shape, device = SHAPES[model].tiny(), make_backend().device
    weights = weights_of(shape, dtype, device)
    error = hidden_of(shape, weights, candidate=Ours())
    error -= hidden_of(shape, weights, candidate=Reference(), dtype=torch.float64)
    assert error.abs().max() <= tolerance(shape, dtype) / 2**0.5
    # Roundings are smaller than their unit by half on average, and no more: the derived size is not padded.
    assert 0.2 <= float(error.square().mean() / error_variance(shape, dtype)) ** 0.5 <= 1


@pytest.mark.parametrize("make_backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_other_numbers_of_rows_and_the_reference_stay_within(
    model: str, dtype: torch.dtype, make_backend: Callable[[], Backend]
) -> None:
    shape, device = SHAPES[model].tiny(), make_backend().device
    weights = weights_of(shape, dtype, device)
    padded = hidden_of(shape, weights, candidate=Ours())
    for other in (
        hidden_of(shape, weights, candidate=Ours(), bucket=EXACT),
        hidden_of(shape, weights, candidate=Ours(), bucket=Bucket(num_tokens=128, num_requests=8, seq_len=LONGEST)),
        hidden_of(shape, weights, candidate=Reference()),
    ):
        assert (other - padded).abs().max() <= tolerance(shape, dtype)


class Planted(Ours):
    """Our kernels with a wrong call around them."""

    def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation.startswith("update"):
            return None if self.name == "no update" else super().call(operation, arguments)
        rules = arguments["rules"]
        if self.name == "scale":
            rules = replace(rules, softmax_scale=rules.softmax_scale * 1.05)
        if self.name == "window":
            rules = replace(rules, sliding_window=64)
        return super().call(operation, {**arguments, "rules": rules})


@pytest.mark.parametrize("make_backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("fault", ["no update", "scale", "window"])
@pytest.mark.parametrize("model", MODELS)
def test_wrong_steps_do_not(model: str, fault: str, make_backend: Callable[[], Backend]) -> None:
    shape, device = SHAPES[model].tiny(), make_backend().device
    weights = weights_of(shape, torch.float16, device)
    right = hidden_of(shape, weights, candidate=Ours())
    wrong = hidden_of(shape, weights, candidate=Planted(name=fault))
    assert (wrong - right).abs().max() > tolerance(shape, torch.float16)
