"""What `auto` comes to: a few steps of copies of the model, timed in turns. Knows steps and their options, not the loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from portaisys import distributed
from portaisys.distributed import Place
from portaisys.precision import ROUNDS, Ladder, choose, islands, supported
from portaisys.rows import Share
from portaisys.spec import SPEED, Train
from portaisys.step import Learner, Loss, gradients, laid_out, make_optimizer, set_rate, update

Note = Callable[[str], None]


def settled(model: nn.Module, options: Train, loss: Loss, load: Callable[[int], list[Share]], total: int, place: Place, note: Note) -> Train:
    """The options without `auto`: what a few steps of copies of the model show to be the fastest here; `note` is told what was measured."""
    if "auto" not in (options.precision, options.speed):
        return options
    shares = [load(step % total) for step in range(ROUNDS + 1)]

    def trial(tried: Train) -> Callable[[], float]:
        copied = laid_out(copy.deepcopy(model), tried).train()
        alone = Learner(copied, copied, make_optimizer(copied, tried), Ladder(tried.precision, place.device, note), loss, tried, replace(place, world=1))
        steps = iter(range(ROUNDS + 1))
        return lambda: _one_step(alone, shares, next(steps), total)

    def best(what: str, variants: Mapping[str, Train]) -> Train:
        # Summed on the device: NCCL takes nothing else.
        choice = choose([*variants], lambda name: trial(variants[name]), lambda figures: distributed.total(figures.to(place.device)).cpu())
        note(f"train.{what}: auto took {choice.because}")
        return variants[choice.name]

    # Speed is measured at the precision taken, and each means on top of those that paid.
    speed, options = options.speed, options.model_copy(update={"speed": () if options.speed == "auto" else options.speed})
    if options.precision == "auto":
        options = best("precision", {name: options.model_copy(update={"precision": name}) for name in supported(place.device)})
    for means in SPEED if speed == "auto" else ():
        more = options.model_copy(update={"speed": (*options.speed, means)})
        options = best("speed", {" and ".join(variant.speed) or "plain": variant for variant in (options, more)})
    return options


def _one_step(learner: Learner, shares: Sequence[list[Share]], step: int, total: int) -> float:
    """A step of a trial; the loss."""
    torch.manual_seed(step)
    set_rate(learner.optimizer, learner.options, step, total)
    with islands(learner.model, learner.options.fp32_modules, learner.place.device):
        value = gradients(learner, shares[step], learner.options.precision)
    if not update(learner, learner.options.precision) and learner.options.precision == "fp16":
        scaler = learner.ladder.scaler  # there is no ladder in a trial: the next step begins with half the scale
        scaler.update(max(1.0, scaler.get_scale() / 2))
    return value.item()
