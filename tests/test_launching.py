"""A remembered launch is the one that Triton would make: same binary, same arguments, or Triton is asked again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pageproof.optimized import launching
from pageproof.optimized.launching import describe, launch


class Group(NamedTuple):
    tensor: Tensor | None
    stride: int
    scale: float


class Kernel:
    """What a JIT function of Triton's and its binaries look like from outside; writes down what they are asked."""

    arg_names = ("group", "other", "count", "SIZE", "TILE")

    def __init__(self) -> None:
        self.fn = object()
        self.pre_run_hooks: list[Any] = []
        self.compiles = 0
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def first(*arguments: Any, **constants: Any) -> Any:
            self.compiles += 1
            number = self.compiles

            def run(*launched: Any) -> None:
                self.launches.append((number, *launched))

            return SimpleNamespace(run=run, function="binary", packed_metadata="packed")

        return first


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    device = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: "stream")
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=device))
    monkeypatch.setattr(launching, "IS_REMEMBERED", True)
    monkeypatch.setattr(launching, "_launches", {})
    return Kernel()


MEMORY = torch.zeros(256)
CONSTANTS = {"TILE": 32, "num_warps": 4, "SIZE": 16}


def arguments(**changes: Any) -> dict[str, Any]:
    group = {"tensor": MEMORY[:64], "stride": 64, "scale": 0.5}
    rest = {"other": MEMORY[64:], "count": 3, "constants": CONSTANTS}
    group.update({name: value for name, value in changes.items() if name in group})
    rest.update({name: value for name, value in changes.items() if name in rest})
    numbers, constants = (rest["count"],), rest["constants"]
    return {"groups": (Group(**group), rest["other"]), "numbers": numbers, "constants": constants}


SAME = {
    "other memory": {"tensor": MEMORY[128:192], "other": MEMORY[4:]},
    "another count": {"count": 16},
    "another scale": {"scale": 0.25},
    "a parameter": {"tensor": torch.nn.Parameter(MEMORY[:64])},
}
OTHER = {
    "unaligned in a group": {"tensor": MEMORY[1:65]},
    "unaligned": {"other": MEMORY[65:]},
    "another dtype": {"tensor": torch.zeros(64, dtype=torch.int32)},
    "another stride": {"stride": 1},
    "no tensor": {"tensor": None},
    "a count beyond int32": {"count": 2**31},
    "no count": {"count": None},
    "other constants": {"constants": {"TILE": 64, "num_warps": 4, "SIZE": 16}},
}


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_what_triton_does_not_specialise_is_launched_again(changes: dict[str, Any], kernel: Kernel) -> None:
    launch(kernel, 5, **arguments())
    again = arguments(**changes)
    launch(kernel, 7, **again)
    assert kernel.compiles == 1
    (launched,) = kernel.launches
    assert launched[:10] == (1, 7, 1, 1, "stream", "binary", "packed", None, None, None)
    found, wanted = launched[10:], (*again["groups"], *again["numbers"], 16, 32)
    assert len(found) == len(wanted)
    assert all(one is other or one == other for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("changes", OTHER.values(), ids=OTHER)
def test_what_triton_specialises_is_asked_again(changes: dict[str, Any], kernel: Kernel) -> None:
    for _ in range(2):
        launch(kernel, 5, **arguments())
    for _ in range(2):
        launch(kernel, 5, **arguments(**changes))
    assert kernel.compiles == 2
    assert [number for number, *_ in kernel.launches] == [1, 2]


def test_kernels_that_share_a_description_keep_their_own_binaries(kernel: Kernel) -> None:
    other = Kernel()
    step, other_constants = arguments(), {"SIZE": 16}
    described = describe(step["groups"], (*step["numbers"], 7))
    for _ in range(2):
        launch(kernel, 5, **step, description=described)
        launch(other, 5, step["groups"][:1], (7,), other_constants, described)
    assert (kernel.compiles, other.compiles) == (1, 1)
    assert kernel.launches[0][-3:] == (3, 16, 32)
    assert other.launches[0][-2:] == (7, 16)


def test_another_device_is_another_binary(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(kernel, 5, **arguments())
    monkeypatch.setattr(launching.driver.active, "get_current_device", lambda: 1)
    launch(kernel, 5, **arguments())
    assert kernel.compiles == 2


HOOKS = ("launch_enter_hook", "launch_exit_hook")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("of_a_chain", [False, True], ids=["alone", "in a chain"])
def test_a_profilers_hooks_are_left_to_triton(
    hook: str, of_a_chain: bool, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(kernel, 5, **arguments())
    monkeypatch.setattr(launching.knobs.runtime, hook, SimpleNamespace(calls=[print]) if of_a_chain else print)
    launch(kernel, 5, **arguments())
    assert kernel.compiles == 2
    assert not kernel.launches


def test_a_kernels_own_hooks_are_left_to_triton(kernel: Kernel) -> None:
    launch(kernel, 5, **arguments())
    kernel.pre_run_hooks.append(print)
    launch(kernel, 5, **arguments())
    assert kernel.compiles == 2
    assert not kernel.launches


def test_without_hooks_nothing_is_left_to_triton(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    for hook in HOOKS:
        monkeypatch.setattr(launching.knobs.runtime, hook, None)
    for _ in range(2):
        launch(kernel, 5, **arguments())
    assert (kernel.compiles, len(kernel.launches)) == (1, 1)


@pytest.mark.parametrize("is_known", [False, True])
def test_what_was_compiled_for_a_profiler_is_not_launched_without_it(
    is_known: bool, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may want memory that only the profiler gives it."""
    if is_known:
        launch(kernel, 5, **arguments())
    with monkeypatch.context() as profiled:
        profiled.setattr(launching.knobs.runtime, HOOKS[0], SimpleNamespace(calls=[print]))
        launch(kernel, 5, **arguments())
    instrumented = kernel.compiles
    for _ in range(2):
        launch(kernel, 5, **arguments())
    assert kernel.launches
    assert all(number != instrumented for number, *_ in kernel.launches)


@pytest.mark.parametrize(
    ("version", "is_known"), [("3.5", False), ("3.6", True), ("3.7", True), ("3.8", False), ("3.9", False)]
)
def test_only_versions_that_are_launched_so_are_asked(
    version: str, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr("torch.version.hip", None)
    assert launching.is_remembered(version) is is_known


def test_what_is_remembered_stays_small(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MOST_LAUNCHES", 4)
    for stride in range(20):
        launch(kernel, 5, **arguments(stride=stride))
        assert len(launching._launches) <= 4
