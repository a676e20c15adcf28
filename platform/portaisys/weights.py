"""The model of a spec: with its first weights, or with those that a stage left in its folder.

Beside weights of another model section than the run's lies that section. Knows nothing of how they were trained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from portaisys import models, spec
from portaisys.artifact import Artifact, Draft
from portaisys.data import Splits
from portaisys.spec import Spec

WEIGHTS = "model.safetensors"
MODEL = "model.json"  # the model section of weights that are not of the run's own


def fresh(options: Spec, splits: Splits) -> nn.Module:
    """The model of a spec with its first weights, the same on every machine and rank."""
    torch.manual_seed(options.seed)
    return models.build(options.model, splits.shape, len(splits.labels), splits.mean, splits.std, splits.vocabulary)


def restore(options: Spec, splits: Splits, folder: Path) -> nn.Module:
    """The model of a finished stage, pruned or not, of the run's section or of the one that lies beside it."""
    if (folder / MODEL).exists():
        section = spec.model_of(json.loads((folder / MODEL).read_text()))
        options = options.model_copy(update={"model": section})
    model = fresh(options, splits)
    models.rebuild(model, models.load_weights(folder / WEIGHTS))
    return model.eval()


def write_section(section: spec.Model, folder: Path) -> None:
    """Leave beside weights the model section that they are of, where it is not the run's own."""
    (folder / MODEL).write_text(json.dumps(section.model_dump(mode="json"), sort_keys=True))


def keep_section(parent: Artifact, draft: Draft) -> None:
    """What is made of a model of another section than the run's is one too."""
    if MODEL in parent.files:
        shutil.copyfile(parent.file(MODEL), draft.path / MODEL)
