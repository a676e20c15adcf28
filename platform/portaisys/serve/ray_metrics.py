"""Serving counters and histograms as Ray metrics, which Ray exports to Prometheus (counters gain `_total`).

Recorded once a batch, not once a request: a record costs about as much as decoding an image.
The engine seconds are a Counter beside the histogram because Ray estimates a histogram's sum from its buckets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ray.util.metrics import Counter, Histogram

from portaisys.serve.batcher import BatchRecord
from portaisys.serve.model import ServedModel

_TAGS = ("model", "reference")
_MS = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]


class RayMetrics:
    """The metrics of one model of a replica, tagged with the reference it was opened by."""

    def __init__(self, reference: str) -> None:
        tags = {"model": reference.partition("@")[0], "reference": reference}
        self._samples = Counter("portaisys_samples", "Samples run", _TAGS)
        self._failed = Counter("portaisys_failed_batches", "Batches the engine raised on", _TAGS)
        self._fallbacks = Counter("portaisys_precision_fallbacks", "Admitted precisions passed over at start", _TAGS)
        self._engine_s = Counter("portaisys_engine_seconds", "Seconds in the engine", _TAGS)
        self._batch = Histogram("portaisys_batch_samples", "Samples a batch", [1, 2, 4, 8, 16, 32, 64, 128, 256], _TAGS)
        self._engine_ms = Histogram("portaisys_engine_ms", "Milliseconds a batch is in the engine", _MS, _TAGS)
        self._queue_ms = Histogram("portaisys_queue_ms", "Milliseconds the oldest sample of a batch waited", _MS, _TAGS)
        for metric in (self._samples, self._failed, self._fallbacks, self._engine_s, self._batch, self._engine_ms, self._queue_ms):
            metric.set_default_tags(tags)

    def batch(self, record: BatchRecord) -> None:
        """Add one run of the engine."""
        self._batch.observe(record.samples)
        self._queue_ms.observe(record.queue_s * 1e3)
        self._engine_ms.observe(record.engine_s * 1e3)
        self._engine_s.inc(record.engine_s)
        self._samples.inc(record.samples)
        if record.failed:
            self._failed.inc()

    def fallbacks(self, reasons: Sequence[str]) -> None:
        """Count the precisions passed over at start."""
        if reasons:
            self._fallbacks.inc(len(reasons))


class ReplyMetrics:
    """Replies of a replica by HTTP status, recorded with each health check: a record costs about as much as a whole request."""

    def __init__(self) -> None:
        self._requests = Counter("portaisys_requests", "Replies by HTTP status", ("status",))
        self._steps = Counter("portaisys_precision_steps", "Changes of the precision that answers", ("model", "now"))
        self._counts: dict[int, int] = {}
        self._seen: dict[int, int] = {}  # steps counted already, by ladder

    def steps(self, models: Iterable[ServedModel]) -> None:
        """Count what the precision ladders have done since the last time."""
        ladders = [model.ladder for model in models if model.ladder]
        for ladder in ladders:
            for step in ladder.steps[self._seen.get(id(ladder), 0) :]:
                self._steps.inc(1, {"model": ladder.name, "now": step.now})
        self._seen = {id(ladder): len(ladder.steps) for ladder in ladders}

    def count(self, status: int) -> None:
        """From any thread; what is lost between two threads that count the same status at the same moment is one."""
        self._counts[status] = self._counts.get(status, 0) + 1

    def flush(self) -> None:
        """Record what came since the last time."""
        counts, self._counts = self._counts, {}
        for status, count in counts.items():
            self._requests.inc(count, {"status": str(status)})
