"""Teachers that a run has not trained: a version of the registry, which answers through ONNX Runtime, or a user's factory.

Knows what they must agree on with the data, not how a student learns from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from portaisys import models
from portaisys.compress.distill import paired, projections
from portaisys.data import Splits
from portaisys.engine import options_of
from portaisys.engine.cache import cache_of, get_or_build, load
from portaisys.export import INPUT, OUTPUT
from portaisys.fetch import Fetched, fetch
from portaisys.precision import islands
from portaisys.spec import Distill, ModelFactory, Spec, TeacherFactory, UserError

ANSWERS, TOKENIZER = "fp32.onnx", "tokenizer.json"


def digest(options: Spec, teacher: Any) -> dict[str, str]:
    """What of a teacher no spec holds: the digest of the version that a reference means now, or a factory's code."""
    return {"version": version(options, teacher).version.digest} if isinstance(teacher, str) else models.source_digest(section_of(teacher))


def version(options: Spec, reference: str) -> Fetched:
    """A version of the run's registry. Raises UserError for one that is not there."""
    with _told_of("compress.distill.teacher"):
        return fetch(reference, options.storage, options.storage.cache_dir)


def section_of(teacher: Any) -> ModelFactory:
    """A factory's teacher as a model section."""
    return ModelFactory(name="factory", **TeacherFactory.model_validate(teacher).model_dump())


def made(teacher: Any, splits: Splits) -> nn.Module:
    """A factory's teacher, which takes rows as the data has them. Raises UserError when it does not, or tells another number of classes apart."""
    try:
        return models.build(section_of(teacher), splits.shape, len(splits.labels), vocabulary=splits.vocabulary).eval()
    except UserError as error:
        raise UserError(f"compress.distill.teacher: {str(error).replace('model.factory: ', '').removeprefix('model: ')}") from error


def answering(options: Spec, file: Path) -> Callable[[Any], Any]:
    """A version's fp32 file in ONNX Runtime as a function of rows, of any number."""
    settings = replace(options_of(options.engine, options.export, options.dims), threads=options.train.cpus_per_worker)
    engine = load(get_or_build(file, "onnxruntime", settings, cache_of(options.storage)), settings)
    return lambda x: engine.run({INPUT: x})[OUTPUT]


def refuse_other_classes(found: Fetched, reference: str, splits: Splits) -> None:
    """Raises UserError unless a version tells this data's classes apart, in their order, and cuts texts as this data does."""
    labels = json.loads((found.path / "version.json").read_text())["labels"]
    if labels != list(splits.labels):
        raise UserError(
            f"compress.distill.teacher: teacher and student of different classes: {reference} has {_told(labels)} and the data {_told(splits.labels)}; take a teacher of the same labels in the same order"
        )
    tokenizer = found.path / TOKENIZER
    if (tokenizer.read_text() if tokenizer.exists() else "") != splits.tokenizer:
        raise UserError(f"compress.distill.teacher: {reference} cuts texts into other tokens than this data does; take a teacher of the same data section")


def _told(labels: Any) -> str:
    return ", ".join(map(str, labels[:5])) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")


def refuse_unteachable(options: Spec, splits: Splits, recipe: Distill, student: nn.Module) -> None:
    """Raises UserError for a distillation that cannot begin: a teacher, or layers, that are not there. `student`: untrained."""
    with _told_of("compress.distill.student"), islands(student, options.train.fp32_modules if recipe.student else (), "cpu"):
        pass  # its modules may be other ones than the dense model's
    if isinstance(recipe.teacher, str):
        found = version(options, recipe.teacher)
        refuse_other_classes(found, recipe.teacher, splits)
        answering(options, found.path / ANSWERS)(splits.calibration.x[:2])
        return
    teacher = built(options.model, splits, "model") if recipe.teacher is None else made(recipe.teacher, splits)
    projections(student, teacher, paired(student, teacher, recipe), models.example(student, splits.shape, 2))


def built(section: Any, splits: Splits, where: str) -> nn.Module:
    """An untrained model of a section of the spec, which stands at the path `where`. Raises UserError with that path."""
    with _told_of(where):
        return models.build(section, splits.shape, len(splits.labels), splits.mean, splits.std, splits.vocabulary)


@contextmanager
def _told_of(where: str) -> Iterator[None]:
    """A user's error with the path that leads to it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
