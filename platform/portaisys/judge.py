"""Builds the candidates' engines, scores them against the dense model on the same rows, and lets the gate decide.

A candidate is admissible when its answers are sound, its accuracy is non-inferior and, unless it is a plain fp32
fall-back, its engine is faster than what it would replace. The dense fp32 engine needs parity only. Verdicts hold
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
from portaisys.artifact import Artifact
from portaisys.data import Split
from portaisys.engine import TYPED, CannotExecute, Engine, Options, options_of, verify
from portaisys.engine.cache import Built, cache_of, get_or_build, load
from portaisys.gate import Decision
from portaisys.spec import Spec, UserError

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
class Row:
    """One line of the closing table. `status`: executed, or built where this machine cannot run it."""

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


@dataclass(frozen=True)
class Judgement:
    """All rows, the best admissible one first among `admitted`, and what each executed engine answered to the test rows."""

    rows: tuple[Row, ...]
    admitted: tuple[str, ...]
    answers: Mapping[str, NDArray[np.int64]]

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
    sizes = sorted({1, 2, spec.export.opt_batch, spec.export.max_batch})
    unsound = {name: verify.problem(engine, {engine.inputs[0].name: test.x[:VERIFIED_ROWS]}, batches=sizes, seed=spec.seed) for name, engine in engines.items()}
    references = {REFERENCE: dense} | ({COMPILED: compiled} if compiled else {})
    runs = references | {name: _run(engine) for name, engine in engines.items()}
    tell(f"scoring {len(runs)} engines on {len(test):,} test rows")
    logits = {name: evaluate.predict_rows(run, test.x, spec.export.max_batch) for name, run in runs.items()}
    tell(f"timing them at batch 1, {spec.gate.latency_pairs} interleaved rounds")
    one = np.ascontiguousarray(test.x[:1])
    calls: dict[str, Callable[[], object]] = {name: lambda run=run: run(one) for name, run in runs.items()}  # type: ignore[misc]
    ms = evaluate.latency(calls, spec.gate.latency_pairs, warmup=20, seed=spec.seed)
    for engine in engines.values():
        engine.close()

    judged = {name: _scored(_reference(name, size), logits, ms, test) for name in references}
    for subject in subjects:
        row = _scored(rows[subject.name], logits, ms, test)
        judged[subject.name] = _sound(_decided(spec, subject, row, judged, logits, ms, test, looks), unsound[subject.name])
    built = [_also_built(spec, subject, options, tell) for subject in also]
    return Judgement((*judged.values(), *built), _admitted(judged), {name: answer.argmax(1) for name, answer in logits.items()})


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


def _run(engine: Engine) -> Callable[[Logits], Logits]:
    name, output = engine.inputs[0].name, engine.outputs[0].name
    return lambda x: engine.run({name: x})[output]


def _scored(row: Row, logits: Mapping[str, Logits], ms: Mapping[str, Any], test: Split) -> Row:
    times = evaluate.summarize(ms[row.engine])
    return replace(
        row, accuracy=evaluate.accuracy(logits[row.engine], test.y), latency_ms_p50=times["latency_ms_p50"], latency_ms_p99=times["latency_ms_p99"]
    )


# --- verdicts ---------------------------------------------------------------------------------------------------


def _decided(
    spec: Spec, subject: Subject, row: Row, judged: Mapping[str, Row], logits: Mapping[str, Logits], ms: Mapping[str, Any], test: Split, looks: int
) -> Row:
    if subject.name == DENSE:
        parity = gate.parity_ok(evaluate.parity(logits[REFERENCE], logits[DENSE]), spec.export.tolerance)
        if parity.action != "pass":
            raise UserError(f"engine.backend: the dense fp32 engine of {row.backend} does not answer as torch does: {parity.because}; do not serve with it")
        return replace(row, verdicts={"parity": parity.to_dict()}, admissible=True, because=f"dense fp32 engine, {parity.because}")
    right = {name: evaluate.correct(logits[name], test.y) for name in (REFERENCE, subject.name)}
    verdicts = {"accuracy": gate.non_inferior(right[REFERENCE], right[subject.name], spec.gate.max_accuracy_drop, spec.gate.confidence, looks)}
    rival = _standing(subject, judged)
    verdicts["latency"] = gate.faster(ms[rival], ms[subject.name], spec.gate.confidence, spec.seed)
    admissible = all(verdict.action == "pass" for verdict in verdicts.values())
    because = "; ".join(_sentence(name, verdict, rival) for name, verdict in verdicts.items())
    return replace(row, verdicts={name: verdict.to_dict() for name, verdict in verdicts.items()}, admissible=admissible, because=because)


VERIFIED_ROWS = 32


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
    """answers.npz: the class each engine gave to each test row, so that a verdict can be reached again."""
    arrays = {name.replace(" ", "_"): answer.astype(np.int32) for name, answer in judgement.answers.items()}
    np.savez(path, y=test.y.astype(np.int32), **arrays)  # type: ignore[arg-type]
