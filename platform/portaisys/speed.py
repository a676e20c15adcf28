"""What `auto` comes to: steps of copies of the model, timed in turns. Knows steps and their options, not the loop.

Each means is tried on top of those that paid, and kept when the lower bound of what it gains is above nothing and what it saves over the
steps that are left exceeds what it costs to set up (of `compile`: the compiling).
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from portaisys import distributed
from portaisys.distributed import Place
from portaisys.precision import Ladder, islands, supported
from portaisys.rows import Loader, Share, load, resident, thread, too_large
from portaisys.spec import EXACT, SPEED, Train, UserError
from portaisys.step import Learner, Loss, arranged, gradients, make_optimizer, set_rate, update

Note = Callable[[str], None]
Trial = Callable[[], float]

MANY_STEPS = 1000  # a trial of `exact` takes some forty
LONG_S = 120.0  # compiling takes half a minute or more, of which a shorter run does not save enough


def settle(model: nn.Module, options: Train, loss: Loss, loader: Loader, place: Place, before: Mapping[str, Any] | None, note: Note) -> tuple[Train, Loader]:
    """The options without `auto`, and the loader that they ask for. `before`: what `auto` came to when the run began, None when it begins now.

    `note` is told what was measured, and what is not as asked. Raises UserError for a means that is not to be had here.
    """
    if before is not None:
        options = options.model_copy(update={name: before[name] for name in ("precision", "speed") if getattr(options, name) in ("auto", "exact")})
    kept = functools.cache(lambda: resident(loader))
    if "auto" in (options.precision, options.speed) or options.speed == "exact":
        with thread(place) as pool:
            options = _measured(model, options, loader.plan.total, place, note, lambda tried: _trial(model, tried, loss, kept() if "resident" in tried.speed else loader, pool, note), loader)
    for means in options.speed:
        if reason := "" if means == "resident" else _why_not(means, model, options, place):
            raise UserError(f"train.speed: {means} is not to be had here: {reason}; leave it out")
    if "resident" not in options.speed:
        return options, loader
    if reason := "" if kept.cache_info().currsize else too_large(loader):
        note(f"train.speed: rows are not resident: {reason}")
    return options, loader if reason else kept()


def _measured(model: nn.Module, options: Train, total: int, place: Place, note: Note, trial: Callable[[Train], Trial], loader: Loader) -> Train:
    def best(what: str, variants: Mapping[str, Train]) -> tuple[Train, float]:
        # Summed on the device: NCCL takes nothing else.
        choice = choose([*variants], lambda name: trial(variants[name]), lambda figures: distributed.total(figures.to(place.device)).cpu(), total)
        note(f"train.{what}: auto took {choice.because}")
        return variants[choice.name], choice.ms[choice.name] / 1e3

    # Speed is measured at the precision taken.
    wanted = {"auto": SPEED, "exact": EXACT if total >= MANY_STEPS else ()}.get(str(options.speed), ())
    options, step_s = options.model_copy(update={"speed": () if options.speed in ("auto", "exact") else options.speed}), math.inf
    if options.precision == "auto":
        options, step_s = best("precision", {name: options.model_copy(update={"precision": name}) for name in supported(place.device)})
    for means in wanted:
        reason = _why_not(means, model, options, place) or (too_large(loader) if means == "resident" else "")
        if means == "compile" and step_s * total < LONG_S:
            reason = f"{total:,} steps take {step_s * total:,.0f} s, of which it would not save what compiling takes"
        if distributed.any_rank(bool(reason), place.device):
            note(f"train.speed: {means} is not tried: {reason or 'another worker cannot'}")
            continue
        more = options.model_copy(update={"speed": (*options.speed, means)})
        options, step_s = best("speed", {" and ".join(variant.speed) or "plain": variant for variant in (options, more)})
        if means == "compile":
            torch._dynamo.reset()  # it would keep the copy of the model; what was compiled is on the disk
    return options


def _why_not(means: str, model: nn.Module, options: Train, place: Place) -> str:
    """What stands against a means; empty when nothing does."""
    if means == "compile" and place.world > 1 and options.ddp.static_graph:
        return "with ddp.static_graph it is not tested"
    if means != "cuda_graphs":
        return ""
    against = {
        "there are none on a CPU": not place.device.startswith("cuda"),
        "workers that exchange gradients are not captured": place.world > 1,
        "a captured step is one micro-batch": bool(options.micro_batch or options.tokens_per_batch or options.accumulate_steps > 1),
        "the model drops out at random, which is not tested in a captured step": any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p for module in model.modules()),
        "the model is compiled": "compile" in options.speed,
        "layers carry forward hooks, as of a distillation from features, attention or relations, which is not tested in a captured step": any(module._forward_hooks for module in model.modules()),
    }
    return next((reason for reason, holds in against.items() if holds), "")


# --- a trial ------------------------------------------------------------------------------------------------------


def _trial(model: nn.Module, tried: Train, loss: Loss, loader: Loader, pool: ThreadPoolExecutor, note: Note) -> Trial:
    """A function that trains a copy of the model for one step and makes the rows of the next, all that the loop does; it returns the loss."""
    place, total = replace(loader.place, world=1, prepare=lambda model: model), loader.plan.total
    copied = copy.deepcopy(model).train()
    trained = arranged(copied, tried, place)
    learner = Learner(copied, trained, make_optimizer(copied, tried), Ladder(tried.precision, place.device, note), loss, tried, place)
    number, shares = 0, load(loader, 0)

    def step() -> float:
        nonlocal number, shares
        value, shares = _one_step(learner, shares, number, total, _following(loader, (number + 1) % total, pool, "prefetch" in tried.speed))
        number += 1
        return value

    return step


def _following(loader: Loader, step: int, pool: ThreadPoolExecutor, ahead: bool) -> Callable[[], list[Share]]:
    """Made from now on, or when it is called. No further ahead, or the thread would work at the cost of the variant whose turn is next."""
    return pool.submit(load, loader, step).result if ahead else functools.partial(load, loader, step)


def _one_step(learner: Learner, shares: Sequence[Share], step: int, total: int, following: Callable[[], list[Share]]) -> tuple[float, list[Share]]:
    """The loss, and what is loaded meanwhile."""
    torch.manual_seed(step)
    # A short run is at its full rate after a step or two, where losses part by chance, however alike the variants compute.
    set_rate(learner.optimizer, learner.options, step, max(total, MANY_STEPS))
    with islands(learner.model, learner.options.fp32_modules, learner.place.device):
        value = gradients(learner, shares, learner.options.precision)
    ahead = following()
    if not update(learner, learner.options.precision) and learner.options.precision == "fp16":
        scaler = learner.ladder.scaler  # there is no ladder in a trial: the next step begins with half the scale
        scaler.update(max(1.0, scaler.get_scale() / 2))
    return value.item(), ahead


# --- the choice ---------------------------------------------------------------------------------------------------

ROUNDS, MOST_ROUNDS = 8, 24
CHEAP_S = 3.0  # rounds go on to MOST_ROUNDS where they take less than that together
LEVEL = 0.05
AGREES = 0.05  # of the loss: what 8 steps in bf16 differ by is below a hundredth
HOPELESS = 3.0  # times as long as the first: bf16 without units for it takes ten


@dataclass(frozen=True)
class Choice:
    """`ms`: median of a step by name, NaN where none was timed."""

    name: str
    because: str
    ms: Mapping[str, float]


def choose(names: Sequence[str], trial: Callable[[str], Trial], share: Callable[[Tensor], Tensor], steps_left: float = math.inf) -> Choice:
    """The fastest of `names` whose losses agree with the first one's, measured in rounds that take turns, after one to warm up.

    `trial(name)` gives a function that trains a copy of the model for one step and returns the loss. `share` sums over ranks, so that
    all choose alike. Another than the first is taken only when a lower bound of what it gains is above nothing: that of the median of
    the rounds' paired log ratios, from their order alone (the sign test turned round), each at the level 0.05 (reached: 9 of 256 in 8
    rounds). What it saves over `steps_left` by that bound must also exceed what its first step took longer. One that is hopeless in the
    first round is not asked again, nor is one whose trial raises UserError.
    """
    seconds, losses, failed = _timed(names, trial, share)
    rounds = len(seconds) - 1
    gains = (seconds[1:, :1] / seconds[1:]).log()
    bounds = gains.sort(0).values[_order(rounds) - 1]  # NaN, where nothing was measured, comes last and is above no bound
    bounds[gains.isnan().any(0)] = math.nan
    middle = seconds[1:].nanmedian(0).values
    agree = ((losses - losses[:, :1]).abs() <= AGREES * losses[:, :1].abs()).all(0)
    saved = middle[0] * (1 - (-bounds).exp()) * steps_left
    extra = (seconds[0] - seconds[0, 0]).clamp(min=0)
    takes = agree & (bounds > 0) & (saved > extra)
    takes[0] = True
    best = min((name for name, taken in zip(names, takes, strict=True) if taken), key=lambda name: middle[names.index(name)].item())

    def told(column: int, name: str) -> str:
        text = f"{name} {middle[column] * 1e3:.1f} ms"
        if name in failed or column == 0 or bounds[column].isnan():
            return f"{name} failed ({failed[name].removeprefix('train.speed: ')})" if name in failed else text
        text += f" (gains {gains[:, column].median().expm1():.1%}, at least {bounds[column].expm1():.1%}" + ("" if agree[column] else "; with another loss")
        return text + (f"; setting it up took {extra[column]:.1f} s, and {steps_left:,.0f} steps save {saved[column]:.1f})" if bounds[column] > 0 and saved[column] <= extra[column] else ")")

    because = f"{best} of {', '.join(told(column, name) for column, name in enumerate(names))} a step, in {rounds} rounds"
    return Choice(best, because, {name: middle[column].item() * 1e3 for column, name in enumerate(names)})


def _timed(names: Sequence[str], trial: Callable[[str], Trial], share: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Seconds (mean over ranks) and losses (sum) by round and name, and why a name's trial ended. Row 0 is the warm-up, with all that is set up."""
    seconds, losses = torch.full((2, MOST_ROUNDS + 1, len(names)), math.nan, dtype=torch.float64)
    ranks, steps, failed, asked, rounds, turn = share(torch.ones((), dtype=torch.float64)), dict[str, Trial](), dict[str, str](), [*names], ROUNDS, 0
    while turn <= rounds:
        for name in asked[turn % len(asked) :] + asked[: turn % len(asked)]:  # who is first in a round is last in the next
            if name in failed:
                continue
            started = time.perf_counter()
            try:
                steps[name] = steps.get(name) or trial(name)
                losses[turn, names.index(name)] = steps[name]()
            except UserError as error:
                if name == names[0]:
                    raise
                failed[name] = str(error)
            seconds[turn, names.index(name)] = math.nan if name in failed else time.perf_counter() - started
        if turn == 1:
            known = share(seconds[1].clone())
            asked = [name for name in names if known[names.index(name)] <= HOPELESS * known[0]]
            steps = {name: step for name, step in steps.items() if name in asked}
            rounds = MOST_ROUNDS if known.nansum() / ranks * MOST_ROUNDS <= CHEAP_S else ROUNDS
        turn += 1
    return share(seconds[:turn]) / ranks, share(losses[: ROUNDS + 1]), failed


def _order(rounds: int) -> int:
    """Which of the paired differences, from the smallest, is a lower bound of their median at LEVEL."""
    below = [sum(math.comb(rounds, count) for count in range(order)) / 2**rounds for order in range(1, rounds + 1)]
    return sum(chance <= LEVEL for chance in below)
