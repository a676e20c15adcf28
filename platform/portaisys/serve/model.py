"""A published version ready to answer: engine, batcher, and what it says of itself.

`open_version` takes the best admitted precision whose engine still gives the golden answers on this machine, and is
done only when every batch size it will meet has been run once. Knows neither HTTP nor Ray nor how a version was made.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from portaisys import artifact
from portaisys.engine import Arrays, Engine, Options, Tensor, recalled, verify
from portaisys.engine.cache import Cache, cache_of, get_or_build, load
from portaisys.fetch import fetch
from portaisys.registry import Version
from portaisys.serve.answers import Answers, Recall
from portaisys.serve.batcher import Batcher, BatchRecord, Outputs
from portaisys.serve.ladder import Ladder, rungs_from
from portaisys.spec import Storage, UserError

logger = logging.getLogger(__name__)

PER_FILE = 1.2  # bytes in memory for one of the file
STUCK_S = 60.0  # an engine run longer than this is taken for hung: no admitted batch comes near it


@dataclass(frozen=True)
class Limits:
    """How a version is served. `max_batch`: None is what the version was verified up to; `precision`: None is the best that holds, and a
    more exact one when it does not any more; of `check_every` batches one is answered by the fp32 engine too (0: none); `instances`:
    batches that run at once, each on `threads` of its own (None: as many slots as the version was judged with).
    """

    max_batch: int | None = None
    max_delay_ms: float = 0.0
    max_queue: int = 1024
    threads: int = 1
    precision: str | None = None
    check_every: int = 100
    instances: int | None = None


class Observer(Protocol):
    """Who is told what requests cost, called on the loop."""

    def batch(self, record: BatchRecord) -> None:
        """One run of the engine."""
        ...

    def stage(self, name: str, seconds: float) -> None:
        """`decode` or `deliver` of one request that is not part of a batch's own record."""
        ...


class BlockedError(UserError):
    """A version that its gate did not pass."""


@dataclass
class Stats:
    """Exact sums since the start, added up once a batch; `reject` by whoever refuses."""

    batches: int = 0
    samples: int = 0
    requests: int = 0
    failed_requests: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    decode_s: float = 0.0
    queue_s: float = 0.0
    assembly_s: float = 0.0
    engine_s: float = 0.0
    deliver_s: float = 0.0
    # samples a batch -> (how often, seconds in the engine)
    by_size: dict[int, tuple[int, float]] = field(default_factory=dict)
    last: float = 0.0  # seconds since the epoch, of the last batch

    def batch(self, record: BatchRecord) -> None:
        """One run of the engine."""
        self.batches += 1
        self.samples += record.samples
        self.requests += record.requests
        self.failed_requests += record.requests * record.failed
        self.decode_s += record.decode_sum_s
        self.queue_s += record.queue_sum_s
        self.assembly_s += record.assembly_s
        self.engine_s += record.engine_s
        self.deliver_s += record.deliver_s
        count, seconds = self.by_size.get(record.samples, (0, 0.0))
        self.by_size[record.samples] = count + 1, seconds + record.engine_s
        self.last = time.time()

    def stage(self, name: str, seconds: float) -> None:
        """Decoding or delivering of one request."""
        if name == "decode":
            self.decode_s += seconds
        else:
            self.deliver_s += seconds

    def reject(self, reason: str) -> None:
        """A request that was not run, by a reason out of a short list."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1


@dataclass(eq=False)
class ServedModel:
    """A warm engine behind a batcher. `lineage`: where it came from and how it is served, for clients to read."""

    name: str
    version: str
    engine: Engine
    batcher: Batcher
    labels: Sequence[str]
    lineage: Mapping[str, Any]
    fallbacks: Sequence[str] = ()
    stats: Stats = field(default_factory=Stats)
    ladder: Ladder | None = None
    recall: Recall | None = None
    observers: Sequence[Observer] = ()
    file_bytes: Mapping[str, int] = field(default_factory=dict)  # precision -> of its ONNX file
    closed: bool = False

    @property
    def precision(self) -> str:
        """Of the engine that answers now."""
        return self.ladder.engine.precision if self.ladder else self.engine.precision

    @property
    def memory_bytes(self) -> int:
        """About what its engines take: what a GPU engine says of itself, else 1.2 times the file, which is also what TensorFlow Serving reckons with."""
        engines = self.ladder.open if self.ladder else {self.engine.precision: self.engine}
        return sum(
            getattr(engine, "memory_bytes", 0) or int(PER_FILE * self.file_bytes.get(precision, 0))
            for precision, engine in list(engines.items())
        )

    @property
    def stamp(self) -> str:
        """Which engine answers, for a header of every reply: NAME/VERSION PRECISION DIGEST."""
        return f"{self.name}/{self.version} {self.precision} {str(self.lineage.get('digest', ''))[:12]}"

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.engine.inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return self.engine.outputs

    @property
    def ready(self) -> bool:
        return not self.closed and self.batcher.busy_s() < STUCK_S

    def spent(self, stage: str, seconds: float) -> None:
        """Tell everybody of a stage of one request."""
        for observer in self.observers:
            observer.stage(stage, seconds)

    async def infer(self, feeds: Arrays) -> Outputs:
        """Outputs for a batch of inputs; raises what `Batcher.submit` raises."""
        return await self.batcher.submit(feeds)

    async def close(self) -> None:
        """Finish what is queued, then free the engine."""
        self.closed = True
        await self.batcher.close()
        (self.ladder or self.engine).close()


def open_reference(
    reference: str, storage: Storage, limits: Limits, observer: Observer | None = None, answers: Answers | None = None
) -> ServedModel:
    """Fetch "NAME@ALIAS" (from the local copy when the registry is down) and open it. `answers`: where those it gives are kept.

    Raises UserError for an unknown reference, a damaged copy, or when no admitted precision holds here.
    """
    fetched = fetch(reference, storage, storage.cache_dir)
    number = str(fetched.version.version)
    version = fetched.version
    if version.verdict != "pass":
        raise BlockedError(f"{version}: its verdict is {version.verdict!r} ({version.because}), so it is not served; name a version that passed (portaisys versions {version.name})")
    traced = {"run": version.run_id, "registry": "did not answer; this is what it last said" if fetched.note else "asked"}
    return open_version(
        fetched.path, number, cache_of(storage), limits, observer, answers, name=version.name, digest=version.digest, traced=traced
    )


@dataclass(frozen=True)
class Opened:
    """A version's best engine alone, for use without a server. `batch`: rows a call, AS_IS where the inputs share no batch; `golden`: its sample inputs."""

    version: Version
    engine: Engine
    batch: int
    files: Mapping[str, Path]
    about: Mapping[str, Any]
    golden: Arrays
    fallbacks: Sequence[str]


def open_engine(reference: str, storage: Storage, limits: Limits) -> Opened:
    """Fetch "NAME@VERSION" and open its best precision that holds here. Raises UserError as `open_reference` does."""
    fetched = fetch(reference, storage, storage.cache_dir)
    found = _verified(fetched.path, fetched.version.digest)
    about = json.loads(found.file("version.json").read_text())
    engine, fallbacks = _first_that_holds(found, about, cache_of(storage), limits)
    golden, _ = _samples(found, "golden.npz", engine)
    batch = verify.AS_IS if not about.get("batched", True) else max(_sizes(about))
    return Opened(fetched.version, engine, batch, {name: found.file(f"{name}.onnx") for name in about["precisions"]}, about, golden, fallbacks)


def open_version(
    folder: Path,
    number: str,
    cache: Cache,
    limits: Limits,
    observer: Observer | None = None,
    answers: Answers | None = None,
    *,
    name: str | None = None,
    digest: str | None = None,
    traced: Mapping[str, str] | None = None,
) -> ServedModel:
    """Open a version's folder, engines kept in `cache`; every file is hashed again. Blocks until the engine is warm. Raises UserError."""
    started = time.monotonic()
    found = _verified(folder, digest)
    about = json.loads(found.file("version.json").read_text())
    if not about.get("batched", True):
        raise UserError(f"{about['name']}: its inputs share no batch in dimension 0, so requests cannot be batched; use portaisys predict, or export it with one")
    max_batch = _max_batch(about, limits)
    engine, fallbacks = _first_that_holds(found, about, cache, limits)
    _warm(engine, found, [size for size in _sizes(about) if size <= max_batch])
    name, stats = name or about["name"], Stats()
    observers: list[Observer] = [stats, observer] if observer else [stats]
    ladder = _ladder(found, about, cache, limits, engine)
    recall = Recall(answers, lambda: f"{name}/{number} {found.digest} {ladder.engine.precision}") if answers else None
    batcher = Batcher(
        ladder.run, max_batch=max_batch, max_queue=limits.max_queue, max_delay_ms=limits.max_delay_ms, instances=_recalled(about, engine.precision, limits).slots,
        observe=lambda record: _tell(observers, record), memory=recall, pads=_pads(engine, found, about),
    )  # fmt: skip
    lineage = _lineage(found, about, number, {**asdict(limits), **_serving(engine), "max_batch": max_batch, "fallbacks": fallbacks}) | dict(traced or {})
    sizes = {precision: found.file(f"{precision}.onnx").stat().st_size for precision in about["precisions"]}
    logger.info("%s@%s: %s ready after %.2f s", name, number, engine.precision, time.monotonic() - started)
    return ServedModel(name, number, engine, batcher, tuple(about["labels"]), lineage, fallbacks, stats, ladder, recall, observers, sizes)


def _verified(folder: Path, digest: str | None) -> artifact.Artifact:
    found = artifact.read(folder, verify=True)
    if digest not in (None, found.digest):
        raise UserError(f"{folder}: digest {found.digest[:12]} where the registry says {str(digest)[:12]}; delete the folder and fetch it again")
    return found


def _tell(observers: Sequence[Observer], record: BatchRecord) -> None:
    for observer in observers:
        observer.batch(record)


def _max_batch(about: Mapping[str, Any], limits: Limits) -> int:
    verified: int = about["max_batch"]
    if limits.max_batch is not None and limits.max_batch > verified:
        raise UserError(f"max_batch {limits.max_batch}: the version was verified up to {verified}; take that, or export it with a larger export.max_batch")
    return limits.max_batch or verified


def _serving(engine: Engine) -> dict[str, str]:
    return {"backend": engine.backend, "precision": engine.precision, "device": engine.device}


def _lineage(found: artifact.Artifact, about: Mapping[str, Any], number: str, serving: Mapping[str, Any]) -> dict[str, Any]:
    admitted = {"precisions": about["precisions"], "verdicts": about["verdicts"]}
    return {"version": number, "digest": found.digest, "lineage": about["lineage"], **admitted, "serving": serving}


# --- which precision ----------------------------------------------------------------------------------------------


def _ladder(found: artifact.Artifact, about: Mapping[str, Any], cache: Cache, limits: Limits, engine: Engine) -> Ladder:
    """The rungs from this engine up; one alone where a precision was asked for by name."""

    def opener(precision: str) -> Engine:
        opened = _opened(found, about, cache, limits, precision)
        if problem := _problem(opened, found, about):
            opened.close()
            raise UserError(f"{precision}: {problem}")
        _warm(opened, found, _sizes(about))
        return opened

    rungs = [engine.precision] if limits.precision else rungs_from(engine.precision, about["precisions"])
    return Ladder(about["name"], rungs, engine, opener, every=limits.check_every)


def _opened(found: artifact.Artifact, about: Mapping[str, Any], cache: Cache, limits: Limits, precision: str) -> Engine:
    options = _recalled(about, precision, limits)
    return load(get_or_build(found.file(f"{precision}.onnx"), about["backends"][precision], options, cache), options)


def _recalled(about: Mapping[str, Any], precision: str, limits: Limits) -> Options:
    return recalled(about, precision, limits.threads, limits.instances)


def _first_that_holds(found: artifact.Artifact, about: Mapping[str, Any], cache: Cache, limits: Limits) -> tuple[Engine, list[str]]:
    """The best admitted precision that gives the golden answers here, and why each better one does not."""
    fallbacks: list[str] = []
    for precision in _candidates(about, limits):
        try:
            engine = _opened(found, about, cache, limits, precision)
        except UserError:
            # The cause may name paths; it is for the log, the reason is for everybody.
            logger.exception("%s cannot be built or loaded", precision)
            fallbacks.append(f"{precision}: cannot be built or loaded on this machine; the server's log has the cause")
            continue
        problem = _problem(engine, found, about)
        if not problem:
            _check_labels(found, about, engine)
            return engine, fallbacks
        engine.close()
        logger.warning("%s is not served: %s", precision, problem)
        fallbacks.append(f"{precision}: {problem}")
    raise UserError(f"no admitted precision holds on this machine: {'; '.join(fallbacks)}. Build and gate the version on a machine like this one")


def _candidates(about: Mapping[str, Any], limits: Limits) -> list[str]:
    admitted = list(about["precisions"])
    if limits.precision is None:
        return admitted
    if limits.precision not in admitted:
        raise UserError(f"precision {limits.precision!r}: the gate admitted {', '.join(admitted)}; take one of these or leave it out")
    return [limits.precision]


def _problem(engine: Engine, found: artifact.Artifact, about: Mapping[str, Any]) -> str:
    """Why this engine must not be served, empty when it may: golden answers in batches of every kind, decisions on the calibration rows."""
    feeds, answers = _samples(found, "golden.npz", engine)
    problem = verify.problem(engine, feeds, batches=_sizes(about), expected=answers, tolerance=about["tolerance"])
    if problem or not about["labels"]:
        return problem
    feeds, answers = _samples(found, "calibration.npz", engine)
    scores = answers[engine.outputs[0].name]
    agreed = verify.agreement(engine, feeds, scores, about["max_batch"])
    changed = round((1 - agreed) * len(scores))
    # One row in a hundred may be a tie that falls the other way on another CPU.
    return "" if changed <= max(1, len(scores) // 100) else f"{changed} of {len(scores)} decisions on the calibration rows differ from those that were judged"


def _pads(engine: Engine, found: artifact.Artifact, about: Mapping[str, Any]) -> dict[str, int]:
    """Inputs whose rows may be filled up to the longest of their batch, and with what: where a sample gets the same answer with its padding and without."""
    pads: dict[str, int] = about.get("pads", {})
    feeds, answers = _samples(found, "golden.npz", engine)
    least = about.get("min_batch", 1)
    for name, value in pads.items():
        for row in range(min(8, len(feeds[name]))):
            length = int((feeds[name][row] != value).nonzero()[0].max(initial=0)) + 1
            alone = {other: array[[row]] for other, array in feeds.items()} | {name: feeds[name][[row], :length]}
            expected = {output: array[[row]] for output, array in answers.items()}
            if problem := verify.problem(engine, alone, batches=[least], expected=expected, tolerance=about["tolerance"]):
                logger.warning("%s: rows of different lengths are not batched together, since padding changes answers: %s", about["name"], problem)
                return {}
    return pads


def _sizes(about: Mapping[str, Any]) -> list[int]:
    """Batch sizes to verify; of a fixed batch only that one, of none the samples as they are."""
    if not about.get("batched", True):
        return [verify.AS_IS]
    least = about.get("min_batch", 1)
    return sorted({max(least, size) for size in (1, 2, about["opt_batch"], about["max_batch"])})


def _samples(found: artifact.Artifact, file: str, engine: Engine) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Inputs by name, and what the engine of this precision answered where it was judged."""
    arrays = artifact.read_arrays(found.file(file))
    try:
        return {tensor.name: arrays[tensor.name] for tensor in engine.inputs}, {tensor.name: arrays[f"{tensor.name}_{engine.precision}"] for tensor in engine.outputs}
    except KeyError as error:
        raise UserError(f"{found.path / file}: holds no {error}; publish the version again") from None


def _check_labels(found: artifact.Artifact, about: Mapping[str, Any], engine: Engine) -> None:
    classes = engine.outputs[0].shape[-1] if engine.outputs[0].shape else -1
    if about["labels"] and len(about["labels"]) != classes:
        raise UserError(f"{found.path}: {len(about['labels'])} labels for {classes} classes; publish the version again")


def _warm(engine: Engine, found: artifact.Artifact, batches: Sequence[int]) -> None:
    """The first run of a batch size pays for memory and kernel choice; no client should."""
    feeds, _ = _samples(found, "golden.npz", engine)
    for batch in batches:
        engine.run({name: np.ascontiguousarray(array[np.arange(batch) % len(array)]) for name, array in feeds.items()})
