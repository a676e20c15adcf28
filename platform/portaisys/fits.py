"""Trainings as plain data (`Fit`), so that one can be carried out in this process or by a group of workers elsewhere.

`carry_out` is the same function in both. FITS: the kinds of training there are, and what each comes to for the loop. Knows no Ray and no stages.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from portaisys import artifact, checkpoint, data, memory, metrics, models, spec, teachers
from portaisys.compress.distill import Distillation, Pairs, Pupil, Teach, answered_by, distillation, inherit, paired, projections, shown_by
from portaisys.compress.sparsify import keep_zeros
from portaisys.data import Split, Splits
from portaisys.data.batches import cut, token_budget, waste
from portaisys.determinism import determined
from portaisys.distributed import Place
from portaisys.microbatch import find_micro_batch, least_of_ranks, memory_limit
from portaisys.progress import Progress, Row, traced, use_of
from portaisys.rows import shares_of_all, shuffled
from portaisys.spec import Distill, Spec, Train, UserError
from portaisys.step import Loss, make_optimizer
from portaisys.teachers import ANSWERS
from portaisys.train import Mark, Report, fit
from portaisys.weights import WEIGHTS, fresh, restore

NOTES = "notes.json"
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
    fixed = {} if lengths is None or place.rank else {"padding_waste": padding_waste(train, splits.train, options.seed)}
    return Progress(between, fixed=fixed, use=use_of(model, shape, place.device, place.world), stepped=stepped)


def batches(options: Train, rows: Split, seed: int) -> dict[str, Any]:
    """What `fit` is given for `train.tokens_per_batch`: a plan and how a worker cuts it; nothing without. Raises UserError where it does not suit the data."""
    if options.tokens_per_batch is None:
        return {}
    if rows.lengths is None:
        raise UserError("train.tokens_per_batch: all rows of this data have one shape, so there is no padding to save; leave it out and set train.batch_size")
    return {"batches": token_budget(rows.lengths, options.tokens_per_batch, seed), "cut": cut(rows.lengths, options.tokens_per_batch)}


def padding_waste(options: Train, rows: Split, seed: int) -> float:
    """Share of what is computed that is padding, of the first epoch, as every worker pads its micro-batches."""
    given = batches(options, rows, seed)
    plan = given.get("batches") or shuffled(len(rows), options.batch_size, seed)
    return waste(rows.lengths, [part for parts in shares_of_all(plan(0), options, given.get("cut")) for part in parts])  # type: ignore[arg-type]


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


# --- what each kind of training comes to --------------------------------------------------------------------------


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
    student = fresh(options.model_copy(update={"model": recipe.student}), splits)
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
