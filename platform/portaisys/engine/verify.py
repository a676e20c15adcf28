"""Whether an engine may be used at all: the same row gets the same answer in whatever batch it comes, and it is a number.

Engines have been wrong at some batch sizes only (TensorRT #3744, triton #5640), and NaN at all of them (TensorRT #3893).
Knows neither accuracy nor speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from portaisys.engine import Engine

# Of the largest answer. A quantized value may fall on the other side of a rounding when sums are added in another order.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "int8": 0.05}


def problem(engine: Engine, x: NDArray[np.float32], *, batches: Sequence[int], seed: int = 0, expected: NDArray[np.float32] | None = None) -> str:
    """Why this engine must not be used, empty when it may. `x`: rows of the one input; `expected`: their answers, default the engine's own, row by row.

    Every batch size is drawn twice from `x`, in random order and with repetition, so that neighbours differ each time.
    """
    rng = np.random.default_rng(seed)
    alone = _run(engine, x[:1]) if expected is not None else np.concatenate([_run(engine, row[None]) for row in x])
    if not np.isfinite(alone).all():
        return "its answers hold NaN or infinity"
    right = alone if expected is None else expected
    bound = TOLERANCE[engine.precision] * float(np.abs(right).max())
    for batch in (*batches, int(rng.integers(1, max(batches) + 1))):
        for _ in range(2):
            chosen = rng.integers(0, len(x), batch)
            answers = _run(engine, x[chosen])
            if not np.isfinite(answers).all():
                return f"its answers at batch {batch} hold NaN or infinity"
            off = float(np.abs(answers - right[chosen]).max())
            if off > bound:
                return f"at batch {batch} an answer is {off:.3g} from what the same row gets {'alone' if expected is None else 'from the reference'} (bound {bound:.3g})"
    return ""


def _run(engine: Engine, x: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = engine.run({engine.inputs[0].name: np.ascontiguousarray(x)})[engine.outputs[0].name]
    return found
