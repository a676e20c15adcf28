"""TensorRT 10, 11 and RTX, one code path: build a strongly typed plan from ONNX, run it where there is a GPU.

Precision is the type of the tensors in the ONNX file and nothing else (TensorRT 11 has no other way). RTX builds
without a GPU, so a graph can be proven acceptable anywhere; running needs a driver and torch for its buffers. Whoever
calls the runtime holds one slot (context, stream, buffers): TensorRT's contexts are not thread-safe (TensorRT #1300).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys.artifact import write_bytes
from portaisys.engine import Arrays, CannotExecute, Options, Tensor, check_feeds
from portaisys.engine.onnx_file import face_of, read_for, read_onnx
from portaisys.spec import UserError

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")

# What RTX builds for where there is no GPU to ask: Ada, which all of RTX's releases support.
DEFAULT_TARGET = "SM89"


def version() -> str:
    """Flavour and version, and the driver's CUDA version where there is one. Raises UserError naming the extra."""
    trt = _trt()
    driver = _driver()
    return f"{trt.__name__} {trt.__version__}" + (f", CUDA driver {driver[1]}" if driver else "")


def device() -> str:
    """Compute capability of the first GPU, "sm_90"; "none" without one."""
    driver = _driver()
    return driver[0] if driver else "none"


def _trt() -> Any:
    """The installed flavour. Where both are, the full one: RTX runs on fewer GPUs."""
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UserError("engine.backend: TensorRT is not installed; pip install 'portaisys[tensorrt-rtx]' (or 'portaisys[tensorrt]' for data-centre GPUs)")


@functools.cache
def _driver() -> tuple[str, str] | None:
    """("sm_90", "13.0") of GPU 0, asked of the driver itself: neither building nor naming an engine needs torch."""
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


@functools.cache
def _logger() -> Any:
    """One logger a process, as TensorRT wants it. It keeps errors, which come in no other way, and drops the rest."""
    trt = _trt()

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


# --- build --------------------------------------------------------------------------------------------------------


def build(onnx: Path, options: Options, out: Path) -> list[str]:
    """Write a serialized plan. Returns notes. Raises UserError with TensorRT's own messages when it refuses the graph."""
    trt, logger = _trt(), _logger()
    read_for(onnx, "fp32" if options.precision == "tf32" else options.precision)
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt.OnnxParser(network, logger), onnx)
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, options, onnx))
    _configure(trt, config, options)
    notes = _target(trt, config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{onnx}: {trt.__name__} cannot build it: {_errors(logger)}")
    write_bytes(out, bytes(plan))
    return notes


def _parse(parser: Any, onnx: Path) -> None:
    # By path: a file that names others finds them, and nothing is limited to protobuf's 2 GB.
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = "; ".join(f"{error.node_operator() or 'graph'} {error.node_name()}: {error.desc()}" for error in errors)
        raise UserError(f"{onnx}: TensorRT's parser refuses it: {reasons or 'no reason given'}")


def _profile(builder: Any, network: Any, options: Options, onnx: Path) -> Any:
    """One wide profile: batch 1 to max, tuned for opt, and the sizes of other free dimensions. More are worth it only where measured."""
    profile = builder.create_optimization_profile()
    named = face_of(read_onnx(onnx, external=False)).dims
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = [_range(tensor.name, axis, size, options, onnx) for axis, size in enumerate(named[tensor.name])]
        profile.set_shape(tensor.name, *(tuple(size[end] for size in sizes) for end in range(3)))
    return profile


def _range(name: str, axis: int, size: int | str, options: Options, onnx: Path) -> tuple[int, int, int]:
    """(least, usual, largest) of one dimension. Raises UserError when nothing says what a free one may be."""
    if axis == 0 and isinstance(size, int) and not options.opt_batch == options.max_batch == size:
        raise UserError(
            f"{onnx}: input {name} has its batch fixed at {size}; build it for that batch (opt_batch and max_batch {size}), or export it with a free one"
        )
    if isinstance(size, int):
        return size, size, size
    if axis == 0:
        return 1, options.opt_batch, options.max_batch
    found = next(((least, usual, most) for dim, least, usual, most in options.dims if dim == size), None)
    if found is None:
        raise UserError(f"{onnx}: input {name} has the free dimension {size!r}; give its least, usual and largest size (--dim {size}=LEAST:USUAL:MOST)")
    return found


def _configure(trt: Any, config: Any, options: Options) -> None:
    # TensorRT computes fp32 in tf32 unless it is told not to: here fp32 means fp32.
    (config.set_flag if options.precision == "tf32" else config.clear_flag)(trt.BuilderFlag.TF32)
    if options.sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    config.builder_optimization_level = options.optimization_level


def _target(trt: Any, config: Any) -> list[str]:
    """With a GPU, TensorRT builds for it. RTX without one must be told; the full TensorRT cannot build then."""
    if _driver() is not None:
        return []
    if not hasattr(trt, "ComputeCapability"):
        raise UserError("engine.backend: TensorRT builds only where there is a GPU; here install 'portaisys[tensorrt-rtx]', which builds without one")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, DEFAULT_TARGET), 0)
    return [f"no GPU here: built for {DEFAULT_TARGET}, as proof that {trt.__name__} takes this graph"]


def _errors(logger: Any) -> str:
    return "; ".join(logger.errors) or "no reason given"


# --- run ----------------------------------------------------------------------------------------------------------


def load(built: Path, options: Options) -> GpuEngine:
    """Open a plan on GPU 0. Raises CannotExecute without a driver, without torch's CUDA, or when TensorRT refuses the plan."""
    trt, logger = _trt(), _logger()
    if _driver() is None:
        raise CannotExecute("built but not run: this machine has no NVIDIA driver with a GPU (libcuda.so.1)")
    torch = _torch()
    logger.errors.clear()
    runtime = trt.Runtime(logger)
    plan = runtime.deserialize_cuda_engine(built.read_bytes())
    if plan is None:
        raise CannotExecute(f"built but not run: {trt.__name__} {trt.__version__} cannot load the plan on {device()}: {_errors(logger)}")
    return GpuEngine(trt, torch, runtime, plan, options)


def _torch() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise CannotExecute("built but not run: TensorRT's buffers are torch tensors; pip install 'portaisys[train]'") from None
    if not torch.cuda.is_available():
        raise CannotExecute(f"built but not run: torch {torch.__version__} finds no CUDA device; install a torch build for this driver")
    return torch


class GpuEngine:
    """One execution context with its own stream and its buffers at the largest batch, pinned on the host's side."""

    backend = "tensorrt"

    def __init__(self, trt: Any, torch: Any, runtime: Any, plan: Any, options: Options) -> None:
        self.precision, self.device, self._max_batch = options.precision, device(), options.max_batch
        tensors = {mode: tuple(_tensor(trt, plan, name) for name in _names(plan) if plan.get_tensor_mode(name) == mode) for mode in _modes(trt)}
        self.inputs, self.outputs = (tensors[mode] for mode in _modes(trt))
        self._torch, self._runtime, self._plan = torch, runtime, plan  # the plan must not outlive its runtime
        self._stream = torch.cuda.Stream()
        self._context = plan.create_execution_context()
        if self._context is None:
            raise CannotExecute(f"built but not run: no execution context (GPU memory?): {_errors(_logger())}")
        self._buffers = {tensor.name: self._buffer(tensor) for tensor in (*self.inputs, *self.outputs)}

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs for a batch of inputs. Raises UserError for wrong feeds or more rows than the profile, RuntimeError when TensorRT fails."""
        rows = check_feeds(self.inputs, feeds)
        if rows > self._max_batch:
            raise UserError(f"inputs: {rows} rows, but this engine was built for at most {self._max_batch} (export.max_batch)")
        with self._torch.cuda.stream(self._stream):
            for tensor in self.inputs:
                self._send(tensor, feeds[tensor.name], rows)
            self._check(self._context.execute_async_v3(self._stream.cuda_stream), "execute")
            for tensor in self.outputs:
                host, card = self._buffers[tensor.name]
                host[:rows].copy_(card[:rows], non_blocking=True)
        self._stream.synchronize()
        return {tensor.name: self._buffers[tensor.name][0][:rows].numpy().copy() for tensor in self.outputs}

    def close(self) -> None:
        """Free the GPU's memory."""
        self._stream.synchronize()
        self._buffers.clear()
        self._context = self._plan = self._runtime = None

    def _send(self, tensor: Tensor, array: NDArray[Any], rows: int) -> None:
        host, card = self._buffers[tensor.name]
        host[:rows].numpy()[...] = array
        card[:rows].copy_(host[:rows], non_blocking=True)
        self._check(self._context.set_input_shape(tensor.name, array.shape), f"set the shape of {tensor.name}")

    def _buffer(self, tensor: Tensor) -> tuple[Any, Any]:
        """Pinned host memory and GPU memory for the largest batch, the latter bound to the context."""
        if tensor.shape[0] != -1 or -1 in tensor.shape[1:]:
            raise CannotExecute(f"built but not run: {tensor.name} has shape {list(tensor.shape)}; only dimension 0, the batch, may vary")
        like = self._torch.from_numpy(np.empty((self._max_batch, *tensor.shape[1:]), tensor.dtype))
        host, card = like.pin_memory(), like.to("cuda")
        self._check(self._context.set_tensor_address(tensor.name, card.data_ptr()), f"bind {tensor.name}")
        return host, card

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise RuntimeError(f"TensorRT could not {what}: {_errors(_logger())}")


def _modes(trt: Any) -> tuple[Any, Any]:
    return trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT


def _names(plan: Any) -> list[str]:
    return [plan.get_tensor_name(index) for index in range(plan.num_io_tensors)]


def _tensor(trt: Any, plan: Any, name: str) -> Tensor:
    return Tensor(name, np.dtype(trt.nptype(plan.get_tensor_dtype(name))).name, tuple(plan.get_tensor_shape(name)))
