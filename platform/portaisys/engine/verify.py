"""Whether an engine may be used at all: the same row gets the same answer in whatever batch it comes, and it is a number.

Engines have been wrong at some batch sizes only (TensorRT #3744, triton #5640), and NaN at all of them (TensorRT #3893).
Knows neither labels nor speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys.engine import Arrays, Engine

# Of the largest answer. A quantized value may fall on the other side of a rounding when sums are added in another order.
TOLERANCE = {"fp32": 1e-3, "tf32": 5e-3, "fp16": 0.02, "bf16": 0.05, "int8": 0.05, "fp8": 0.1}


AS_IS = 0  # the batch of an engine whose inputs share none: its samples are one call


def problem(
    engine: Engine, feeds: Arrays, *, batches: Sequence[int], seed: int = 0, expected: Arrays | None = None, tolerance: float | None = None, draws: int = 2
) -> str:
    """Why this engine must not be used, empty when it may. `feeds`: rows of every input; `expected`: their answers, default the engine's own, row by row.

    Every batch size is drawn `draws` times from the rows, in random order and with repetition, so that neighbours differ each time.
    `tolerance`: absolute, default TOLERANCE of the largest answer. `batches` of an engine of a fixed batch is that size, of one without (AS_IS,).
    """
    if AS_IS in batches:
        return _problem_as_is(engine, feeds, expected, tolerance)
    rng = np.random.default_rng(seed)
    rows = len(next(iter(feeds.values())))
    right = expected if expected is not None else answers(engine, feeds, min(batches))
    if off := _not_finite(right if expected is None else _run(engine, feeds, np.arange(min(batches)) % rows)):
        return f"its answers hold NaN or infinity ({off})"
    sizes = [*batches, int(rng.integers(min(batches), max(batches) + 1))]
    for batch in sizes:
        for _ in range(draws):
            chosen = rng.integers(0, rows, batch)
            if found := _differs(_run(engine, feeds, chosen), {name: array[chosen] for name, array in right.items()}, right, engine.precision, tolerance):
                return f"at batch {batch} {found} from what the same row gets {'alone' if expected is None else 'from the reference'}"
    return ""


def _problem_as_is(engine: Engine, feeds: Arrays, expected: Arrays | None, tolerance: float | None) -> str:
    found = engine.run(feeds)
    if off := _not_finite(found):
        return f"its answers hold NaN or infinity ({off})"
    right = expected if expected is not None else found
    differs = _differs(engine.run(feeds), right, right, engine.precision, tolerance)
    return f"{differs} from {'the same call before' if expected is None else 'the reference'}" if differs else ""


def answers(engine: Engine, feeds: Arrays, batch: int) -> dict[str, NDArray[Any]]:
    """Outputs for all rows of `feeds`, so many at a time, or AS_IS in one call; the last batch is filled up with first rows."""
    if batch == AS_IS:
        return engine.run(feeds)
    rows = len(next(iter(feeds.values())))
    parts = [_run(engine, feeds, np.arange(start, start + batch) % rows) for start in range(0, rows, batch)]
    return {name: np.concatenate([part[name] for part in parts])[:rows] for name in parts[0]}


def agreement(engine: Engine, feeds: Arrays, scores: NDArray[Any], batch: int) -> float:
    """Fraction in [0, 1] of rows whose largest score in the first output [n, classes] is where it is in `scores`."""
    found = answers(engine, feeds, batch)[engine.outputs[0].name]
    return float((found.argmax(1) == scores.argmax(1)).mean())


def _run(engine: Engine, feeds: Arrays, chosen: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    return engine.run({name: np.ascontiguousarray(array[chosen]) for name, array in feeds.items()})


def _not_finite(answers: Mapping[str, NDArray[Any]]) -> str:
    """Name of the first output with a NaN or infinity in it."""
    return next((name for name, array in answers.items() if array.dtype.kind == "f" and not np.isfinite(array).all()), "")


def _differs(found: Arrays, right: Arrays, scale: Arrays, precision: str, tolerance: float | None) -> str:
    """The first output that is further from `right` than it may be; integers may not differ at all from exact engines'."""
    for name, array in found.items():
        if array.shape != right[name].shape:
            return f"{name} has shape {list(array.shape)} and not {list(right[name].shape)}, far"
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"{name} holds NaN or infinity, far"
        bound = TOLERANCE[precision] * float(np.abs(scale[name].astype(np.float64)).max(initial=0)) if tolerance is None else tolerance
        off = float(np.abs(np.subtract(array, right[name], dtype=np.float64)).max(initial=0))
        if off > bound:
            return f"{name} is {off:.3g} (bound {bound:.3g}) off"
    return ""
