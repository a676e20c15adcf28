"""fit(): the one training loop. Read it top to bottom.

It knows no Ray: what distribution needs is handed in (`rank`, `world`, `prepare`, `report`). Everything random is drawn from
(seed, step, rank), and which rows a step takes from (seed, epoch) alone, whatever the number of ranks. So a checkpoint needs no
generator state: a run that was stopped at any step and resumed computes the same bits as one that was not, and one that goes on
with more or fewer ranks sees the same batches.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from portaisys import artifact, checkpoint, distributed
from portaisys.checkpoint import Checkpoint, Writer
from portaisys.data import Split
from portaisys.distributed import Place
from portaisys.precision import Ladder, islands, refuse_unsupported
from portaisys.progress import Progress, recent
from portaisys.rows import Batches, Loader, Plan, Rows, Share, loading, mix, shares_of, shuffled
from portaisys.spec import Stopped, Train, UserError
from portaisys.speed import Note, settle
from portaisys.step import Learner, Loss, arranged, cross_entropy, diagnose, gradients, make_optimizer, score, seed_step, set_rate, update

Report = Callable[[dict[str, float], Path | None], None]
Mark = Callable[[int, str], None]

_log = logging.getLogger(__name__)


def fit(
    model: nn.Module,
    train: Split,
    options: Train,
    *,
    folder: Path,
    key: str,
    about: Mapping[str, Any] | None = None,
    seed: int = 0,
    validation: Split | None = None,
    loss: Loss | None = None,
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
    begin: Callable[[int, int], None] = lambda step, total: None,
    batches: Batches | None = None,
    cut: Callable[[Rows, int], Sequence[Rows]] | None = None,
    weigh: Callable[[Rows], float] = len,
    report: Report = lambda metrics, checkpoint: None,
    audit: Callable[[int, Rows], None] = lambda step, rows: None,
    note: Note = _log.warning,
    progress: Progress | None = None,
    leave: Callable[[], bool] = lambda: False,
    mark: Mark = lambda step, doing: None,
    place: Place = Place(),
) -> nn.Module:
    """Train `model` in place and return it, with its averaged weights when `ema_decay` is set.

    `folder` keeps the checkpoints; the newest whole one is resumed if it carries `key` (`about`: in readable fields, what the key was
    made of). `prepare(model)` changes the model on its device before anything else, and gives what is trained and returned.
    `begin(step, total)` is called before each step, repeated ones once, for a loss that changes with the steps.
    `batches(epoch)` gives the epoch's global batches, each the positions of its rows; by default each row once, in batches of
    `options.batch_size`; `cut(rows, world)` a rank's rows of one into micro-batches, by default of like size. `loss(logits, x, y)` is a mean over what `weigh(rows)` counts, by default the rows; where a row holds many
    targets (tokens), the sum of theirs: a step's gradient is that of the mean over the whole batch, however it is shared.
    `report(metrics, checkpoint)` is called by every rank, equally often, after each epoch and each checkpoint; rank 0 alone has
    the validation split's metrics and the folder of a checkpoint whose writing has ended since. `audit(step, rows)` gets this
    rank's rows of each update, `note(text)` what was chosen and what did not go as asked, `progress` each step; its rows come from this rank
    alone, between reports, which wait for all. When `leave()` is true on some rank, all write a checkpoint after the same step, within about
    a second, and end with Stopped. `mark(step, doing)`: this rank now does this, a word of `watch.PHASES`. `options.determinism` is of the whole
    process: whoever calls sets it around the call.
    Raises UserError for a foreign or damaged checkpoint, a disk that takes none, a batch larger than the data, a precision or a means of speed
    that the device does not have, rows that cannot be loaded, and numbers that stay not finite; Stopped when it left before the end.
    """
    refuse_unsupported(options.precision, place.device)
    loss, progress = loss or cross_entropy(options.label_smoothing), progress or Progress()
    plan = Plan(batches or shuffled(len(train), options.batch_size, seed), options.epochs)
    loader = Loader(train, plan, functools.partial(shares_of, place=place, options=options, cut=cut), weigh, options.augment, seed, place)

    model = prepare(model.to(place.device))
    left = checkpoint.newest(folder, key, about or {}, note)
    _refuse_different_starts(left, place)
    options, loader = settle(model, options, loss, loader, place, left.state["settled"] if left else None, note)
    trained = arranged(model, options, place)
    ladder = Ladder(options.precision, place.device, note)
    learner = Learner(model, trained, make_optimizer(model, options), ladder, loss, options, place)
    average = _copy(model) if options.ema_decay else {}
    start, samples = resume(left, learner, average, plan) if left else (0, 0)
    left = left and replace(left, tensors={})  # they are a mapped file, whose blocks would stay taken when its slot is written anew
    if place.rank == 0:
        artifact.sweep(folder)  # of writes that were killed; every rank has read by now
    exchanged = distributed.exchanged_bytes(model, options.ddp, place.world)
    buffers = [*model.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    leaving = distributed.Agreed(leave, place.device)

    with Writer(folder, key, about or {}, left) as writer, islands(model, options.fp32_modules, place.device), loading(loader, options.speed) as loaded:
        load = functools.partial(_marked, loaded, mark)
        clock, rows_done, losses, mean_loss = time.monotonic(), 0, list[Tensor](), math.nan
        ahead = load(start)
        for step in range(start, plan.total):
            mark(step, "computing")
            if step == start or not model.training:  # validation turned it off; the call walks through every module
                trained.train()
            set_rate(learner.optimizer, options, step, plan.total)
            begin(step, plan.total)
            shares, ahead = ahead, []
            _copy_all(kept, buffers)  # running statistics, which an overflow would spoil for good

            precision: str | None = ladder.precision
            while precision:
                seed_step(mix(seed, step, place.rank), place.device)
                value = gradients(learner, shares, precision)
                ahead = ahead or load(step + 1)  # now, while a GPU computes what `update` waits for
                if update(learner, precision):
                    break
                _copy_all(buffers, kept)
                overflowed = distributed.any_rank(not value.isfinite().item(), place.device)
                precision = ladder.climb(step, precision, overflowed, functools.partial(diagnose, learner, shares))
            if precision:
                losses.append(value)
                audit(step, np.concatenate([share.rows for share in shares]))
                _average(average, model, options.ema_decay)

            epoch, index = plan.where(step)
            samples, rows_done = samples + len(plan.rows(step)), rows_done + len(plan.rows(step))
            epoch_ends, stops = index + 1 == plan.steps(epoch), step + 1 == plan.total
            asked = leaving.after(step + 1 - start) and not stops
            saves = stops or asked or (step + 1) % options.checkpoint_every_steps == 0
            reports, due = saves or epoch_ends, progress.step(len(plan.rows(step)))
            if reports or due:
                # Looked at before it is saved: what has diverged must not become what the next attempt goes on from.
                mean_loss = _finite(losses, model, step, mean_loss) if reports else recent(losses, place.world, mean_loss)
                rows_per_s = rows_done / (time.monotonic() - clock)
                metrics = {"step": step + 1, "steps": plan.total, "epoch": epoch + (index + 1) / plan.steps(epoch), "loss": mean_loss, "samples": samples}
                metrics |= {"samples_per_s": rows_per_s, "exchanged_bytes": exchanged, **ladder.counts, **progress.figures(plan.total - step - 1, rows_per_s, ladder.precision)}
            if due and not reports:
                progress.write(metrics)
            if reports:
                if saves and place.rank == 0:
                    writer.save(_state(learner, plan, step + 1, samples), tensors(learner, average))
                if epoch_ends and validation and place.rank == 0:
                    metrics["validation_accuracy"] = score(model, validation, average, functools.partial(mark, step, "validating"))
                if stops or asked:
                    writer.wait()
                mark(step, "reporting")
                report(metrics, writer.written())
                if asked:
                    raise Stopped(step + 1)
                clock, rows_done, losses = time.monotonic(), 0, []

    if average:
        model.load_state_dict(average)
    return model.eval()


def _marked(load: Callable[[int], list[Share]], mark: Mark, step: int) -> list[Share]:
    """The shares of a step, with the marks around their loading."""
    mark(step - 1, "loading")
    try:
        return load(step)
    finally:
        mark(step - 1, "exchanging")


def _finite(losses: list[Tensor], model: nn.Module, step: int, before: float) -> float:
    """Mean loss of the steps, over all ranks; `before` where every one of them was left out."""
    value = distributed.total(torch.stack(losses).mean()).item() if losses else before
    if (losses and not math.isfinite(value)) or not all(torch.isfinite(p).all() for p in model.parameters()):
        raise UserError(f"train: the loss is {value} and weights may not be finite by step {step + 1}; lower train.learning_rate, set train.clip_norm, or take train.precision=fp32")
    return value


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _copy_all(to: list[Tensor], of: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, of)


@torch.no_grad()
def _average(average: Mapping[str, Tensor], model: nn.Module, decay: float | None) -> None:
    """Exponential moving average of weights and running statistics; counters are copied. Nothing without a decay."""
    if not decay:
        return
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, 1 - decay)
        else:
            average[name].copy_(tensor)


# --- what a checkpoint holds --------------------------------------------------------------------------------------


def tensors(learner: Learner, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that the next step depends on, by name."""
    found = {f"model/{name}": tensor for name, tensor in learner.model.state_dict().items()}
    found |= {f"average/{name}": tensor for name, tensor in average.items()}
    for index, values in learner.optimizer.state_dict()["state"].items():
        found |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in values.items() if value is not None}
    return found


def _state(learner: Learner, plan: Plan, step: int, samples: int) -> dict[str, Any]:
    """Where the run stands, without regard to the number of ranks: `world` is told only. `settled`: what `auto` came to."""
    epoch, batch = plan.where(step)
    settled = {"precision": learner.options.precision, "speed": list(learner.options.speed), "micro_batch": learner.options.micro_batch}
    return {"step": step, "epoch": epoch, "batch": batch, "samples": samples, "world": learner.place.world, "settled": settled, "ladder": learner.ladder.state()}


def resume(left: Checkpoint, learner: Learner, average: Mapping[str, Tensor], plan: Plan) -> tuple[int, int]:
    """Put a checkpoint's state in place; the steps and the samples done. Raises UserError when model or batches are others."""
    if plan.where(left.step) != (left.state["epoch"], left.state["batch"]):
        raise UserError(f"train: {left.path} stands at batch {left.state['batch']} of epoch {left.state['epoch']}, and the batches planned now are others; go on with the same rows and batches, or delete the folder")
    model = _below(left.tensors, "model/")
    now = {name: tensor.shape for name, tensor in learner.model.state_dict().items()}
    differ = sorted(name for name in model.keys() | now.keys() if name not in model or now.get(name) != model[name].shape)
    if differ:
        raise UserError(f"train: {left.path} is of another model; {len(differ)} tensors differ, first {differ[0]!r}; go on with that model, or delete the folder")
    learner.model.load_state_dict(model)
    for name, tensor in _below(left.tensors, "average/").items():
        average[name].copy_(tensor)
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    for name, tensor in _below(left.tensors, "optimizer/").items():
        index, _, part = name.partition("/")
        weights = parameters[int(index)]
        # In the weights' own order of memory: fused kernels go through both by address.
        state.setdefault(int(index), {})[part] = torch.empty_like(weights, dtype=tensor.dtype).copy_(tensor) if tensor.shape == weights.shape and tensor.ndim else tensor.clone()
    learner.optimizer.load_state_dict({"state": state, "param_groups": learner.optimizer.state_dict()["param_groups"]})
    learner.ladder.load(left.state["ladder"])
    return left.step, int(left.state["samples"])


def _refuse_different_starts(left: Checkpoint | None, place: Place) -> None:
    """Ranks that do not see one and the same checkpoint would train different models."""
    step = left.step if left else 0
    if distributed.total(torch.tensor(float(step), dtype=torch.float64, device=place.device)).item() != step * place.world:
        raise UserError("storage.path: the workers see different checkpoints; name a folder that all of them share, or s3://bucket/prefix")


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
