"""Which layers bear INT8: each quantized alone, and a search that gives the worst ones back to fp32.

Everything is measured on rows that nothing was calibrated on, never on the test split, through the int8 engine that ONNX
Runtime's build step makes. Given a way to make a file for a choice of layers; knows nothing of how that is done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys import evaluate, gate, spec
from portaisys.engine import Arrays, Engine, Options, backend, verify

BATCH, TIMED_ROUNDS, TIMED_WARMUP = 32, 30, 5
Make = Callable[[Collection[str]], Any]


@dataclass(frozen=True)
class Bench:
    """Where files are measured. `feeds`: rows of every input; `y`: their labels [rows], or None: then the fp32 answers are what is right.

    `fixed`: the batch that the graph fixes, 0 when it is free; `folder`: for the files.
    """

    feeds: Arrays
    y: NDArray[Any] | None
    fixed: int
    folder: Path


def opened(model: Any, precision: str, bench: Bench) -> Engine:
    """ONNX Runtime's engine of a file, built as one that would be served."""
    runtime = backend("onnxruntime")
    source, built = bench.folder / "measured.onnx", bench.folder / "measured.built"
    source.write_bytes(model.SerializeToString())
    settings = Options(precision=precision)
    runtime.build(source, settings, built)
    engine: Engine = runtime.load(built, settings)
    return engine


def answers(engine: Engine, bench: Bench) -> NDArray[Any]:
    """Its first output for all rows, [rows, ...]."""
    return verify.answers(engine, bench.feeds, bench.fixed or BATCH)[engine.outputs[0].name]


def measured(model: Any, precision: str, bench: Bench) -> NDArray[Any]:
    """`answers` of the engine of a file, opened for this alone."""
    engine = opened(model, precision, bench)
    found = answers(engine, bench)
    engine.close()
    return found


def error(right: NDArray[Any], found: NDArray[Any]) -> float:
    """Root of the summed squares of the differences over that of the right answers."""
    return float(np.linalg.norm((found - right).astype(np.float64)) / (np.linalg.norm(right.astype(np.float64)) or 1.0))


def report(layers: Mapping[str, Collection[str]], make: Make, plain: Any, bench: Bench) -> list[dict[str, Any]]:
    """What each layer costs and saves when it alone is quantized, worst first. `layers`: name -> nodes; `plain`: the fp32 model.

    `drop`: of accuracy, a fraction; `error`: `error` of the logits; `latency_ratio`: medians at batch 1 (or the batch the graph fixes) over fp32's, in interleaved rounds.
    """
    reference = opened(plain, "fp32", bench)
    right = answers(reference, bench)
    truth, one = _labels(right, bench), {name: np.ascontiguousarray(rows[: bench.fixed or 1]) for name, rows in bench.feeds.items()}
    lines = []
    for layer, nodes in layers.items():
        engine = opened(make(nodes), "int8", bench)
        found = answers(engine, bench)
        ms = evaluate.latency({"fp32": lambda: reference.run(one), "int8": lambda engine=engine: engine.run(one)}, TIMED_ROUNDS, TIMED_WARMUP, seed=0)  # type: ignore[misc]
        engine.close()
        b, c = discordant(right, found, truth)
        ratio = float(np.median(ms["int8"]) / np.median(ms["fp32"]))
        lines.append({"layer": layer, "action": "quantized", "drop": (b - c) / len(truth), "error": error(right, found), "latency_ratio": ratio})
    reference.close()
    return sorted(lines, key=lambda line: -line["error"])


def search(ranked: Sequence[str], layers: Mapping[str, Collection[str]], make: Make, plain: Any, bench: Bench, limit: float, asked: spec.Gate) -> tuple[tuple[str, ...], list[str]]:
    """Layers to give back to fp32, of `ranked` (worst first) as few as make `enough` of it; and notes that say why. One always stays quantized.

    Ranked by the error of the logits and not by accuracy, which a few hundred rows resolve to a few thousandths only.
    """
    right = measured(plain, "fp32", bench)
    truth = _labels(right, bench)
    rule = _rule(len(truth), limit, asked)
    for count in range(len(ranked)):
        back = tuple(ranked[:count])
        found = measured(make([node for layer in ranked[count:] for node in layers[layer]]), "int8", bench)
        b, c = discordant(right, found, truth)
        drop = f"drop {100 * (b - c) / len(truth):.3g} points of {len(truth):,} validation rows, error of the logits {error(right, found):.2g}"
        if count == 0:
            first = drop
        if enough(b, c, len(truth), limit, asked):
            kept = f"given back to fp32, worst first: {', '.join(back)}; all quantized: {first}; so: {drop}" if back else f"no layer had to go back to fp32: {drop}"
            return back, [f"mixed: {kept} ({rule})"]
    return back, [f"mixed: with {ranked[-1]} alone quantized still {drop} ({rule}); the gate will decide; take method: qat, or a larger max_drop"]


def enough(b: int, c: int, n: int, limit: float, asked: spec.Gate) -> bool:
    """Whether a drop of (b - c) of n rows is within the reserve: at most `limit`, and, where so many rows can show it at all, its upper bound (Tango) within the gate's margin."""
    bounded = n < gate.least_rows(asked.max_accuracy_drop, asked.confidence) or gate.tango_bound(b, c, n, asked.confidence)[1] <= asked.max_accuracy_drop
    return (b - c) / n <= limit and bounded


def _rule(n: int, limit: float, asked: spec.Gate) -> str:
    least = gate.least_rows(asked.max_accuracy_drop, asked.confidence)
    bound = f"and its upper bound at most {100 * asked.max_accuracy_drop:.3g}" if n >= least else f"no bound was asked for, which takes {least:,} rows"
    return f"asked: at most {100 * limit:.3g} points, {bound}"


def discordant(right: NDArray[Any], found: NDArray[Any], truth: NDArray[Any]) -> tuple[int, int]:
    """Rows that only the first answers rightly, and that only the second does."""
    before, after = evaluate.correct(right, truth), evaluate.correct(found, truth)
    return int((before & ~after).sum()), int((~before & after).sum())


def _labels(right: NDArray[Any], bench: Bench) -> NDArray[Any]:
    return right.argmax(1) if bench.y is None else bench.y
