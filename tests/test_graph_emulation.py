"""The emulation freezes what a capture freezes, reads again what a replay reads, and refuses what CUDA refuses."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pageproof.optimized import interpreter
from pageproof.oracle.execution.graphs.emulation import EmulatedBackend
from pageproof.oracle.execution.graphs.errors import CaptureError, NotEmulated, ReplayError
from pageproof.oracle.execution.graphs.interface import capture

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETED, reason="kernels are compiled here, not interpreted")

Body = Callable[..., object]
Define = Callable[[str, str, Body | None], Callable[..., object]]


@triton.jit
def scale(source, out, factor, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(out + place, factor * tl.load(source + place, mask=place < count), mask=place < count)


@pytest.fixture
def backend() -> EmulatedBackend:
    return EmulatedBackend()


@pytest.fixture
def define(request: pytest.FixtureRequest) -> Iterator[Define]:
    """Registers operators for one test."""
    library = torch.library.Library("graph_emulation", "FRAGMENT")

    def register(name: str, schema: str, body: Body | None) -> Callable[..., object]:
        library.define(f"{name}{schema}")
        if body is not None:
            library.impl(name, body, "CompositeExplicitAutograd")
        operator: Callable[..., object] = getattr(torch.ops.graph_emulation, name)
        return operator

    yield register
    library._destroy()


def test_a_replay_reads_memory_again_and_keeps_numbers(backend: EmulatedBackend) -> None:
    source, factor = torch.ones(4), 2.0
    with capture(backend, backend.new_pool()) as graph:
        doubled = source * factor
        kernel_out = torch.empty(4)
        scale[(1,)](source, kernel_out, factor, 4, BLOCK=4)
    assert bool(doubled.isnan().all())
    assert bool(kernel_out.isnan().all())
    factor = 5.0
    for value in (3.0, 4.0):
        source.fill_(value)
        graph.replay()
        assert doubled.tolist() == kernel_out.tolist() == [2.0 * value] * 4
    assert (graph.num_nodes, graph.replays) == (2, 2)


def test_nothing_runs_at_capture(backend: EmulatedBackend) -> None:
    target = torch.zeros(4)
    with capture(backend, backend.new_pool()):
        target.add_(1.0)
        target[1:].fill_(7.0)
        scale[(1,)](target, target, 3.0, 4, BLOCK=4)
    assert target.tolist() == [0.0] * 4


def test_a_grid_that_is_a_function_is_asked_once(backend: EmulatedBackend) -> None:
    asked = []

    def grid(arguments: dict[str, object]) -> tuple[int]:
        asked.append(arguments["count"])
        return (1,)

    source, out = torch.ones(4), torch.zeros(4)
    with capture(backend, backend.new_pool()) as graph:
        scale[grid](source, out, 2.0, 4, BLOCK=4)
    graph.replay()
    graph.replay()
    assert asked == [4]
    assert out.tolist() == [2.0] * 4


@pytest.mark.parametrize("inference", [False, True])
def test_views_written_outputs_and_several_results(backend: EmulatedBackend, inference: bool) -> None:
    x = torch.zeros(3, 4)

    def step() -> list[Tensor]:
        y = (x.t() @ x).reshape(2, 8)
        y[:, 1:3].mul_(2.0)
        largest, places = y.topk(3)
        joined = torch.cat([y, largest], dim=1).to(torch.bfloat16)
        shifted = torch.where(joined > 0, joined, torch.zeros_like(joined))
        torch.add(y, 1.0, out=y)
        return [y, largest, places, joined, *shifted.split(5, dim=1), torch.arange(3) + places[0, 0]]

    with torch.inference_mode(inference), capture(backend, backend.new_pool()) as graph:
        outputs = step()
    for seed in (1, 2):
        x.copy_(torch.linspace(-seed, 2.0, 12).view(3, 4))
        graph.replay()
        assert all(map(torch.equal, outputs, step()))


SYNCS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "int": lambda x: range(int(x[0])),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "repr": lambda x: f"{x!r}",
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked copy": lambda x: x.index_put_((x > 0,), x[:1]),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeats": lambda x: torch.repeat_interleave(x.int()),
    "numbers": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "numbers on the device": lambda x: torch.tensor([1.0], device=x.device),
    "new tensor": lambda x: x.new_tensor([1.0]),
    "index list": lambda x: x[[0, 1]],
    "capture": lambda x: EmulatedBackend().begin(None),
}


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "inside an operator"])
@pytest.mark.parametrize("name", SYNCS)
def test_what_waits_for_the_device_is_refused(
    backend: EmulatedBackend, define: Define, name: str, inside: bool
) -> None:
    def body(x: Tensor) -> None:
        SYNCS[name](x)

    work = define("reads", "(Tensor x) -> ()", body) if inside else body
    with (
        pytest.raises(CaptureError, match="graph_emulation::reads > " if inside and name != "capture" else None),
        capture(backend, backend.new_pool()),
    ):
        work(torch.ones(3))
    assert not backend.is_capturing()


def test_what_needs_no_wait_is_not_refused(backend: EmulatedBackend) -> None:
    x, on_host = torch.arange(4.0), backend.pinned(torch.tensor([3, 1]))
    with capture(backend, backend.new_pool()) as graph:
        filled = x.clone()
        filled[x > 1] = 9.0
        repeated = x.repeat_interleave(torch.ones(4, dtype=torch.int64), output_size=4)
        factor = torch.tensor(float(on_host.max()))  # host memory, read and written by the host
        scaled = x * factor  # a launch takes the number along
    on_host.fill_(0)
    factor.fill_(0.0)
    graph.replay()
    assert filled.tolist() == [0.0, 1.0, 9.0, 9.0]
    assert repeated.tolist() == x.tolist()
    assert scaled.tolist() == [0.0, 3.0, 6.0, 9.0]


def test_operators_are_opened_and_their_scratch_is_no_dangling_memory(backend: EmulatedBackend, define: Define) -> None:
    def body(x: Tensor, out: Tensor) -> None:
        scratch = torch.empty_like(x)
        scale[(1,)](x, scratch, 3.0, 4, BLOCK=4)
        out.copy_(scratch + 1.0)

    inner = define("inner", "(Tensor x, Tensor(a!) out) -> ()", body)

    def outer_body(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        inner(x, out)
        return out * 2.0

    outer = define("outer", "(Tensor x) -> Tensor", outer_body)
    x = torch.zeros(4)
    with capture(backend, backend.new_pool()) as graph:
        result = outer(x)
    gc.collect()
    x.fill_(2.0)
    graph.replay()
    assert isinstance(result, Tensor)
    assert result.tolist() == [14.0] * 4
    assert graph.num_nodes == 4


def test_an_operator_that_cannot_be_opened_is_declined(backend: EmulatedBackend, define: Define) -> None:
    closed = define("closed", "(Tensor x) -> Tensor", None)
    with pytest.raises(NotEmulated, match="graph_emulation::closed"), capture(backend, backend.new_pool()):
        closed(torch.ones(1))


@pytest.mark.parametrize(
    "work", [lambda x: x.resize_(100), lambda x: x.to_sparse(), lambda x: EmulatedBackend().fork()]
)
def test_what_is_not_emulated_is_declined(backend: EmulatedBackend, work: Callable[[Tensor], object]) -> None:
    with pytest.raises(NotEmulated), capture(backend, backend.new_pool()):
        work(torch.ones(3))


def test_a_capture_can_end_in_the_middle_of_a_step_and_another_one_begin(backend: EmulatedBackend) -> None:
    """What a breakable runner does: two segments of one pool around work that runs eagerly each time."""
    pool, x, seen = backend.new_pool(), torch.zeros(4), []
    head = backend.begin(pool)
    doubled = x * 2.0
    head.end()
    broken = torch.empty_like(doubled)  # eager: outside of the pool, and written by hand
    tail = backend.begin(pool)
    result = broken + 1.0
    tail.end()
    for value in (1.0, 2.0):
        x.fill_(value)
        head.replay()
        seen.append(doubled.tolist()[0])
        broken.copy_(doubled * 10.0)
        tail.replay()
        assert result.tolist() == [20.0 * value + 1.0] * 4
    assert seen == [2.0, 4.0]


def test_a_capture_belongs_to_its_thread(backend: EmulatedBackend) -> None:
    computed: list[list[float]] = []
    with capture(backend, backend.new_pool()) as graph:
        thread = threading.Thread(target=lambda: computed.append((torch.ones(2) + 1.0).tolist()))
        thread.start()
        thread.join()
    assert computed == [[2.0, 2.0]]
    assert graph.num_nodes == 0


def test_only_a_finished_graph_is_replayed(backend: EmulatedBackend) -> None:
    x = torch.ones(2)
    with capture(backend, backend.new_pool()) as graph:
        x.add_(1.0)
        with pytest.raises(ReplayError):
            graph.replay()
    with pytest.raises(ReplayError), capture(backend, backend.new_pool()):
        graph.replay()
    graph.replay()
    graph.release()
    graph.release()
    with pytest.raises(ReplayError):
        graph.replay()
    assert x.tolist() == [2.0, 2.0]


def test_a_failing_replay_names_the_operation(backend: EmulatedBackend) -> None:
    values, place = torch.ones(3), torch.tensor([1])
    with capture(backend, backend.new_pool()) as graph:
        values.add_(1.0)
        values[place]
    place.fill_(99)
    with pytest.raises(ReplayError, match=r"operation 1 of 2, aten::index\.Tensor"):
        graph.replay()
    place.fill_(2)
    graph.replay()
    assert graph.replays == 1
