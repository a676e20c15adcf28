"""Structured pruning: whole channels and neurons leave, so that every engine gets faster, not only sparse ones.

Torch-Pruning finds what must leave together (Fang et al. 2023, DepGraph, arXiv:2301.12900). Knows nothing of data:
importance is the norm of the weights. Accuracy comes back in distill.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch_pruning
from torch import nn

from portaisys.models import check_outputs, count, example
from portaisys.models.transformer import Attention
from portaisys.spec import Prune, UserError


def prune(model: nn.Module, shape: Sequence[int], options: Prune, classes: int) -> dict[str, Any]:
    """Prune `model` in place until both cuts are met. Returns figures: parameters, macs, and both cuts as fractions.

    Raises UserError, naming the best reachable cut, when the structure allows no more.
    """
    before = now = count(model, shape)
    if not before["macs"]:
        raise UserError("compress.prune: this model has no multiply-accumulates that can be counted, so none can be cut; remove the step")
    if options.ratios is not None:
        _pruner(model, shape, options, classes, _by_stage(model, options.ratios)).step()
        _check_outputs(model, shape, classes)
        return _figures(before, count(model, shape))
    pruner = _pruner(model, shape, options, classes)
    for _ in range(options.steps):
        if _enough(before, now, options):
            break
        pruner.step()
        _check_outputs(model, shape, classes)
        now = count(model, shape)
    if not _enough(before, now, options):
        raise UserError(
            f"compress.prune: mac_cut {options.mac_cut} and parameter_cut {options.parameter_cut} cannot be met; this model reaches at most "
            f"mac_cut {_cut(before, now, 'macs'):.3f} and parameter_cut {_cut(before, now, 'parameters'):.3f} with round_to {options.round_to}; ask for less"
        )
    return _figures(before, now)


def _figures(before: dict[str, int], now: dict[str, int]) -> dict[str, Any]:
    return {**now, "mac_cut": _cut(before, now, "macs"), "parameter_cut": _cut(before, now, "parameters")}


def _by_stage(model: nn.Module, ratios: Sequence[float]) -> dict[nn.Module, float]:
    """The ratio of each module that says (`stage`) to which stage of the architecture it belongs."""
    staged = {module: stage for module in model.modules() if isinstance(stage := getattr(module, "stage", None), int)}
    stages = 1 + max(staged.values(), default=-1)
    if stages != len(ratios):
        raise UserError(f"compress.prune.ratios: {len(ratios)} ratios for a model of {stages} stages; give one a stage, or take mac_cut, which needs none")
    return {module: ratios[stage] for module, stage in staged.items()}


def _check_outputs(model: nn.Module, shape: Sequence[int], classes: int) -> None:
    try:
        check_outputs(model, shape, classes)
    except UserError as error:
        raise UserError(f"compress.prune: pruning broke the model's output: {error}; end it with a Linear or Conv2d that gives the logits") from None


def _enough(before: dict[str, int], now: dict[str, int], options: Prune) -> bool:
    return _cut(before, now, "macs") >= options.mac_cut and _cut(before, now, "parameters") >= options.parameter_cut


def _cut(before: dict[str, int], now: dict[str, int], what: str) -> float:
    return 1 - now[what] / before[what]


def _pruner(model: nn.Module, shape: Sequence[int], options: Prune, classes: int, ratios: dict[nn.Module, float] | None = None) -> Any:
    # No width is left below an eighth of what it was: beyond that a model is another one, not a pruned one.
    return torch_pruning.pruner.BasePruner(
        model,
        example(model, shape, 2),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.875 if ratios is None else 0.0,
        pruning_ratio_dict=ratios,
        iterative_steps=options.steps if ratios is None else 1,
        ignored_layers=_kept(model, classes),
        round_to=options.round_to,
    )


def _kept(model: nn.Module, classes: int) -> list[nn.Module]:
    """The layer that gives the logits, and attention's projections, whose widths are tied to the heads."""
    heads = [m for m in model.modules() if getattr(m, "out_features", getattr(m, "out_channels", None)) == classes]
    projections = [layer for m in model.modules() if isinstance(m, (Attention, nn.MultiheadAttention)) for layer in m.children()]
    return heads[-1:] + projections
