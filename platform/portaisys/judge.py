"""Builds the candidates' engines, scores them against the dense model on the same rows, and lets the gate decide.

A candidate is admissible when its answers are sound, its accuracy (and where the spec asks, the recall of every class)
is non-inferior and, unless it is a plain fp32 fall-back, its engine is faster than what it would replace. The dense fp32 engine needs parity only. Verdicts hold
for one (backend, precision, device) each. Knows nothing of training, of the registry or of who asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys import evaluate, gate
from portaisys.artifact import Artifact, read_arrays, write_arrays
from portaisys.data import Split
from portaisys.engine import TYPED, CannotExecute, Engine, Options, options_of, verify
from portaisys.engine.cache import Built, cache_of, get_or_build, load
from portaisys.gate import Decision
from portaisys.spec import Gate, Spec, UserError

Logits = NDArray[np.float32]
REFERENCE = "dense torch"
COMPILED = "dense torch.compile"
DENSE = "dense fp32"


@dataclass(frozen=True)
class Subject:
    """What is judged: an exported model at a precision on a backend. `rival`: the row it must be faster than, or None.

    `typed`: the model in the types of the precision, for backends that take it from them.
    """

    name: str
    precision: str
    artifact: Artifact
    rival: str | None
    backend: str
    typed: Artifact | None = None

    @property
    def file(self) -> Path:
        """The ONNX file that this backend builds from."""
        return (self.typed if self.typed and self.backend in TYPED else self.artifact).file("model.onnx")


@dataclass(frozen=True)
class Baseline:
    """What the dense torch model says of the test rows. `answers`: int64 [n], -1 for none; `logits`: of the first of them, [m, classes]."""

    answers: NDArray[np.int64]
    logits: Logits


@dataclass(frozen=True)
class Row:
    """One line of the closing table. `status`: executed, or built where this machine cannot run it.

    Of `test_rows`: `macro_f1`; `recall` by label (None: no row of it); `rows_not_finite`; `max_abs` (logits; None where not finite) and `agreement` with the
    dense torch model; `macro_f1_drop` against it with its bootstrap interval. Gated of these: recall, where the spec says so, and finite answers.
    """

    engine: str
    backend: str
    precision: str
    device: str
    status: str
    parameters: int
    macs: int
    size_bytes: int
    accuracy: float | None = None
    latency_ms_p50: float | None = None
    latency_ms_p99: float | None = None
    verdicts: Mapping[str, Any] | None = None
    admissible: bool = False
    because: str = ""
    reused: bool = False
    notes: tuple[str, ...] = ()
    test_rows: int | None = None
    macro_f1: float | None = None
    recall: Mapping[str, float | None] | None = None
    rows_not_finite: int | None = None
    max_abs: float | None = None
    agreement: float | None = None
    macro_f1_drop: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Judgement:
    """All rows, the best admissible one first among `admitted`, what each executed engine answered to the test rows (-1: nothing), and the baseline they were held against."""

    rows: tuple[Row, ...]
    admitted: tuple[str, ...]
    answers: Mapping[str, NDArray[np.int64]]
    baseline: Baseline

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, without the answers."""
        return {"rows": [asdict(row) for row in self.rows], "admitted": list(self.admitted)}


def judge(
    spec: Spec, subjects: Sequence[Subject], dense: Callable[[Logits], Logits], size: Mapping[str, int], test: Split, *, looks: int,
    also: Sequence[Subject] = (), compiled: Callable[[Logits], Logits] | None = None, tell: Callable[[str], None] = lambda text: None,
) -> Judgement:  # fmt: skip
    """Judge `subjects` (dense fp32 first) against the dense torch model `dense`, a function of rows; `also` are built and not judged.

    `compiled`: the same through torch.compile, timed beside it. `size`: its parameters, macs and size_bytes. `looks`: how many candidates have looked at this test split, these included.
    Raises UserError when the dense engine itself is wrong.
    """
    options = options_of(spec.engine, spec.export, spec.dims)
    engines, rows = _engines(spec, subjects, options, tell)
    rows_verified = np.ascontiguousarray(test.x[:VERIFIED_ROWS])
    unsound = {name: unsound_at(engine, rows_verified, spec) for name, engine in engines.items()}
    references = {REFERENCE: dense} | ({COMPILED: compiled} if compiled else {})
    runs = references | {name: run_of(engine) for name, engine in engines.items()}
    tell(f"scoring {len(runs)} engines on {len(test):,} test rows")
    logits = {name: evaluate.predict_rows(run, test.x, spec.export.max_batch) for name, run in runs.items()}
    tell(f"timing them at batch 1, {spec.gate.latency_pairs} interleaved rounds")
    ms = timed(runs, test.x[:1], spec)
    for engine in engines.values():
        engine.close()

    baseline, y = Baseline(evaluate.answered(logits[REFERENCE]), logits[REFERENCE]), test.y
    judged = {name: _scored(_reference(name, size), logits[name], ms[name], baseline, test, y, spec) for name in references}
    for subject in subjects:
        row = _scored(rows[subject.name], logits[subject.name], ms[subject.name], baseline, test, y, spec)
        found = quality(spec.gate, spec.export.tolerance, subject.name, logits[subject.name], baseline, y, test.table.labels, looks)
        judged[subject.name] = _sound(_decided(spec, subject, row, judged, found, ms), unsound[subject.name])
    built = [_also_built(spec, subject, options, tell) for subject in also]
    return Judgement((*judged.values(), *built), _admitted(judged), {name: evaluate.answered(answer) for name, answer in logits.items()}, baseline)


def _engines(spec: Spec, subjects: Sequence[Subject], options: Options, tell: Callable[[str], None]) -> tuple[dict[str, Engine], dict[str, Row]]:
    engines, rows = {}, {}
    for subject in subjects:
        built = _build(spec, subject, options, tell)
        engines[subject.name] = load(built, replace(options, precision=subject.precision))
        rows[subject.name] = _row(subject, built, "executed")
    return engines, rows


def _build(spec: Spec, subject: Subject, options: Options, tell: Callable[[str], None]) -> Built:
    tell(f"building {subject.name} with {subject.backend}")
    return get_or_build(subject.file, subject.backend, replace(options, precision=subject.precision), cache_of(spec.storage))


def _row(subject: Subject, built: Built, status: str) -> Row:
    scores = subject.artifact.scores
    return Row(
        subject.name, built.backend, subject.precision, built.device, status, scores["parameters"], scores["macs"],
        built.path.stat().st_size, reused=built.reused, notes=built.notes,
    )  # fmt: skip


def _reference(name: str, size: Mapping[str, int]) -> Row:
    return Row(name, "torch", "fp32", "cpu", "executed", size["parameters"], size["macs"], size["size_bytes"], because="the reference; not served" if name == REFERENCE else "timed beside the reference; not served")


def run_of(engine: Engine) -> Callable[[Logits], Logits]:
    """An engine as a function of rows."""
    name, output = engine.inputs[0].name, engine.outputs[0].name
    return lambda x: engine.run({name: x})[output]


def timed(runs: Mapping[str, Callable[[Logits], Logits]], row: Logits, spec: Spec) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each at batch 1, [gate.latency_pairs], interleaved."""
    one = np.ascontiguousarray(row)
    calls: dict[str, Callable[[], object]] = {name: lambda run=run: run(one) for name, run in runs.items()}  # type: ignore[misc]
    return evaluate.latency(calls, spec.gate.latency_pairs, warmup=20, seed=spec.seed)


def _scored(row: Row, logits: Logits, ms: NDArray[np.float64], baseline: Baseline, test: Split, y: NDArray[np.int64], spec: Spec) -> Row:
    times, labels = evaluate.summarize(ms), test.table.labels
    answers = evaluate.answered(logits)
    recall = evaluate.class_recall(logits, y, len(labels))
    parity = evaluate.parity(baseline.logits, logits)
    return replace(
        row, accuracy=evaluate.accuracy(logits, y), latency_ms_p50=times["latency_ms_p50"], latency_ms_p99=times["latency_ms_p99"], test_rows=len(y),
        macro_f1=evaluate.macro_f1(answers, y, len(labels)), recall={label: None if np.isnan(share) else float(share) for label, share in zip(labels, recall, strict=True)},
        rows_not_finite=evaluate.rows_not_finite(logits), max_abs=parity.max_abs if parity.finite else None, agreement=parity.argmax_agreement,
        macro_f1_drop=None if row.engine == REFERENCE else gate.macro_f1_drop(y, baseline.answers, answers, len(labels), spec.gate.confidence, spec.seed),
    )  # fmt: skip


# --- verdicts ---------------------------------------------------------------------------------------------------


def quality(
    options: Gate, tolerance: float, engine: str, logits: Logits, baseline: Baseline, y: NDArray[np.int64], labels: Sequence[str], looks: int
) -> dict[str, Decision]:
    """What the answers of an engine are worth against the baseline's, by name of the verdict: all but speed. `tolerance`: in logits, of the dense fp32 engine.

    An `audit` asks the same again.
    """
    verdicts = {}
    if engine == DENSE:
        verdicts["parity"] = gate.parity_ok(evaluate.parity(baseline.logits, logits[: len(baseline.logits)]), tolerance)
    else:
        right = baseline.answers == y, evaluate.correct(logits, y)
        verdicts["accuracy"] = gate.non_inferior(*right, options.max_accuracy_drop, options.confidence, looks)
        if options.max_class_recall_drop is not None:
            verdicts["class recall"] = gate.classes_non_inferior(y, *right, labels, options.max_class_recall_drop, options.confidence, looks)
    if odd := evaluate.rows_not_finite(logits):
        verdicts["finite"] = Decision("fail", f"NaN or infinity in the answers to {odd:,} of {len(y):,} test rows", {"rows_not_finite": odd})
    return verdicts


def _decided(spec: Spec, subject: Subject, row: Row, judged: Mapping[str, Row], verdicts: dict[str, Decision], ms: Mapping[str, Any]) -> Row:
    if subject.name == DENSE:
        parity = verdicts["parity"]
        if parity.action != "pass":
            raise UserError(f"engine.backend: the dense fp32 engine of {row.backend} does not answer as torch does: {parity.because}; do not serve with it")
        return replace(row, verdicts={"parity": parity.to_dict()}, admissible=True, because=f"dense fp32 engine, {parity.because}")
    rival = _standing(subject, judged)
    verdicts = {**verdicts, "latency": gate.faster(ms[rival], ms[subject.name], spec.gate.confidence, spec.seed)}
    admissible = all(verdict.action == "pass" for verdict in verdicts.values())
    because = "; ".join(_sentence(name, verdict, rival) for name, verdict in verdicts.items())
    return replace(row, verdicts={name: verdict.to_dict() for name, verdict in verdicts.items()}, admissible=admissible, because=because)


VERIFIED_ROWS = 32
EVERY_BATCH = 64  # up to here every size is tried once: an engine that is wrong at batch 7 alone is wrong


def unsound_at(engine: Engine, rows: Logits, spec: Spec) -> str:
    """What is wrong with an engine whatever its accuracy, empty when nothing is. `rows`: some of the data."""
    feeds, sizes = {engine.inputs[0].name: rows}, sorted({1, 2, spec.export.opt_batch, spec.export.max_batch})
    return verify.problem(engine, feeds, batches=sizes, seed=spec.seed) or verify.problem(
        engine, feeds, batches=range(1, min(EVERY_BATCH, spec.export.max_batch) + 1), seed=spec.seed, draws=1
    )


def _sound(row: Row, problem: str) -> Row:
    """The row as it is, or inadmissible with what is wrong with its engine, however accurate and fast it was. Raises UserError for the dense one."""
    if not problem:
        return row
    if row.engine == DENSE:
        raise UserError(f"engine.backend: the dense fp32 engine of {row.backend} is unsound: {problem}; do not serve with it")
    verdict = Decision("fail", problem, {})
    return replace(row, verdicts={**(row.verdicts or {}), "soundness": verdict.to_dict()}, admissible=False, because=f"{_sentence('soundness', verdict, '')}; {row.because}")


def _standing(subject: Subject, judged: Mapping[str, Row]) -> str:
    """The row to beat: its rival, or the dense engine when the rival was not admitted itself."""
    return subject.rival if subject.rival and judged[subject.rival].admissible else DENSE


def _sentence(name: str, verdict: Decision, rival: str) -> str:
    return f"{name} {verdict.action}: {verdict.because}" + (f", against {rival}" if name == "latency" else "")


def _admitted(judged: Mapping[str, Row]) -> tuple[str, ...]:
    """Names of the admissible rows, fastest first."""
    left = [gate.Candidate(row.engine, row.admissible, row.latency_ms_p50 or 0.0, row.because) for row in judged.values() if row.admissible]
    order = []
    while left:
        best = gate.choose(left)
        order.append(best.name)
        left.remove(best)
    return tuple(order)


def _also_built(spec: Spec, subject: Subject, options: Options, tell: Callable[[str], None]) -> Row:
    """An engine of a backend that is built only; loaded, unjudged, where the device is there."""
    built = _build(spec, subject, options, tell)
    try:
        load(built, replace(options, precision=subject.precision)).close()
        status, because = "executed", "loaded and closed; not judged: engine.backend is another"
    except CannotExecute as reason:
        status, because = "built", str(reason)
    return replace(_row(subject, built, status), because=because)


def save_answers(path: Path, judgement: Judgement, test: Split) -> None:
    """answers.npz: the class each engine gave to each test row (-1: none), and in baseline.npz what `baseline_of` reads: so that a verdict can be reached again."""
    arrays = {name.replace(" ", "_"): answer.astype(np.int32) for name, answer in judgement.answers.items()}
    np.savez(path, y=test.y.astype(np.int32), **arrays)  # type: ignore[arg-type]
    kept = judgement.baseline
    write_arrays(path.with_name(BASELINE), {"answers": kept.answers.astype(np.int32), "logits": kept.logits[:BASELINE_ROWS]})


BASELINE, BASELINE_ROWS = "baseline.npz", 64  # of all test rows the answer, of the first few the logits


def baseline_of(path: Path) -> Baseline:
    """What baseline.npz holds."""
    arrays = read_arrays(path)
    return Baseline(arrays["answers"].astype(np.int64), arrays["logits"])
