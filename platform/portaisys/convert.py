"""A published version in another framework's format, checked before it counts as made: `portaisys convert digits@1 --to savedmodel`.

What is converted is the version's fp32.onnx, what it is held against are the answers that its fp32 engine gave to the golden rows.
Knows neither how a version was made nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portaisys import artifact
from portaisys.engine import Arrays, Engine, Tensor, tensorflow, verify
from portaisys.fetch import fetch
from portaisys.spec import Storage, UserError


@dataclass(frozen=True)
class Converted:
    """What was made of what. `rows`: asked in these `batches`; `max_abs`: the largest difference from the answers expected."""

    source: str
    path: Path
    library: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    rows: int
    batches: tuple[int, ...]
    max_abs: float
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in (self.path, *self.path.rglob("*")) if path.is_file())


def saved_model(reference: str, storage: Storage, folder: Path) -> Converted:
    """The SavedModel of "NAME@VERSION" in `folder`. Raises UserError for an unknown version, one that cannot be converted, or wrong answers, and then leaves `folder` as it was."""
    fetched = fetch(reference, storage, storage.cache_dir)
    found = artifact.read(fetched.path)
    about = json.loads(found.file("version.json").read_text())
    golden, batches = artifact.read_arrays(found.file("golden.npz")), _batches(about)
    made: list[Converted] = []

    def check(engine: Engine) -> None:
        feeds = {tensor.name: golden[tensor.name] for tensor in engine.inputs}
        expected = {tensor.name: golden[f"{tensor.name}_fp32"] for tensor in engine.outputs}
        off = held_against(f"{fetched.version}: its SavedModel", engine, feeds, expected, batches, about["tolerance"])
        rows = len(next(iter(feeds.values())))
        made.append(Converted(str(fetched.version), folder, tensorflow.version(), engine.inputs, engine.outputs, rows, tuple(batches), off))

    notes = tensorflow.save(found.file("fp32.onnx"), folder, check)
    return Converted(**{**vars(made[0]), "notes": tuple(notes)})


def held_against(what: str, engine: Engine, feeds: Arrays, expected: Arrays, batches: Sequence[int], tolerance: float | None) -> float:
    """The largest difference from `expected`. Raises UserError, which begins with `what`, when there is reason not to use the engine."""
    problem = verify.problem(engine, feeds, batches=batches, expected=expected, tolerance=tolerance)
    if problem:
        raise UserError(f"{what} answers wrongly, so nothing was made: {problem}")
    answers = verify.answers(engine, feeds, max(batches))
    return max(float(np.abs(np.subtract(array, expected[name], dtype=np.float64)).max(initial=0)) for name, array in answers.items())


def _batches(about: Mapping[str, Any]) -> list[int]:
    """As the version was verified; of a fixed batch only that one, of none the rows as they are."""
    if not about.get("batched", True):
        return [verify.AS_IS]
    least = about.get("min_batch", 1)
    return sorted({max(least, size) for size in (1, 2, about["opt_batch"], about["max_batch"])})
