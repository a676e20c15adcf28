"""What each stage does: parents' artifacts in, a filled folder out. Plain Python; knows no Ray, no order of stages and not who trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from portaisys import artifact, evaluate, models, spec, teachers
from portaisys.artifact import Artifact, Draft, write_arrays
from portaisys.compress.cast import with_islands
from portaisys.compress.prune import prune
from portaisys.compress.quantize import LEARNT, HeldOut, learnt, quantize
from portaisys.compress.sensitivity import error
from portaisys.compress.sparsify import sparsify
from portaisys.data import Splits
from portaisys.data.texts import PAD_ID
from portaisys.determinism import threads
from portaisys.engine import BACKENDS, Tensor, choose, options_of, remembered, verify
from portaisys.engine.cache import cache_of, get_or_build, load
from portaisys.engine.onnxruntime import reference
from portaisys.engine.torch import TorchEngine
from portaisys.export import INPUT, OUTPUT, export
from portaisys.fits import NOTES, padding_waste
from portaisys.judge import BASELINE, DENSE, Subject, judge, save_answers
from portaisys.spec import Spec, UserError
from portaisys.step import score
from portaisys.teachers import ANSWERS, TOKENIZER
from portaisys.weights import WEIGHTS, keep_section, restore, write_section


@dataclass(frozen=True)
class Job:
    """What a stage is given. `parents`: role -> artifact.

    `train()` has the stage's Fit carried out and returns the folder with the weights; `looks(candidates)` counts, in the ledger,
    who looked at the test split; `tell(text)` shows progress.
    """

    spec: Spec
    options: Mapping[str, Any]
    parents: Mapping[str, Artifact]
    splits: Splits
    train: Callable[[], Path]
    looks: Callable[[Sequence[str]], int]
    tell: Callable[[str], None]


# --- stages on models ------------------------------------------------------------------------------------------


def trained(job: Job, draft: Draft) -> None:
    """train, distill and qat: model.safetensors, with validation accuracy and size as scores; of qat also the ranges it learnt."""
    work = job.train()
    for name in (WEIGHTS, LEARNT):
        if (work / name).exists():
            shutil.copyfile(work / name, draft.path / name)
    draft.notes.extend(json.loads((work / NOTES).read_text()))
    if (section := job.options.get("student")) is not None:
        write_section(spec.model_of(section), draft.path)
    elif "student" in job.parents:
        keep_section(job.parents["student"], draft)
    _describe(restore(job.spec, job.splits, draft.path), job, draft)
    if job.splits.train.lengths is not None:
        draft.scores["padding_waste"] = padding_waste(job.spec.train, job.splits.train, job.spec.seed)


def pruned(job: Job, draft: Draft) -> None:
    """prune: the parent's model with fewer channels, heads or blocks; its notes list what could not be pruned."""
    model = restore(job.spec, job.splits, job.parents["student"].path)
    figures = prune(model, job.splits.shape, spec.Prune(**job.options), len(job.splits.labels), job.splits, job.spec.seed)
    models.save(model, draft.path / WEIGHTS)
    keep_section(job.parents["student"], draft)
    _describe(model, job, draft)
    draft.scores.update(figures)
    draft.notes.extend(f"compress.prune left as it was {layer}" for layer in figures["skipped"])


def sparsified(job: Job, draft: Draft) -> None:
    """sparsify: the parent's model with zeros in 2:4."""
    model = restore(job.spec, job.splits, job.parents["student"].path)
    figures = sparsify(model, spec.Sparsify(**job.options))
    models.save(model, draft.path / WEIGHTS)
    keep_section(job.parents["student"], draft)
    _describe(model, job, draft)
    draft.scores.update(figures)


def _describe(model: nn.Module, job: Job, draft: Draft) -> None:
    draft.scores.update(models.count(model, job.splits.shape))
    draft.scores["validation_accuracy"] = score(model, job.splits.validation)


def taught(job: Job, draft: Draft) -> None:
    """teacher: fp32.onnx of a version, or model.json and model.safetensors of a factory's model; its accuracy on the validation split as score."""
    teacher, validation = job.options["teacher"], job.splits.validation
    if not isinstance(teacher, str):
        model = teachers.made(teacher, job.splits)
        models.save(model, draft.path / WEIGHTS)
        write_section(teachers.section_of(teacher), draft.path)
        _describe(model, job, draft)
        return
    found = teachers.version(job.spec, teacher)
    teachers.refuse_other_classes(found, teacher, job.splits)
    shutil.copyfile(found.path / ANSWERS, draft.path / ANSWERS)
    draft.notes.extend([f"{teacher} is {found.version}", *([found.note] if found.note else [])])
    logits = evaluate.predict_rows(teachers.answering(job.spec, draft.path / ANSWERS), validation.x, job.spec.export.max_batch)
    draft.scores["validation_accuracy"] = evaluate.accuracy(logits, validation.y)


# --- stages on files --------------------------------------------------------------------------------------------


def exported(job: Job, draft: Draft) -> None:
    """export: model.onnx and golden.npz from calibration rows."""
    model = restore(job.spec, job.splits, job.parents["model"].path)
    rows = job.splits.calibration.x
    most_tokens = job.splits.shape[0] if job.splits.vocabulary else 0
    draft.scores.update(export(model, rows, job.spec.export, draft.path / "model.onnx", seed=job.spec.seed, most_tokens=most_tokens))
    draft.scores.update(models.count(model, job.splits.shape))


def quantized(job: Job, draft: Draft, precision: str = "int8") -> None:
    """quantize, quantize-fp8: model.onnx in int8 or fp8, calibrated on the calibration split or, after qat, with the ranges it learnt; searched on validation rows."""
    source, made = job.parents["model"].file("model.onnx"), draft.path / "model.onnx"
    scales, answers = learnt(job.parents["learnt"].file(LEARNT)) if "learnt" in job.parents else ({}, None)
    held_out = HeldOut(job.splits.validation.x, job.splits.validation.y)
    figures = quantize(source, made, job.splits.calibration.x, spec.Quantize(**job.options), precision, held_out=held_out, scales=scales, asked=job.spec.gate)
    if answers is not None and precision == "int8" and not figures.get("returned"):
        figures["error_to_trained"] = _held_to_training(made, job.splits.calibration.x, answers)
    draft.notes.extend(figures.pop("notes", []))
    draft.scores.update(figures)
    draft.scores.update({name: job.parents["model"].scores[name] for name in ("parameters", "macs")})


FURTHEST = 0.02  # of the int8 file from the converted torch model: 0.0004 to 0.01 were seen


def _held_to_training(file: Path, rows: Any, answers: Any) -> float:
    """How far what an int8 file says is from the integer model that training ended with. Raises UserError when too far: it would not be what was trained."""
    found = reference(file, {INPUT: rows[: len(answers)]}, 0)[OUTPUT]
    off = error(answers, found)
    if off > FURTHEST:
        raise UserError(f"compress.quantize.method: the int8 file differs from what qat trained by {off:.2g} of the answers (bound {FURTHEST:g}), so it is another model; take method: ptq")
    return off


CAST_ROWS = 4  # to find fp32 islands with, in an evaluator that is exact and slow


def converted(job: Job, draft: Draft) -> None:
    """cast: model.onnx whose types are fp16 or bf16 (between Q and DQ as they were), fp32 islands where the answers need them."""
    precision, model = job.options["precision"], job.parents["model"]
    bound = verify.TOLERANCE[job.options["judged_as"]]
    made = with_islands(model.file("model.onnx"), draft.path / "model.onnx", precision, {INPUT: job.splits.calibration.x[:CAST_ROWS]}, bound)
    draft.notes.extend(made.notes)
    draft.scores.update(asdict(made), **{name: model.scores[name] for name in ("parameters", "macs")})


# --- judging and packing ------------------------------------------------------------------------------------------


# Rounding of the same weights: judged on the model that fp32 is, in other types where a backend wants them (roles "typed-...").
ARITHMETIC = ("tf32", "bf16", "fp16")


def subjects(parents: Mapping[str, Artifact], backends: Mapping[str, str]) -> list[Subject]:
    """The candidates among the exported artifacts, plainest first; each must be faster than the fp32 one it would replace. `backends`: of each precision."""
    smallest, fp32 = ("small", "small fp32") if "small" in parents else ("dense", DENSE)
    rounded = [(smallest, name, name, fp32) for name in ARITHMETIC]
    table = [("dense", DENSE, "fp32", None), ("small", "small fp32", "fp32", DENSE), *rounded, ("int8", "int8", "int8", fp32), ("fp8", "fp8", "fp8", fp32)]
    return [
        Subject(name, precision, parents[role], rival, backends[precision], parents.get(f"typed-{precision}"))
        for role, name, precision, rival in table
        if role in parents and precision in backends
    ]


def _on(backend: str, precisions: Sequence[str]) -> dict[str, str]:
    """`backends` of `subjects` for one backend: of these precisions those it has."""
    return {precision: backend for precision in precisions if precision in spec.BACKEND_PRECISIONS[backend]}


def chosen(job: Job, draft: Draft) -> None:
    """choose: choice.json, the fastest backend of each precision here; the table they were picked from as scores."""
    options, export = job.spec.engine, job.spec.export
    asked = ("fp32", *job.spec.precisions)
    # Of two fp32 ones the small.
    files = {(name, subject.precision): subject.file for name in BACKENDS for subject in subjects(job.parents, dict.fromkeys(asked, name))}
    settings = options_of(options, export, job.spec.dims)
    batches = sorted({1, export.opt_batch, export.max_batch})
    cache = cache_of(job.spec.storage)
    table = choose.measure(files, {INPUT: job.splits.calibration.x}, settings, cache, batches=batches, rounds=CHOICE_ROUNDS, seed=job.spec.seed, tell=job.tell)
    best, because = choose.pick(table, options.objective, options.p99_limit_ms)
    backends = {precision: line.backend for precision, line in choose.pick_each(table, options.objective, options.p99_limit_ms).items()}
    if "fp32" not in backends:
        raise UserError(f"engine.backend: no fp32 engine is sound on this machine: {'; '.join(f'{line.backend}: {line.because}' for line in table if line.precision == 'fp32')}")
    # In the digest is what was chosen, not its milliseconds: the same choice makes the same version.
    (draft.path / "choice.json").write_text(json.dumps({"backends": backends}, sort_keys=True))
    draft.scores.update(table=[asdict(line) for line in table], backend=best.backend, precision=best.precision, because=because)
    draft.notes.append(f"{best.backend} {best.precision}: {because}")
    draft.notes.extend(f"{precision}: no engine of it is sound on this machine, so it was not judged" for precision in asked if precision not in backends)


CHOICE_ROUNDS = 50


def _backends(job: Job) -> dict[str, str]:
    """The backend of each precision: what the spec says, or `auto` came to."""
    if "choice" in job.parents:
        found: dict[str, str] = json.loads(job.parents["choice"].file("choice.json").read_text())["backends"]
        return found
    return _on(job.spec.engine.backend, ("fp32", *job.spec.precisions))


def judged(job: Job, draft: Draft) -> None:
    """judge: answers.npz, and the table with its verdicts as scores."""
    candidates = subjects(job.parents, _backends(job))
    asked = ("fp32", *job.spec.precisions)
    also = [subject for name in job.spec.engine.also_build if name != "torch" for subject in subjects(job.parents, _on(name, asked))]
    dense = restore(job.spec, job.splits, job.parents["reference"].path)
    size = models.count(dense, job.splits.shape) | {"size_bytes": job.parents["reference"].file(WEIGHTS).stat().st_size}
    # Counted before anyone looks: a run that dies in between has looked all the same.
    looks = job.looks([subject.artifact.digest + (f" {subject.precision}" if subject.precision in ARITHMETIC else "") for subject in candidates])
    with threads(job.spec.engine.threads):
        compiled = _compiled(dense, job.splits) if "torch" in job.spec.engine.also_build else None
        judgement = judge(job.spec, candidates, models.predictor(dense), size, job.splits.test, looks=looks, also=also, compiled=compiled, tell=job.tell)
    save_answers(draft.path / "answers.npz", judgement, job.splits.test)
    # In the digest, unlike the scores: another choice makes another version, the same choice at other milliseconds does not.
    (draft.path / "admitted.json").write_text(json.dumps(judgement.admitted))
    draft.scores.update(judgement.to_dict(), looks=looks)
    draft.notes.extend(f"{row.engine} on {row.backend}: {note}" for row in judgement.rows for note in row.notes)


def _compiled(model: nn.Module, splits: Splits) -> Callable[[Any], Any]:
    """The model through torch.compile as a function of rows."""
    face = Tensor(INPUT, "float32", (-1, *splits.shape)), Tensor(OUTPUT, "float32", (-1, len(splits.labels)))
    engine = TorchEngine(model, face[:1], face[1:], compiled=True)
    return lambda x: engine.run({INPUT: x})[OUTPUT]


def packed(job: Job, draft: Draft) -> None:
    """version: what serving needs, for the best admissible engine and the fp32 one it falls back to."""
    verdict = job.parents["judge"].scores
    by_name = {subject.name: subject for subject in subjects(job.parents, _backends(job))}
    best: dict[str, Subject] = {}
    for name in verdict["admitted"]:
        best.setdefault(by_name[name].precision, by_name[name])
    rows, golden = job.splits.calibration.x, job.spec.export.golden_rows
    answers = {}
    for precision, subject in best.items():
        shutil.copyfile(subject.file, draft.path / f"{precision}.onnx")
        answers[f"{OUTPUT}_{precision}"] = _answers(job.spec, subject, rows)
    write_arrays(draft.path / "golden.npz", {INPUT: rows[:golden]} | {name: logits[:golden] for name, logits in answers.items()})
    write_arrays(draft.path / "calibration.npz", {INPUT: rows, "y": job.splits.calibration.y, **answers})
    # What an audit holds the engines against where the dense model is gone.
    shutil.copyfile(job.parents["judge"].file(BASELINE), draft.path / BASELINE)
    about = {
        "name": job.spec.name, "labels": list(job.splits.labels), "backends": {precision: subject.backend for precision, subject in best.items()}, "precisions": list(best),
        "engines": {precision: subject.name for precision, subject in best.items()}, "opt_batch": job.spec.export.opt_batch,
        "max_batch": job.spec.export.max_batch, "tolerance": job.spec.export.tolerance, "threads": job.spec.engine.threads, "verdicts": verdict["rows"],
        "options": remembered(options_of(job.spec.engine, job.spec.export)), **({"dims": job.spec.dims} if job.spec.dims else {}),
        "looks": verdict["looks"],
        "lineage": {"data": job.splits.digest, "test": job.splits.test_digest, "baseline": artifact.hash_file(draft.path / BASELINE)} | {role: parent.digest for role, parent in job.parents.items()},
    }  # fmt: skip
    if job.splits.tokenizer:
        (draft.path / TOKENIZER).write_text(job.splits.tokenizer)  # how a client's text becomes the ids that the engine takes
        about["pads"] = {INPUT: PAD_ID}
    (draft.path / "version.json").write_text(json.dumps(about, indent=1, sort_keys=True))
    served = next(row for row in verdict["rows"] if row["engine"] == verdict["admitted"][0])
    draft.scores.update({name: served[name] for name in ("parameters", "macs", "size_bytes", "accuracy")}, admitted=verdict["admitted"])


def _answers(options: Spec, subject: Subject, rows: Any) -> Any:
    settings = replace(options_of(options.engine, options.export, options.dims), precision=subject.precision)
    engine = load(get_or_build(subject.file, subject.backend, settings, cache_of(options.storage)), settings)
    answers = evaluate.predict_rows(lambda x: engine.run({INPUT: x})[OUTPUT], rows, options.export.max_batch)
    engine.close()
    return answers


STAGES: dict[str, Callable[[Job, Draft], None]] = {
    "train": trained,
    "prune": pruned,
    "sparsify": sparsified,
    "distill": trained,
    "teacher": taught,
    "qat": trained,
    "export": exported,
    "quantize": quantized,
    "quantize-fp8": partial(quantized, precision="fp8"),
    "cast": converted,
    "choose": chosen,
    "judge": judged,
    "version": packed,
}
