"""Where a campaign runs: which device, which versions."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

DEVICES = ("cpu", "cuda")

CU_CTX_SCHED_BLOCKING_SYNC = 0x04  # of the CUDA driver's CUctx_flags

_SHOWN = ("torch", "triton", "numpy")
_VARIABLES = ("TRITON_INTERPRET", "TRITON_DISABLE_LINE_INFO")


class Unusable(Exception):
    """What was asked for cannot be used here; the message says what is wrong with it."""


class NoDevice(Unusable):
    """There is no GPU to use. Whoever asked for one knows by which option the CPU is asked for, and says so."""


def choose_device(asked: str | None) -> str:
    """ "cpu" or "cuda": what was asked for, or a GPU if torch sees one, or the CPU if the machine has none.

    A GPU that torch does not see is an error (NoDevice) unless the CPU was asked for: a campaign that quietly went
    to the CPU would report on the wrong machine. Does not initialise CUDA in this process.
    """
    if asked == "cpu":
        return "cpu"
    if visible_gpus():
        return "cuda"
    devices = nvidia_devices()
    if devices:
        raise NoDevice(
            f"this machine has an NVIDIA device ({devices[0]}) and torch {torch.__version__} sees none: {_remedy()}"
        )
    if asked == "cuda":
        raise NoDevice("there is no NVIDIA device on this machine")
    return "cpu"


def visible_gpus() -> int:
    """How many GPUs torch sees, asked without initialising CUDA where the driver's library can be asked."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def usable_cores() -> int:
    """Of the host, those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sleep_while_waiting(device: torch.device) -> None:
    """Have this process sleep while it waits for a GPU, not ask it again and again: others have use for the core.

    To be called before CUDA is initialised on the device, or after. Where the driver's library does not offer it,
    nothing changes.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return
    index = device.index or 0
    with contextlib.suppress(OSError, AttributeError):  # there is no such library, or an older one
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuInit(0)
        driver.cuDevicePrimaryCtxSetFlags_v2(index, CU_CTX_SCHED_BLOCKING_SYNC)


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory


def nvidia_devices() -> list[str]:
    """Signs of NVIDIA hardware that need no library to be read."""
    nodes = sorted(Path("/dev").glob("nvidia[0-9]*"))
    return [str(path) for path in nodes or sorted(Path("/proc/driver/nvidia/gpus").glob("*"))]


def _remedy() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of it (pip's default on Linux is one)"
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return f"look at CUDA_VISIBLE_DEVICES, which is {os.environ['CUDA_VISIBLE_DEVICES']!r} here"
    return f"it is built for CUDA {torch.version.cuda}; look whether the driver is that new and nvidia-smi works"


@contextlib.contextmanager
def variables_for(device: str) -> Iterator[None]:
    """The environment in which worker processes start, and the one before it again."""
    held = {name: os.environ.get(name) for name in _VARIABLES}
    set_variables(device)
    try:
        yield
    finally:
        for name, value in held.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def set_variables(device: str) -> None:
    """For good, in this process: before anything imports Triton.

    On a CPU its kernels are interpreted. On a GPU they are compiled without the lines they come from, which changes
    no instruction and saves time; who debugs one sets TRITON_DISABLE_LINE_INFO to 0.
    """
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")


def versions() -> dict[str, str]:
    """Of Python, this package and what it computes with; "absent" for what is not installed."""
    return {"python": platform.python_version(), "pageproof": _version("pageproof", "checkout")} | {
        name: _version(name, "absent") for name in _SHOWN
    }


def _version(name: str, otherwise: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return otherwise


def describe_device(device: torch.device) -> str:
    """One line; on a GPU this initialises CUDA."""
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {os.cpu_count()} cores), Triton interpreted"
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    capability = f"sm_{properties.major}{properties.minor}"
    return f"{device}: {properties.name}, {capability}, {properties.multi_processor_count} SMs, {memory:.0f} GiB"
