"""TensorRT 10, 11 and RTX, one code path: build a strongly typed plan from ONNX, run it where there is a GPU.

Precision is the type of the tensors in the ONNX file and nothing else (TensorRT 11 has no other way). RTX builds
without a GPU, so a graph can be proven acceptable anywhere; running needs a driver and torch for its buffers (gpu.py).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import threading
from pathlib import Path
from typing import Any

from portaisys.artifact import hash_file, write_bytes
from portaisys.engine import CannotExecute, Options
from portaisys.engine.cuda import driver, open_cuda
from portaisys.engine.gpu import GpuEngine, Plan, describe
from portaisys.engine.onnx_file import face_of, read_for, read_onnx
from portaisys.spec import UserError

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")

# What RTX builds for where there is no GPU to ask: Ada, which all of RTX's releases support.
DEFAULT_TARGET = "SM89"


def version() -> str:
    """Flavour and version, and the driver's CUDA version where there is one. Raises UserError naming the extra."""
    trt = _trt()
    found = driver()
    return f"{trt.__name__} {trt.__version__}" + (f", CUDA driver {found[1]}" if found else "")


def device() -> str:
    """Compute capability of the first GPU, "sm_90"; "none" without one."""
    found = driver()
    return found[0] if found else "none"


def _trt() -> Any:
    """The installed flavour. Where both are, the full one: RTX runs on fewer GPUs."""
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UserError("engine.backend: TensorRT is not installed; pip install 'portaisys[tensorrt-rtx]' (or 'portaisys[tensorrt]' for data-centre GPUs)")


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


def build(onnx: Path, options: Options, out: Path, kept: Path | None = None) -> list[str]:
    """Write a serialized plan. Returns notes. `kept`: a folder for timings that the next build need not take again.

    Raises UserError with TensorRT's own messages when it refuses the graph.
    """
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
    timings = _timings(kept)
    notes += _recalled(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{onnx}: {trt.__name__} cannot build it: {_errors(logger)}")
    write_bytes(out, bytes(plan))
    _remember(config, timings)
    return notes


def _timings(kept: Path | None) -> Path | None:
    """The file of this library's timings on this card. RTX chooses kernels where it runs and times none (its cache would ask for a GPU)."""
    if kept is None or _trt().__name__ != "tensorrt":
        return None
    return kept / f"timings-{re.sub('[^A-Za-z0-9.]+', '-', version())}-{device()}"


def _recalled(config: Any, timings: Path | None) -> list[str]:
    """Begin with the timings of earlier builds; of another version or damaged, they are left and it is said."""
    if timings is None:
        return []
    old = timings.read_bytes() if timings.exists() else b""
    if config.set_timing_cache(config.create_timing_cache(old), False):
        return []
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return ["the timings kept from earlier builds are of another version or card, and were taken again"]


def _remember(config: Any, timings: Path | None) -> None:
    """Keep what was timed. Of two builds at once the later one's stay; a folder that cannot be written costs the next build time, no more."""
    if timings is not None:
        with contextlib.suppress(OSError):
            timings.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(timings, bytes(config.get_timing_cache().serialize()))


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
    if driver() is not None:
        return []
    if not hasattr(trt, "ComputeCapability"):
        raise UserError("engine.backend: TensorRT builds only where there is a GPU; here install 'portaisys[tensorrt-rtx]', which builds without one")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, DEFAULT_TARGET), 0)
    return [f"no GPU here: built for {DEFAULT_TARGET}, as proof that {trt.__name__} takes this graph"]


def _errors(logger: Any) -> str:
    return "; ".join(logger.errors) or "no reason given"


# --- run ----------------------------------------------------------------------------------------------------------

# Deserialized plans of this process, by content: weights lie on the card once, however often a version is opened.
_PLANS: dict[tuple[str, bool], tuple[Plan, int]] = {}
_PLANS_LOCK = threading.Lock()


def load(built: Path, options: Options, kept: Path | None = None) -> GpuEngine:
    """Open a plan on GPU 0. `kept`: a folder for kernels that RTX compiles here.

    Raises CannotExecute without a driver, without torch's CUDA, or when TensorRT refuses the plan.
    """
    if driver() is None:
        raise CannotExecute("built but not run: this machine has no NVIDIA driver with a GPU (libcuda.so.1)")
    cuda = open_cuda()
    key = hash_file(built), options.cuda_graphs
    with _PLANS_LOCK:
        plan, users = _PLANS[key] if key in _PLANS else (_deserialized(built, options, kept), 0)
        _PLANS[key] = plan, users + 1
    try:
        return GpuEngine(plan, cuda, options, lambda: _released(key))
    except BaseException:
        _released(key)
        raise


def _released(key: tuple[str, bool]) -> None:
    with _PLANS_LOCK:
        plan, users = _PLANS.pop(key)
        if users > 1:
            _PLANS[key] = plan, users - 1


def _deserialized(built: Path, options: Options, kept: Path | None) -> Plan:
    trt, logger = _trt(), _logger()
    logger.errors.clear()
    runtime, content = trt.Runtime(logger), built.read_bytes()
    _refuse_invalid(trt, runtime, content)
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise CannotExecute(f"built but not run: {trt.__name__} {trt.__version__} cannot load the plan on {device()}: {_errors(logger)}")
    kernels = None if kept is None else kept / f"kernels-{hash_file(built)[:16]}-{device()}"
    return describe(Plan(trt, runtime, engine, device(), lambda: _errors(logger), kernels), options.cuda_graphs)


def _refuse_invalid(trt: Any, runtime: Any, content: bytes) -> None:
    """RTX says beforehand whether it takes a plan on this card, and why not."""
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, reasons = runtime.get_engine_validity(content)
    if validity == trt.EngineValidity.INVALID:
        why = [name for name, flag in trt.EngineInvalidityDiagnostics.__members__.items() if int(reasons) & int(flag)]
        raise CannotExecute(f"built but not run: {trt.__name__} {trt.__version__} does not take the plan on {device()}: {', '.join(why) or reasons}")
