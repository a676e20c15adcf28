"""Serving counters and histograms as Ray metrics, which Ray exports to Prometheus (counters gain `_total`).

Recorded once a batch, not once a request: a record costs about as much as decoding an image.
The engine seconds are a Counter beside the histogram because Ray estimates a histogram's sum from its buckets.
"""

from __future__ import annotations

from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from portaisys.serve.batcher import BatchRecord
from portaisys.serve.model import ServedModel

_TAGS = ("model", "reference")
_MS = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]


# Stage of a batch -> what of its record is its milliseconds and, as an exact sum over requests, its seconds.
_STAGES = {
    "decode": ("decode_s", "decode_sum_s", "was decoded"),
    "queue": ("queue_s", "queue_sum_s", "waited"),
    "assembly": ("assembly_s", "assembly_s", "was put together"),
    "engine": ("engine_s", "engine_s", "was in the engine"),
    "deliver": ("deliver_s", "deliver_s", "was encoded and told"),
}


class RayMetrics:
    """The metrics of one model of a replica, tagged with the reference it was opened by: as many as there are references, no more."""

    def __init__(self, reference: str) -> None:
        tags = {"model": reference.partition("@")[0], "reference": reference}
        self._samples = Counter("portaisys_samples", "Samples run", _TAGS)
        self._run_requests = Counter("portaisys_run_requests", "Requests that were in a batch", _TAGS)
        self._failed = Counter("portaisys_failed_batches", "Batches the engine raised on", _TAGS)
        self._fallbacks = Counter("portaisys_precision_fallbacks", "Admitted precisions passed over at start", _TAGS)
        self._batch = Histogram("portaisys_batch_samples", "Samples a batch, as executed", [1, 2, 4, 8, 16, 32, 64, 128, 256], _TAGS)
        self._ms = {stage: Histogram(f"portaisys_{stage}_ms", f"Milliseconds a batch, or its oldest request, {what}", _MS, _TAGS) for stage, (_, _, what) in _STAGES.items()}
        self._seconds = {stage: Counter(f"portaisys_{stage}_seconds", f"Exact sum of seconds that it {what}", _TAGS) for stage, (_, _, what) in _STAGES.items()}
        for metric in (self._samples, self._run_requests, self._failed, self._fallbacks, self._batch, *self._ms.values(), *self._seconds.values()):
            metric.set_default_tags(tags)

    def batch(self, record: BatchRecord) -> None:
        """Add one run of the engine."""
        self._batch.observe(record.samples)
        self._samples.inc(record.samples)
        self._run_requests.inc(record.requests)
        for stage, (longest, total, _) in _STAGES.items():
            if stage == "decode" and not record.decode_sum_s:  # its requests were told of one by one
                continue
            self._ms[stage].observe(getattr(record, longest) * 1e3)
            if seconds := getattr(record, total):
                self._seconds[stage].inc(seconds)
        if record.failed:
            self._failed.inc()

    def stage(self, name: str, seconds: float) -> None:
        """Add the decoding or delivering of one request, of those that take neither in a batch: JSON, gRPC, compressed ones."""
        self._ms[name].observe(seconds * 1e3)
        if seconds:
            self._seconds[name].inc(seconds)

    def fallbacks(self, reasons: Sequence[str]) -> None:
        """Count the precisions passed over at start."""
        if reasons:
            self._fallbacks.inc(len(reasons))


class ReplyMetrics:
    """Replies of a replica by HTTP status, recorded with each health check: a record costs about as much as a whole request."""

    def __init__(self) -> None:
        self._requests = Counter("portaisys_requests", "Replies by HTTP status", ("status",))
        self._steps = Counter("portaisys_precision_steps", "Changes of the precision that answers", ("model", "now"))
        self._queued = Gauge("portaisys_queued_samples", "Samples that wait", ("model", "version"))
        self._rejected = Counter("portaisys_rejected", "Requests that were not run, by reason", ("model", "version", "reason"))
        self._recalled = Counter("portaisys_recalled", "Requests by whether a kept answer did", ("model", "version", "found"))
        self._told: dict[tuple[str, ...], int] = {}
        self._counts: dict[int, int] = {}
        self._seen: dict[int, int] = {}  # steps counted already, by ladder

    def models(self, models: Sequence[ServedModel]) -> None:
        """Record queues, rejections, kept answers and what the precision ladders have done since the last time."""
        for model in models:
            tags = {"model": model.name, "version": model.version}
            self._queued.set(model.batcher.queued, tags)
            for reason, count in list(model.stats.rejected.items()):
                self._since(self._rejected, {**tags, "reason": reason}, count)
            if model.recall is not None:
                self._since(self._recalled, {**tags, "found": "yes"}, model.recall.hits)
                self._since(self._recalled, {**tags, "found": "no"}, model.recall.misses)
        self._climbed(models)

    def _since(self, counter: Counter, tags: dict[str, str], count: int) -> None:
        """Add what came since the last time; a version that was loaded again counts from nothing."""
        key = (counter.info["name"], *tags.values())
        told = self._told.get(key, 0)
        self._told[key] = count
        if new := count - told if count >= told else count:
            counter.inc(new, tags)

    def _climbed(self, models: Sequence[ServedModel]) -> None:
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
