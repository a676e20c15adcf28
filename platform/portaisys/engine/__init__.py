"""Build and run ONNX files as engines: one file a backend, one table, one cache.

An engine takes named arrays and gives named arrays. It knows neither data sets nor accuracy nor serving.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from portaisys.spec import Engine as EngineSpec
from portaisys.spec import Export, UserError

Arrays = Mapping[str, NDArray[Any]]
Dims = tuple[tuple[str, int, int, int], ...]
Status = Literal["built", "executed"]


@dataclass(frozen=True)
class Tensor:
    """An input or output. `shape`: -1 is a variable dimension; dimension 0 is the batch. `dtype`: numpy name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Options:
    """How an engine is built and run. Batch 1, `opt_batch` and `max_batch` are its profile.

    `dims`: any other free dimension by its name in the file, with its least, usual and largest size. `hint`: what is tuned for,
    "latency" or "throughput". `provider`: ONNX Runtime's, "auto" is CUDA where there is one. `workspace_mib` (None: the library's
    default), `optimization_level` (0 to 5) and `sparse` (2:4 weights) are TensorRT's. `slots`: calls of one engine that may run at once, from as many threads.
    """

    precision: str = "fp32"
    opt_batch: int = 8
    max_batch: int = 64
    dims: Dims = ()
    hint: str = "latency"
    provider: str = "auto"
    workspace_mib: int | None = None
    optimization_level: int = 3
    sparse: bool = False
    rest: str = "fp32"
    threads: int = 1
    slots: int = 1
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for name, *sizes in (("batch", 1, self.opt_batch, self.max_batch), *self.dims):
            if sizes != sorted(sizes) or sizes[0] < 1:
                raise UserError(f"engine profile: {name} goes from {sizes[0]} by {sizes[1]} to {sizes[2]}; the least must be 1 or more, the usual between it and the largest")


def options_of(engine: EngineSpec, export: Export, dims: Dims = ()) -> Options:
    """The options of a spec's engines, at fp32: whoever builds another precision replaces it."""
    return Options(
        "fp32", export.opt_batch, export.max_batch, dims, hint=engine.objective, provider=engine.provider, workspace_mib=engine.workspace_mib,
        optimization_level=engine.optimization_level, sparse=engine.sparse, rest="bf16" if "bf16" in (engine.precisions or ()) else "fp32", threads=engine.threads, slots=engine.slots, cuda_graphs=engine.cuda_graphs,
    )  # fmt: skip


# What a version remembers of the options beside precision, batches and threads: serving builds what was judged.
REMEMBERED = ("hint", "provider", "workspace_mib", "optimization_level", "sparse", "rest", "slots", "cuda_graphs")


def remembered(options: Options) -> dict[str, Any]:
    """What `version.json` keeps of the options."""
    return {name: getattr(options, name) for name in REMEMBERED}


def recalled(about: Mapping[str, Any], precision: str, threads: int, slots: int | None = None) -> Options:
    """The options out of a `version.json`, as they were judged; of an older version without them, the defaults. `slots`: None is as judged."""
    dims = tuple(tuple(dim) for dim in about.get("dims", ()))
    options = Options(precision, about["opt_batch"], about["max_batch"], dims, threads=threads, **about.get("options", {}))
    return options if slots is None else replace(options, slots=slots)


# What of the options decides how a built engine is run, not what is built.
RUN_ONLY = ("threads", "slots", "cuda_graphs")


class Engine(Protocol):
    """A loaded engine. `run` may be called from any thread, so many calls at once as its options have slots."""

    backend: str
    precision: str
    device: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs for a batch of inputs; the batch is dimension 0 of every array."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot run afterwards."""
        ...


class CannotExecute(UserError):
    """The engine was built but this machine cannot run it; the message says why."""


# What a backend module offers (checked by tests/test_engine.py):
#   PRECISIONS: tuple[str, ...]
#   version() -> str                                  library and version; raises UserError naming the extra
#   device() -> str                                   device class, "cpu-avx512" or "sm_90" or "none"
#   build(onnx: Path, options: Options, out: Path, kept: Path | None) -> list[str]     writes one file; returns notes (fall-backs)
#   load(built: Path, options: Options, kept: Path | None) -> Engine     raises CannotExecute where it can only be built
# `kept`: a folder where a backend keeps what outlives a build: timings, compiled kernels. None: nothing is kept.
BACKENDS = {
    "onnxruntime": "portaisys.engine.onnxruntime",
    "openvino": "portaisys.engine.openvino",
    "tensorrt": "portaisys.engine.tensorrt",
}


# They take precision from the types in the file; the others from their options, on the fp32 file or the quantized one.
TYPED = ("tensorrt",)


def backend(name: str) -> Any:
    """The module of a backend, imported on first use. Raises UserError for an unknown one."""
    if name not in BACKENDS:
        raise UserError(f"engine.backend: {name!r} is not one of {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name])


def available() -> dict[str, str]:
    """Backends that run on this machine: name -> "version on device"."""
    found = {}
    for name in BACKENDS:
        with contextlib.suppress(UserError):  # not installed
            module = backend(name)
            if module.device() != "none":
                found[name] = f"{module.version()} on {module.device()}"
    return found


def check_feeds(inputs: Sequence[Tensor], feeds: Arrays) -> int:
    """The number of rows of a request, dimension 0 of whatever input leaves it free. Raises UserError when names, types or shapes are not those of `inputs`."""
    if set(feeds) != {tensor.name for tensor in inputs}:
        raise UserError(f"inputs: this engine takes {', '.join(tensor.name for tensor in inputs)}; got {', '.join(sorted(feeds)) or 'nothing'}")
    for tensor in inputs:
        array = feeds[tensor.name]
        fits = len(tensor.shape) == array.ndim and all(want in (-1, got) for want, got in zip(tensor.shape, array.shape, strict=True))
        if array.dtype.name != tensor.dtype or not fits:
            raise UserError(f"inputs: {tensor.name} must be {tensor.dtype} of shape {list(tensor.shape)}; it is {array.dtype.name} of {list(array.shape)}")
    # A state may hold its batch elsewhere, [layers, batch, size], and a fixed batch leaves nothing free.
    rows = {feeds[tensor.name].shape[0] for tensor in inputs if tensor.shape[:1] == (-1,)} or {next((tensor.shape[0] for tensor in inputs if tensor.shape), 1)}
    if len(rows) != 1 or not min(rows):
        raise UserError(f"inputs: all need the same number of rows, at least one; they have {sorted(rows)}")
    return int(rows.pop())


__all__ = ["BACKENDS", "REMEMBERED", "RUN_ONLY", "TYPED", "Arrays", "CannotExecute", "Engine", "Options", "Status", "Tensor", "available", "backend", "check_feeds", "np", "options_of", "recalled", "remembered"]
