"""Build and run ONNX files as engines: one file a backend, one table, one cache.

An engine takes named arrays and gives named arrays. It knows neither data sets nor accuracy nor serving.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from portaisys.spec import UserError

Arrays = Mapping[str, NDArray[Any]]
Status = Literal["built", "executed"]


@dataclass(frozen=True)
class Tensor:
    """An input or output. `shape`: -1 is a variable dimension; dimension 0 is the batch. `dtype`: numpy name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Options:
    """How an engine is built and run. The three batch sizes are its profile."""

    precision: str = "fp32"
    opt_batch: int = 8
    max_batch: int = 64
    threads: int = 1


class Engine(Protocol):
    """A loaded engine. `run` may be called from any thread, one call at a time an engine."""

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
#   build(onnx: Path, options: Options, out: Path) -> list[str]     writes one file; returns notes (fall-backs)
#   load(built: Path, options: Options) -> Engine     raises CannotExecute where it can only be built
BACKENDS = {
    "onnxruntime": "portaisys.engine.onnxruntime",
    "tensorrt": "portaisys.engine.tensorrt",
}


def backend(name: str) -> Any:
    """The module of a backend, imported on first use. Raises UserError for an unknown one."""
    if name not in BACKENDS:
        raise UserError(f"engine.backend: {name!r} is not one of {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name])


__all__ = ["BACKENDS", "Arrays", "CannotExecute", "Engine", "Options", "Status", "Tensor", "backend", "np"]
