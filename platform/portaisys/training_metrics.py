"""Rows of a training as Ray metrics, which Ray exports to Prometheus (counters gain `_total`). Rank 0 records what it writes to its log."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

# The run and the stage alone: as many series as there are runs, whatever they compute.
_TAGS = ("run", "stage")
_GAUGES = {
    "step": "Steps done, those of earlier attempts too",
    "loss": "Mean loss since the last report",
    "validation_accuracy": "Accuracy on the validation split",
    "samples_per_s": "Rows a second, over all workers",
    "eta_s": "Seconds that the steps left will take",
    "mfu": "Model FLOPs utilization, 0 to 1",
    "padding_waste": "Share of what is computed that is padding",
    "checkpoint_s": "Seconds that the last checkpoint's write took",
    "steps_repeated": "Steps computed again in fp32",
    "steps_skipped": "Steps left out: not finite even in fp32",
    "scale_lowered": "Times that fp16's scale was halved",
    "precision_fallbacks": "Times that the rest of a run fell back to another precision",
}
# Exact, of this attempt: summed over a run's attempts, all that was computed.
_COUNTERS = {"attempt_steps": ("steps", "Steps computed"), "attempt_samples": ("samples", "Rows trained on, over all workers")}


class TrainingMetrics:
    """The metrics of one attempt at one stage of a run."""

    def __init__(self, run: str, stage: str) -> None:
        self._gauges = {key: Gauge(f"portaisys_train_{key}", text, _TAGS) for key, text in _GAUGES.items()}
        self._counters = {key: Counter(f"portaisys_train_{name}", text, _TAGS) for key, (name, text) in _COUNTERS.items()}
        self._told = dict.fromkeys(_COUNTERS, 0.0)
        for metric in (*self._gauges.values(), *self._counters.values()):
            metric.set_default_tags({"run": run, "stage": stage})

    def tell(self, row: Mapping[str, float]) -> None:
        """Record a row; what it lacks stays as it was."""
        for key in _GAUGES.keys() & row.keys():
            self._gauges[key].set(row[key])
        for key, counter in self._counters.items():
            if new := row[key] - self._told[key]:
                counter.inc(new)
            self._told[key] = row[key]
