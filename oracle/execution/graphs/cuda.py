"""Captures as CUDA graphs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import collection
from .errors import CaptureError, ReplayError
from .interface import Result


class CudaPool:
    """Memory that captures share.

    Torch never opens a pool again that its last graph has left, as one does whose capture failed: "use_count > 0
    INTERNAL ASSERT FAILED". So an empty graph stays in it as long as anybody has the pool.
    """

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self._claim: torch.cuda.CUDAGraph | None = None
        self._left: list[torch.cuda.CUDAGraph | None] = []

    def claim(self) -> None:
        """Called where a capture can begin, on its stream."""
        if self._claim is None:
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            graph.capture_begin(pool=self.handle, capture_error_mode="thread_local")
            _capture_end(graph)
            self._claim = graph

    def renew(self) -> None:
        """Other memory from now on: torch's allocators, of the host too, do not get over a refused capture."""
        self.handle = torch.cuda.graph_pool_handle()
        self._left.append(self._claim)  # a pool in that state is better not given up either
        self._claim = None


class CudaGraph:
    """A capture on a stream of the backend's own, and the CUDA graph that comes out of it."""

    def __init__(self, backend: CudaBackend, pool: CudaPool) -> None:
        self.replays = 0
        self.branches: list[CudaBranch] = []
        self._backend = backend
        self._pool = pool
        self._num_nodes: int | None = None
        self._generator = torch.cuda.default_generators[backend.device.index]
        self._random_state = self._generator.clone_state()
        self._scope = contextlib.ExitStack()
        # The graph itself is kept beside its executable form: its nodes are counted.
        self._graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph(keep_graph=True)
        self._scope.enter_context(collection.paused())
        self._scope.enter_context(torch.cuda.device(backend.device))
        self._scope.enter_context(torch.cuda.stream(backend.stream))
        try:
            # Only this thread's calls can break its capture: other threads go on allocating and copying.
            pool.claim()
            self._graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
        except BaseException:
            self._scope.close()
            raise
        backend.active = self

    @property
    def num_nodes(self) -> int:
        if self._num_nodes is None:
            raise CaptureError("num_nodes: the capture has not ended")
        return self._num_nodes

    def end(self) -> None:
        if self.branches:
            found = len(self.branches)
            self.abandon()
            raise CaptureError(f"the capture ends with {found} of its branches not joined")
        graph = self._require_open()
        try:
            _capture_end(graph)
        except BaseException:
            self._recover(graph)
            raise
        finally:
            self._leave()
        self._num_nodes = _count_nodes(graph.raw_cuda_graph())
        graph.instantiate()

    def abandon(self) -> None:
        graph = self._require_open()
        try:
            with contextlib.suppress(RuntimeError):
                self._backend.join_branches()  # a branch left open would invalidate a capture that is still good
            try:
                _capture_end(graph)
            except RuntimeError:
                self._recover(graph)
            else:
                graph.reset()
        finally:
            self._graph = None
            self._leave()

    def replay(self) -> None:
        if self._graph is None or self._num_nodes is None:
            raise ReplayError("replay: the graph was released, or its capture never ended")
        if self._backend.is_capturing():
            raise ReplayError("replay: a graph is replayed inside of a capture")
        self._graph.replay()
        self.replays += 1

    def release(self) -> None:
        if self._graph is not None and self._num_nodes is not None:
            self._graph.reset()
            self._graph = None

    def _require_open(self) -> torch.cuda.CUDAGraph:
        if self._graph is None or self._backend.active is not self:
            raise CaptureError("this capture is not under way in this thread")
        return self._graph

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Put back what torch leaves behind when CUDA refuses a capture at its end.

        Its allocator goes on counting the pool as captured into (newer versions stop by themselves, and refuse to be
        told), and its random generator takes itself to be in a capture for ever. What stays is the graph's claim to
        the pool: memory allocated by the refused capture is not given back to the device.
        """
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._backend.device.index, self._pool.handle)
        self._pool.renew()
        self._generator.graphsafe_set_state(self._random_state)
        self._graph = None
        with contextlib.suppress(RuntimeError):
            graph.reset()

    def _leave(self) -> None:
        self._backend.active = None
        self.branches.clear()
        self._scope.close()


class CudaBranch:
    """A side stream that starts after, and is joined to, the stream that was current."""

    def __init__(self, backend: CudaBackend) -> None:
        self._backend = backend
        self._stream = torch.cuda.Stream(backend.device)
        self._scope = contextlib.ExitStack()
        self._forked = False
        self._fork()

    def __enter__(self) -> CudaBranch:
        if not self._forked:  # joined by somebody else since, as where a segment ended
            self._fork()
        self._scope.enter_context(torch.cuda.stream(self._stream))
        return self

    def __exit__(self, *exception: object) -> None:
        self._scope.close()

    def join(self) -> None:
        if not self._forked:  # a wait for work of an earlier segment would invalidate the capture of this one
            return
        self._forked = False
        torch.cuda.current_stream(self._backend.device).wait_stream(self._stream)
        graph = self._backend.active
        if graph is not None and self in graph.branches:
            graph.branches.remove(self)

    def _fork(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._backend.device))
        self._forked = True
        if self._backend.active is not None:
            self._backend.active.branches.append(self)


class CudaBackend:
    """CUDA graphs on one device; one capture at a time in each thread."""

    name = "cuda"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        torch.cuda.init()
        index = torch.device(device).index
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self._local = threading.local()

    @property
    def stream(self) -> torch.cuda.Stream:
        """The stream of this thread's captures and warm-ups: never the default one, which cannot be captured."""
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)
        stream: torch.cuda.Stream = self._local.stream
        return stream

    @property
    def active(self) -> CudaGraph | None:
        """This thread's capture under way."""
        return getattr(self._local, "active", None)

    @active.setter
    def active(self, graph: CudaGraph | None) -> None:
        self._local.active = graph

    def new_pool(self) -> CudaPool:
        return CudaPool()

    def pool_bytes(self, pool: Any) -> int:
        segments = torch.cuda.memory_snapshot()
        mine = (part for part in segments if part["device"] == self.device.index)
        return sum(part["total_size"] for part in mine if tuple(part["segment_pool_id"]) == pool.handle)

    def begin(self, pool: Any) -> CudaGraph:
        if self.is_capturing():
            raise CaptureError("a capture begins inside of another one")
        return CudaGraph(self, pool)

    def is_capturing(self) -> bool:
        # An operation that CUDA refuses ends what torch calls capturing; ours lasts until it is ended or abandoned.
        return self.active is not None or torch.cuda.is_current_stream_capturing()

    def warm_up(self, step: Callable[[], Result]) -> Result:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = step()
        current.wait_stream(self.stream)
        return result

    def fork(self) -> CudaBranch:
        return CudaBranch(self)

    def join_branches(self) -> None:
        if self.active is None:
            return
        if torch.cuda.current_stream(self.device) != self.stream:
            raise CaptureError("found the end of a segment inside of a branch, expected it on the capture's own stream")
        for branch in list(self.active.branches):
            branch.join()

    def pinned(self, values: Tensor) -> Tensor:
        return values.cpu().pin_memory()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


def _capture_end(graph: torch.cuda.CUDAGraph) -> None:
    with warnings.catch_warnings():
        # Nothing between two breaks is as good a segment as any; num_nodes says so.
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        graph.capture_end()


@functools.cache
def _driver() -> ctypes.CDLL:
    """The CUDA driver's library, which every process with a CUDA device has loaded."""
    return ctypes.CDLL("libcuda.so.1")


def _count_nodes(raw_graph: int) -> int:
    """Nodes of a cudaGraph_t, which is the driver's CUgraph."""
    count = ctypes.c_size_t()
    status = _driver().cuGraphGetNodes(ctypes.c_void_p(raw_graph), None, ctypes.byref(count))
    if status:
        raise RuntimeError(f"cuGraphGetNodes: found error {status}, expected 0")
    return int(count.value)
