"""What the compression benchmarks have in common: runs that share one trained teacher, and figures of paired answers. Nothing here is measured by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from portaisys import evaluate, launch, spec
from portaisys.engine import Options, backend
from portaisys.export import INPUT
from portaisys.screen import Screen

Figure = dict[str, float]


def options_of(base: Mapping[str, Any], name: str, folder: Path, compress: Sequence[Mapping[str, Any]], **others: Any) -> spec.Spec:
    """The spec of one run: `base` has data, model, train and gate."""
    return spec.parse({**base, **others, "name": name, "compress": list(compress), "storage": {"path": str(folder), "cache": str(folder / "cache")}})


def run(base: Mapping[str, Any], name: str, folder: Path, compress: Sequence[Mapping[str, Any]], **others: Any) -> launch.Outcome:
    """A whole run whose teacher is the one in `folder`, trained there when it is not yet; what is finished is only read."""
    teacher, options = options_of(base, "teacher", folder, []), options_of(base, name, folder, compress, **others)
    with Screen() as tell:
        launch.train(teacher, tell)
        launch.take_over(options, teacher, ("train",))
        return launch.run(options, tell, promote=False)


def right(outcome: launch.Outcome) -> dict[str, np.ndarray]:
    """Which test rows each engine answered rightly, by engine."""
    with np.load(outcome.artifacts["judge"].file("answers.npz")) as answers:
        return {name.replace("_", " "): answers[name] == answers["y"] for name in answers.files if name != "y"}


def row(outcome: launch.Outcome, engine: str) -> dict[str, Any]:
    """A line of the closing table."""
    return next(row for row in outcome.rows if row["engine"] == engine)


def exact(value: float) -> Figure:
    return dict.fromkeys(("value", "low", "high"), float(value))


def share(correct: np.ndarray) -> Figure:
    """Percent that are right, with Wilson's 95 % interval."""
    found = stats.binomtest(int(correct.sum()), len(correct)).proportion_ci(0.95, "wilson")
    return {"value": 100 * float(correct.mean()), "low": 100 * found.low, "high": 100 * found.high}


def realised(outcome: launch.Outcome, rows: np.ndarray, rounds: Mapping[int, int]) -> Figure:
    """Latency cut over MAC cut of the fp32 files in ONNX Runtime on one thread: the lesser over the batch sizes, `rounds` of each (low, high: bootstrap)."""
    made = {name: outcome.artifacts[name].file("model.onnx") for name in ("export-dense", "export-small")}
    engines = {name: backend("onnxruntime").load(file, Options(provider="cpu")) for name, file in made.items()}
    cut = row(outcome, "dense fp32")["macs"] / row(outcome, "small fp32")["macs"]
    found = []
    for batch, count in rounds.items():
        ms = evaluate.latency({name: partial(engine.run, {INPUT: rows[:batch]}) for name, engine in engines.items()}, count, 20, 0)
        dense, small = (ms[name] for name in made)
        index = np.random.default_rng(0).integers(count, size=(1000, count))
        ratios = np.median(dense[index], 1) / np.median(small[index], 1) / cut
        found.append({"value": float(np.median(dense) / np.median(small) / cut), "low": float(np.quantile(ratios, 0.025)), "high": float(np.quantile(ratios, 0.975))})
        print(f"batch {batch}: {np.median(dense):.3f} ms to {np.median(small):.3f} ms, of {cut:.2f} times fewer MACs {found[-1]['value']:.3f} is realised")
    for engine in engines.values():
        engine.close()
    return min(found, key=lambda one: one["value"])


def tell(outcome: launch.Outcome) -> None:
    """Every engine with its verdict, and of every stage its seconds and validation accuracy."""
    for one in outcome.rows:
        print(f"{outcome.folder.name}: {one['engine']}: {one['accuracy']:.2%}, {one['parameters']:,} parameters, {one['macs']:,} MACs, {one['size_bytes']:,} bytes, {one['latency_ms_p50']:.3f} ms; {one['because']}")
    for made in outcome.artifacts.values():
        known = made.scores.get("validation_accuracy")
        print(f"{outcome.folder.name}: {made.path.name}: {made.seconds:.0f} s" + ("" if known is None else f", validation {known:.2%}, {made.scores['parameters']:,} parameters"), flush=True)


def show(benchmark: str, figures: Mapping[str, Figure]) -> dict[str, Any]:
    """Print the figures; what `--json` prints last."""
    for name, figure in figures.items():
        print(f"{name}: {figure['value']:.4f} ({figure['low']:.4f} to {figure['high']:.4f})")
    return {"benchmark": benchmark, "figures": dict(figures)}
