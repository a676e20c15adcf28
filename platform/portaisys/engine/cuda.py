"""The few CUDA calls that running a plan takes, through torch: memory on both sides, streams, graphs.

TensorRT brings neither memory nor streams of its own. Everything the runtime asks of CUDA is here, so that its own logic can be
tested on a machine without a GPU against a stand-in of these calls. Knows nothing of engines.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from typing import Any

from portaisys.engine import CannotExecute


@functools.cache
def driver() -> tuple[str, str] | None:
    """("sm_90", "13.0") of GPU 0, asked of the driver itself: neither building nor naming an engine needs torch. None without one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    major, minor, api = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    # 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
    if cuda.cuInit(0) or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, 0) or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, 0):
        return None
    cuda.cuDriverGetVersion(ctypes.byref(api))
    return f"sm_{major.value}{minor.value}", f"{api.value // 1000}.{api.value % 1000 // 10}"


class Cuda:
    """CUDA on GPU 0. Memory is flat bytes: whoever uses it knows its types."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def stream(self) -> Any:
        """A new stream, never the default one, on which nothing overlaps."""
        return self._torch.cuda.Stream()

    def on(self, stream: Any) -> Any:
        """A context in which copies go to `stream`."""
        return self._torch.cuda.stream(stream)

    def pinned(self, size_bytes: int) -> Any:
        """Page-locked memory of the host, which the card reads without a stop on the way; zeros, since the first runs are on them."""
        return self._torch.zeros(size_bytes, dtype=self._torch.uint8, pin_memory=True)

    def card(self, size_bytes: int) -> Any:
        """Memory of the card, aligned to 512 bytes (TensorRT wants 256)."""
        return self._torch.empty(size_bytes, dtype=self._torch.uint8, device="cuda")

    def copy(self, to: Any, source: Any) -> None:
        """Copy on the current stream, without waiting for it."""
        to.copy_(source, non_blocking=True)

    def wait(self, stream: Any) -> None:
        """Until all is done that the stream was given; lets other threads run meanwhile. Raises RuntimeError when some of it failed."""
        stream.synchronize()

    def capture(self, stream: Any, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` puts on `stream`, as one graph; returns its launch. Raises RuntimeError when something in it cannot be captured."""
        graph = self._torch.cuda.CUDAGraph()
        # Of other threads nothing is asked: they may allocate while this one captures.
        with self._torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay


def open_cuda() -> Cuda:
    """Raises CannotExecute without torch, or when its build finds no device."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise CannotExecute("built but not run: TensorRT's buffers are torch tensors; pip install 'portaisys[train]'") from None
    if not torch.cuda.is_available():
        raise CannotExecute(f"built but not run: torch {torch.__version__} finds no CUDA device; install a torch build for this driver")
    return Cuda(torch)
