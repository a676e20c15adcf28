"""What each stage does: parents' artifacts in, a filled folder out. Plain Python; knows no Ray and no order of stages.

Stages that train describe their work as a `Fit` (plain data), so that it can be carried out in this process or by
a group of workers elsewhere: `carry_out` is the same function in both.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from portaisys import artifact, checkpoint, data, evaluate, memory, metrics, models, spec, teachers
from portaisys.artifact import Artifact, Draft, write_arrays
from portaisys.compress.cast import with_islands
from portaisys.compress.distill import Distillation, Pairs, Pupil, Teach, answered_by, distillation, inherit, paired, projections, shown_by
from portaisys.compress.prune import prune
from portaisys.compress.quantize import LEARNT, HeldOut, learnt, quantize
from portaisys.compress.sensitivity import error
from portaisys.compress.sparsify import keep_zeros, sparsify
from portaisys.data import Split, Splits
from portaisys.data.batches import cut, token_budget, waste
from portaisys.data.texts import PAD_ID
from portaisys.determinism import determined, threads
from portaisys.distributed import Place
from portaisys.engine import BACKENDS, Tensor, choose, options_of, remembered, verify
from portaisys.engine.cache import cache_of, get_or_build, load
from portaisys.engine.onnxruntime import reference
from portaisys.engine.torch import TorchEngine
from portaisys.export import INPUT, OUTPUT, export
from portaisys.judge import BASELINE, DENSE, Subject, judge, save_answers
from portaisys.microbatch import find_micro_batch, least_of_ranks, memory_limit
from portaisys.progress import Progress, Row, traced, use_of
from portaisys.rows import shares_of_all, shuffled
from portaisys.spec import Distill, Spec, Train, UserError
from portaisys.step import Loss, make_optimizer, score
from portaisys.teachers import ANSWERS, TOKENIZER
from portaisys.train import Mark, Report, fit

WEIGHTS, NOTES = "model.safetensors", "notes.json"
MODEL = "model.json"  # the model section of weights that are not of the run's own
NOTED, RESTARTS = "notes.jsonl", "restarts.jsonl"  # of all attempts at a training, by those who train and by who restarts them


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """One training job as plain data. `parents`: role -> folder of the artifact that holds its weights.

    `key` is the digest of `about`, which holds it in readable fields. `work`: the folder of the checkpoints and, in the end, of the
    trained weights and the notes of the training; `remote`: the same beyond this machine.
    """

    spec: Mapping[str, Any]
    kind: str
    options: Mapping[str, Any]
    parents: Mapping[str, str]
    key: str
    about: Mapping[str, Any]
    work: str
    log: str
    remote: str = ""


@dataclass(frozen=True)
class Job:
    """What a stage is given. `parents`: role -> artifact.

    `train()` has a Fit carried out and returns the folder with the weights; `looks(candidates)` counts, in the ledger,
    who looked at the test split; `tell(text)` shows progress.
    """

    spec: Spec
    kind: str
    key: str
    options: Mapping[str, Any]
    parents: Mapping[str, Artifact]
    splits: Splits
    train: Callable[[], Path]
    looks: Callable[[Sequence[str]], int]
    tell: Callable[[str], None]


def fresh(options: Spec, splits: Splits) -> nn.Module:
    """The model of a spec with its first weights, the same on every machine and rank."""
    torch.manual_seed(options.seed)
    return models.build(options.model, splits.shape, len(splits.labels), splits.mean, splits.std, splits.vocabulary)


def restore(options: Spec, splits: Splits, folder: Path) -> nn.Module:
    """The model of a finished stage, pruned or not, of the run's section or of the one that lies beside it."""
    if (folder / MODEL).exists():
        options = _with_model(options, spec.model_of(json.loads((folder / MODEL).read_text())))
    model = fresh(options, splits)
    models.rebuild(model, models.load_weights(folder / WEIGHTS))
    return model.eval()


def _with_model(options: Spec, section: spec.Model) -> Spec:
    return options.model_copy(update={"model": section})


def _write_section(section: spec.Model, folder: Path) -> None:
    (folder / MODEL).write_text(json.dumps(section.model_dump(mode="json"), sort_keys=True))


def keep_section(parent: Artifact, draft: Draft) -> None:
    """What is made of a model of another section than the run's is one too."""
    if MODEL in parent.files:
        shutil.copyfile(parent.file(MODEL), draft.path / MODEL)


# --- stages that train ------------------------------------------------------------------------------------------


def carry_out(
    job: Fit, place: Place, report: Report, between: Callable[[Row], None] | None = None, leave: Callable[[], bool] = lambda: False,
    mark: Mark = lambda step, doing: None, began: Sequence[str] = (),
) -> None:  # fmt: skip
    """Train as `job` says; rank 0 leaves the weights in `job.work`, and what was chosen or fell back in its notes, those of attempts before included.

    `between`: gets rows between reports; `leave` and `mark` as in `fit`; `began`: notes of how this attempt began.
    """
    options = spec.parse(job.spec)
    splits = data.load(options.data)
    training = FITS[job.kind](job, options, splits, place.device)
    model, train = training.model, training.options
    noted = Path(job.work) / NOTED
    writes = place.rank == 0 and not checkpoint.foreign(noted.parent, job.key)  # which `fit` refuses, and nothing there may change
    note = partial(_note, noted, job.key) if writes else _log.warning
    if writes:
        metrics.append(noted, {"key": job.key, "from": checkpoint.steps(noted.parent), "world": place.world})
    for text in (*began, *training.notes):
        note(text)
    with determined(train.determinism, note), memory.kept(place.device):  # not around a model's first try on the CPU, which says nothing of the device
        train = _with_micro_batch(options, splits, train, place, checkpoint.state(Path(job.work)), note)
        with traced(trace_file(job.log), train.profile_steps if place.rank == 0 else 0, note) as stepped:
            made = fit(
                model, splits.train, train, folder=Path(job.work), key=job.key, about=job.about, seed=options.seed, validation=splits.validation,
                loss=training.loss, prepare=training.prepare, begin=training.begin, **batches(train, splits.train, options.seed), report=report, note=note, progress=_progress(model, options, splits, train, place, between, stepped),
                leave=leave, mark=mark, place=place,
            )  # fmt: skip
    if place.rank == 0:
        artifact.write_text(Path(job.work) / NOTES, json.dumps(kept_notes(noted, job.key)))
        models.save(training.saved(made), Path(job.work) / WEIGHTS)


def trace_file(log: str | Path) -> Path:
    """Where the trace of a training stands: beside its step log."""
    return Path(log).with_suffix(".trace.json.gz")


def _progress(model: nn.Module, options: Spec, splits: Splits, train: Train, place: Place, between: Callable[[Row], None] | None, stepped: Callable[[], None]) -> Progress:
    """Texts are reckoned by their mean length: what is padding is no use of the device."""
    lengths = splits.train.lengths
    shape = splits.shape if lengths is None else (max(1, round(float(lengths.mean()))),)
    fixed = {} if lengths is None or place.rank else {"padding_waste": _waste(train, splits.train, options.seed)}
    return Progress(between, fixed=fixed, use=use_of(model, shape, place.device, place.world), stepped=stepped)


def batches(options: Train, rows: Split, seed: int) -> dict[str, Any]:
    """What `fit` is given for `train.tokens_per_batch`: a plan and how a worker cuts it; nothing without. Raises UserError where it does not suit the data."""
    if options.tokens_per_batch is None:
        return {}
    if rows.lengths is None:
        raise UserError("train.tokens_per_batch: all rows of this data have one shape, so there is no padding to save; leave it out and set train.batch_size")
    return {"batches": token_budget(rows.lengths, options.tokens_per_batch, seed), "cut": cut(rows.lengths, options.tokens_per_batch)}


def _with_micro_batch(options: Spec, splits: Splits, train: Train, place: Place, left: Mapping[str, Any], note: Callable[[str], None]) -> Train:
    """`train.micro_batch: auto` made a number, the same on every rank: found once, and again where a run goes on (`left`: from what) with other workers."""
    if train.micro_batch != "auto":
        return train
    before = left.get("settled", {}).get("micro_batch") or 0
    if least_of_ranks(before if left.get("world") == place.world else 0, place.device):
        return train.model_copy(update={"micro_batch": before})
    if before:
        note(f"train.micro_batch: auto was {before} rows with {left.get('world')} workers; there are {place.world} now, so it is searched again")
    most = -(-train.batch_size // place.world)
    # Every rank may stand on this machine; a card is one rank's alone.
    limit = memory_limit(1 if place.device.startswith("cuda") else place.world, place.device)
    attempt = partial(try_step, options, splits.shape, len(splits.labels), splits.vocabulary, place.device)
    found = find_micro_batch(attempt, most, limit_bytes=limit, device=place.device, agree=partial(least_of_ranks, device=place.device))
    note(f"train.micro_batch: auto is {found} rows, of {most} that a worker has in a step; {limit / 2**20:,.0f} MiB were there")
    return train.model_copy(update={"micro_batch": found})


def try_step(options: Spec, shape: Sequence[int], classes: int, vocabulary: int, device: str, rows: int) -> None:
    """Both passes and an update of the model of a spec, on rows of zeros; texts are as long as there may be."""
    model = models.build(options.model, shape, classes, vocabulary=vocabulary).to(device)
    optimizer = make_optimizer(model, options.train)
    x = models.example(model, shape, rows).to(device)
    for _ in range(2):  # the first update makes the optimizer's state, beside which the second pass must have room
        torch.nn.functional.cross_entropy(model(x), torch.zeros(rows, dtype=torch.int64, device=device)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _note(file: Path, key: str, text: str) -> None:
    _log.warning(text)
    keep_note(file, key, text)


def keep_note(file: Path, key: str, text: str) -> None:
    """Note it where the next attempt at the training of this key finds it."""
    metrics.append(file, {"key": key, "note": text})


def kept_notes(file: Path, key: str) -> list[str]:
    """Notes of all attempts, each text once (steps that are done again say the same again), and how many attempts there were."""
    rows = [row for row in metrics.lines(file) if row.get("key") == key]
    attempts = [f"from step {row['from']} with {row['world']} worker{'s' * (row['world'] > 1)}" for row in rows if "from" in row]
    told = [f"trained in {len(attempts)} attempts: {', '.join(attempts)}"] if len(attempts) > 1 else []
    return [*dict.fromkeys(row["note"] for row in rows if "note" in row), *told]


@dataclass(frozen=True)
class Training:
    """What a Fit comes to for `fit`. `saved`: of what was trained, the model that is kept; `notes`: what is to be told of how it begins."""

    model: nn.Module
    options: Train
    loss: Loss | None = None
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    begin: Callable[[int, int], None] = lambda step, total: None
    saved: Callable[[nn.Module], nn.Module] = lambda model: model
    notes: list[str] = field(default_factory=list)


def _dense(job: Fit, options: Spec, splits: Splits, device: str) -> Training:
    return Training(fresh(options, splits), options.train)


def _distilled(job: Fit, options: Spec, splits: Splits, device: str) -> Training:
    recipe = Distill(**job.options)
    train = options.train.model_copy(update={"epochs": recipe.epochs, "learning_rate": recipe.learning_rate})
    folder = Path(job.parents["teacher"])
    teacher = None if (folder / ANSWERS).exists() else restore(options, splits, folder)
    student, notes = _student(job, recipe, options, splits, teacher)
    pairs = paired(student, teacher, recipe) if teacher else {}
    prepare = _pupil(student, teacher, pairs, options.seed, splits) if teacher and pairs else None
    teach = _teaching(teacher.to(device), pairs) if teacher else answered_by(teachers.answering(options, folder / ANSWERS))
    loss = Distillation(teach, recipe)
    if not prepare:
        return Training(student, train, loss, begin=loss.begin, notes=notes)
    notes += [f"compress.distill.{kind}: {', '.join(f'{own} as {other}' for own, other in found)}" for kind, found in pairs.items()]
    if "relations" in pairs and _in_parts(train):
        notes.append("compress.distill.relations: they are between the rows of one worker's micro-batch, not of the whole batch, so other workers or another micro_batch learn from other pairs")
    train = train.model_copy(update={"fp32_modules": tuple(f"student.{name}" for name in train.fp32_modules)})
    return Training(student, train, loss, prepare, loss.begin, lambda pupil: pupil.student, notes)  # type: ignore[arg-type, return-value]


def _in_parts(train: Train) -> bool:
    return bool(train.micro_batch or train.tokens_per_batch) or max(1, train.num_workers) * train.accumulate_steps > 1


def _student(job: Fit, recipe: Distill, options: Spec, splits: Splits, teacher: nn.Module | None) -> tuple[nn.Module, list[str]]:
    """The student, and what is to be told of how it begins."""
    if recipe.student is None:
        student = restore(options, splits, Path(job.parents["student"]))
        keep_zeros(student)  # of a sparsified one
        return student, []
    student = fresh(_with_model(options, recipe.student), splits)
    if not teacher:
        return student, ["compress.distill.student: it begins with fresh weights, since a teacher from the registry is a file without layers to take"]
    taken, of = inherit(student, teacher)
    return student, [f"compress.distill.student: {taken} of its {of} weight tensors begin as the teacher's, those of equal shapes"]


def _teaching(teacher: nn.Module, pairs: Pairs) -> Teach:
    return shown_by(teacher, {kind: [other for _, other in found] for kind, found in pairs.items()})


def _pupil(student: nn.Module, teacher: nn.Module, pairs: Pairs, seed: int, splits: Splits) -> Callable[[nn.Module], nn.Module]:
    """`prepare` of `fit`. The projections are drawn on the host from the seed: the same on every rank and device."""
    torch.manual_seed(seed)
    made = projections(student, teacher, pairs, models.example(student, splits.shape, 2))
    names = {kind: [own for own, _ in found] for kind, found in pairs.items()}
    return lambda model: Pupil(model, names, made).to(next(model.parameters()).device)


def _quantization_aware(job: Fit, options: Spec, splits: Splits, device: str) -> Training:
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it tells of kernels for other machines that it does not find, whoever needs them
    from portaisys.compress import qat  # seconds, and only this stage needs it

    recipe = spec.Quantize(**job.options)
    student = restore(options, splits, Path(job.parents["student"]))
    keep_zeros(student)  # of a sparsified one
    loss = distillation(restore(options, splits, Path(job.parents["teacher"])).to(device), Distill()) if recipe.distill else None
    # Fake quantizers round in fp32, and what torch.export made of the model knows no other means; an average of weights would not go with the ranges of the last ones.
    plain = {"precision": "fp32", "speed": (), "fp32_modules": (), "ema_decay": None}
    train = options.train.model_copy(update={"epochs": recipe.epochs, "learning_rate": recipe.learning_rate, **plain})
    prepare, finish = qat.around(student, splits.calibration.x, recipe, splits.shape[0] if splits.vocabulary else 0)
    return Training(student, train, loss, prepare, loss.begin if loss else lambda step, total: None, lambda made: finish(made, Path(job.work)))


FITS: dict[str, Callable[[Fit, Spec, Splits, str], Training]] = {"train": _dense, "distill": _distilled, "qat": _quantization_aware}


def trained(job: Job, draft: Draft) -> None:
    """train, distill and qat: model.safetensors, with validation accuracy and size as scores; of qat also the ranges it learnt."""
    work = job.train()
    for name in (WEIGHTS, LEARNT):
        if (work / name).exists():
            shutil.copyfile(work / name, draft.path / name)
    draft.notes.extend(json.loads((work / NOTES).read_text()))
    if (section := job.options.get("student")) is not None:
        _write_section(spec.model_of(section), draft.path)
    elif "student" in job.parents:
        keep_section(job.parents["student"], draft)
    _describe(restore(job.spec, job.splits, draft.path), job, draft)
    if job.splits.train.lengths is not None:
        draft.scores["padding_waste"] = _waste(job.spec.train, job.splits.train, job.spec.seed)


def _waste(options: Train, rows: Split, seed: int) -> float:
    """Of the first epoch, as every worker pads its micro-batches."""
    given = batches(options, rows, seed)
    plan = given.get("batches") or shuffled(len(rows), options.batch_size, seed)
    return waste(rows.lengths, [part for parts in shares_of_all(plan(0), options, given.get("cut")) for part in parts])  # type: ignore[arg-type]


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
        _write_section(teachers.section_of(teacher), draft.path)
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
