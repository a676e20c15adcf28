"""A torch model as a .tflite file, by litert-torch: `portaisys convert jobs/specs/digits.yaml --to tflite`.

litert-torch converts a torch module, so this belongs to the offline half and starts from a finished run, not from a version.
The file's batch is fixed: litert-torch 0.10 takes no free one. It is held against torch's answers before it counts as made.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from portaisys import artifact, data, evaluate, launch
from portaisys.convert import Converted, held_against
from portaisys.engine import Arrays, Tensor, check_feeds
from portaisys.engine.cpu import device
from portaisys.export import INPUT, OUTPUT
from portaisys.models import predictor
from portaisys.spec import Spec, UserError
from portaisys.weights import restore

ROWS = 32  # to hold the file against torch with


def of_run(options: Spec, path: Path) -> Converted:
    """`path` out of a finished run of a spec: its small model where there is one, else the dense. Raises UserError when the run is not finished."""
    if not launch.run_folder(options).exists() and not options.storage.remote:
        raise _unfinished("the run")
    splits = data.load(options.data)
    smallest = [stage for stage in launch.plan(options) if stage.kind == "export"][-1].parents["model"]
    made = launch.produce(options, smallest, _finished_only, splits)
    return to_tflite(restore(options, splits, made.path), splits.calibration.x, path, source=f"{options.name}, stage {smallest}")


def _finished_only(stage: str, text: str = "", fraction: float | None = None, state: str = "running") -> None:
    """A `Tell` under which nothing begins: a conversion does not train."""
    if state != "reused":
        raise _unfinished(f"stage {stage}")


def _unfinished(what: str) -> UserError:
    return UserError(f"convert: {what} is not finished for this spec and these overrides; portaisys run the spec first")


def to_tflite(model: nn.Module, rows: NDArray[np.float32], path: Path, *, batch: int = 1, source: str = "model") -> Converted:
    """Write `path`: x float32 [batch, ...] -> logits [batch, classes], the batch fixed. Raises UserError when it cannot be converted or answers differently.

    `rows`: float32 [>= batch, ...], what file and torch are asked.
    """
    library = _library("litert_torch")
    golden, path = np.ascontiguousarray(rows[: max(ROWS, batch)]), path.expanduser().resolve()
    expected = evaluate.predict_rows(predictor(model), golden, len(golden))
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch) / "model.tflite"
        _convert(library, model, golden[:batch], draft)
        engine = LiteRtEngine(draft)
        off = held_against(f"{source}: its .tflite", engine, {INPUT: golden}, {OUTPUT: expected}, [batch], None)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            artifact.write_bytes(path, draft.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); name a file that can") from error
    return Converted(source, path, f"litert-torch {library.__version__}", engine.inputs, engine.outputs, len(golden), (batch,), off, (f"its batch is fixed at {batch}",))


class LiteRtEngine:
    """A .tflite file's one signature behind the Engine interface."""

    backend, precision = "litert", "fp32"

    def __init__(self, path: Path) -> None:
        self._interpreter = _library("ai_edge_litert.interpreter").Interpreter(str(path), num_threads=1)
        self._runner = self._interpreter.get_signature_runner()
        self.device = device()
        self.inputs = tuple(_tensor(name, about) for name, about in self._runner.get_input_details().items())
        self.outputs = tuple(_tensor(name, about) for name, about in self._runner.get_output_details().items())

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs for a batch of inputs. Raises UserError for wrong names, types or shapes."""
        check_feeds(self.inputs, feeds)
        answers: dict[str, NDArray[Any]] = self._runner(**feeds)
        return answers

    def close(self) -> None:
        """Free the interpreter and its memory."""
        self._interpreter = self._runner = None


def _tensor(name: str, about: Any) -> Tensor:
    return Tensor(name, np.dtype(about["dtype"]).name, tuple(int(size) for size in about["shape"]))


class _Named(nn.Module):
    """Names the output: a signature has the names of a dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {OUTPUT: self.model(x)}


def _convert(library: Any, model: nn.Module, sample: NDArray[np.float32], path: Path) -> None:
    try:
        with warnings.catch_warnings():
            # The converter warns of its own internals; what matters is checked by whoever called.
            warnings.simplefilter("ignore")
            library.convert(_Named(model).eval(), sample_kwargs={INPUT: torch.from_numpy(sample)}).export(str(path))
    except Exception as error:  # what it cannot lower it says in errors of torch, MLIR and its own
        raise UserError(f"convert: litert-torch cannot convert this model: {(str(error).strip().splitlines() or [type(error).__name__])[0]}") from error


def _library(name: str) -> Any:
    os.environ.setdefault("LITERT_TORCH_SHOW_PROGRESS", "n")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it comes along, and tells of GPU kernels that nobody asked for
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError("LiteRT is not installed; pip install 'portaisys[litert]'") from None
