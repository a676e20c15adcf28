"""fit(): the one training loop. Read it top to bottom.

It knows no Ray: what distribution needs is handed in (`rank`, `world`, `prepare`, `report`). Everything random is drawn from
(seed, step, rank), and which rows a step takes from (seed, epoch) alone, whatever the number of ranks. So a checkpoint needs no
generator state: a run that was stopped at any step and resumed computes the same bits as one that was not, and one that goes on
with more or fewer ranks sees the same batches.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from portaisys import artifact, checkpoint, distributed, evaluate
from portaisys.checkpoint import Checkpoint, Writer
from portaisys.data import Split
from portaisys.models import predictor
from portaisys.precision import ROUNDS, Ladder, autocast, choose, first_overflow, islands, products, refuse_unsupported, supported
from portaisys.spec import SPEED, Train, UserError

Rows = NDArray[np.int64]
Batches = Callable[[int], Sequence[Rows]]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Report = Callable[[dict[str, float], Path | None], None]
Note = Callable[[str], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where this process stands. `prepare` makes the model a distributed one (DDP), or leaves it."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model


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
    batches: Batches | None = None,
    cut: Callable[[Rows, int], Sequence[Rows]] | None = None,
    weigh: Callable[[Rows], float] = len,
    report: Report = lambda metrics, checkpoint: None,
    audit: Callable[[int, Rows], None] = lambda step, rows: None,
    note: Note = _log.warning,
    place: Place = Place(),
) -> nn.Module:
    """Train `model` in place and return it, with its averaged weights when `ema_decay` is set.

    `folder` keeps the checkpoints; the newest whole one is resumed if it carries `key` (`about`: in readable fields, what the key was
    made of). `prepare(model)` changes the model on its device before anything else, and gives what is trained and returned.
    `batches(epoch)` gives the epoch's global batches, each the positions of its rows; by default each row once, in batches of
    `options.batch_size`; `cut(rows, world)` a rank's rows of one into micro-batches, by default of like size. `loss(logits, x, y)` is a mean over what `weigh(rows)` counts, by default the rows; where a row holds many
    targets (tokens), the sum of theirs: a step's gradient is that of the mean over the whole batch, however it is shared.
    `report(metrics, checkpoint)` is called by every rank, equally often, after each epoch and each checkpoint; rank 0 alone has
    the validation split's metrics and the folder of a checkpoint whose writing has ended since. `audit(step, rows)` gets this
    rank's rows of each update, `note(text)` what was chosen and what did not go as asked.
    Raises UserError for a foreign or damaged checkpoint, a disk that takes none, a batch larger than the data, a precision that the
    device does not have, and numbers that stay not finite.
    """
    refuse_unsupported(options.precision, place.device)
    loss = loss or cross_entropy(options.label_smoothing)
    plan = Plan(batches or shuffled(len(train), options.batch_size, seed), options.epochs)
    load = functools.partial(_load, train, plan, functools.partial(shares_of, place=place, options=options, cut=cut), options, weigh, seed, place)

    model = prepare(model.to(place.device))
    left = checkpoint.newest(folder, key, about or {}, note)
    _refuse_different_starts(left, place)
    options = options.model_copy(update=left.state["settled"]) if left else _settled(model, options, loss, load, plan.total, place, note)
    trained = place.prepare(_laid_out(model, options))
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

    with Writer(folder, key, about or {}, left) as writer, islands(model, options.fp32_modules, place.device):
        clock, rows_done, losses, mean_loss = time.monotonic(), 0, list[Tensor](), math.nan
        ahead = load(start)
        for step in range(start, plan.total):
            trained.train()
            set_rate(learner.optimizer, options, step, plan.total)
            shares, ahead = ahead, []
            _copy_all(kept, buffers)  # running statistics, which an overflow would spoil for good

            precision: str | None = ladder.precision
            while precision:
                torch.manual_seed(_mix(seed, step, place.rank))
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
            saves = stops or (step + 1) % options.checkpoint_every_steps == 0
            if saves or epoch_ends:
                # Looked at before it is saved: what has diverged must not become what the next attempt goes on from.
                mean_loss = _finite(losses, model, step, mean_loss)
                metrics = {"step": step + 1, "steps": plan.total, "epoch": epoch + (index + 1) / plan.steps(epoch), "loss": mean_loss, "samples": samples}
                metrics |= {"samples_per_s": rows_done / (time.monotonic() - clock), "exchanged_bytes": exchanged, **ladder.counts}
                if saves and place.rank == 0:
                    writer.save(_state(learner, plan, step + 1, samples), tensors(learner, average))
                if epoch_ends and validation and place.rank == 0:
                    metrics["validation_accuracy"] = score(model, validation, average)
                if stops:
                    writer.wait()
                report(metrics, writer.written())
                clock, rows_done, losses = time.monotonic(), 0, []

    if average:
        model.load_state_dict(average)
    return model.eval()


# --- which rows a step takes --------------------------------------------------------------------------------------


class Plan:
    """Steps of all epochs in a row, each with the rows of its global batch. `batches`: of an epoch."""

    def __init__(self, batches: Batches, epochs: int) -> None:
        self._batches = functools.lru_cache(maxsize=2)(batches)
        self._steps = [len(self._batches(epoch)) for epoch in range(epochs)]
        self._ends = np.cumsum(self._steps)
        if not all(self._steps):
            raise UserError("train: an epoch has no batch; there are no training rows, or `batches` gives none")

    @property
    def total(self) -> int:
        return int(self._ends[-1])

    def steps(self, epoch: int) -> int:
        return self._steps[epoch]

    def where(self, step: int) -> tuple[int, int]:
        """Epoch and batch in it of a step; of the step after the last, the epoch after the last."""
        epoch = int(np.searchsorted(self._ends, step, side="right"))
        return epoch, step - int(self._ends[epoch - 1] if epoch else 0)

    def rows(self, step: int) -> Rows:
        epoch, index = self.where(step)
        return self._batches(epoch)[index]


class _Cut(Sequence[Rows]):
    """An epoch's permutation in parts that differ by one row at most: every row once, and no last batch of a few rows, whose gradient
    is noise and whose batch statistics are worse. The permutation is drawn when the first part is asked for."""

    def __init__(self, rows: int, parts: int, seed: tuple[int, int]) -> None:
        self._rows, self._parts, self._seed = rows, parts, seed

    def __len__(self) -> int:
        return self._parts

    @functools.cached_property
    def _batches(self) -> list[Rows]:
        return np.array_split(np.random.default_rng(self._seed).permutation(self._rows), self._parts)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]


def shuffled(rows: int, batch_size: int, seed: int) -> Batches:
    """The default: in every epoch each row once, in a new order, in batches of `batch_size` or, where that does not divide, a little less.

    Raises UserError when there are fewer rows than that.
    """
    if batch_size > rows:
        raise UserError(f"train.batch_size: {batch_size} exceeds the {rows} training rows; take at most {rows}")
    return lambda epoch: _Cut(rows, -(-rows // batch_size), (seed, epoch))


@dataclass(frozen=True)
class Share:
    """What one rank computes at once, on the host. `weight`: of its mean loss in that of the global batch; those of a step sum to 1."""

    rows: Rows
    x: Tensor
    y: Tensor
    weight: float


def shares_of(batch: Rows, place: Place, options: Train, cut: Callable[[Rows, int], Sequence[Rows]] | None = None) -> Sequence[Rows]:
    """This rank's part of a global batch, cut into micro-batches: as many on every rank, of `train.micro_batch` rows at most; or as `cut` does.

    Every world-th row, so that rows sorted by length are shared fairly. One of them is empty where there are more ranks than rows.
    """
    if cut:
        return cut(batch[place.rank :: place.world], place.world)
    assert options.micro_batch != "auto", "whoever calls fit() has found it"
    largest = -(-len(batch) // place.world)
    parts = -(-largest // options.micro_batch) if options.micro_batch else options.accumulate_steps
    return np.array_split(batch[place.rank :: place.world], min(parts, largest))


def _load(
    train: Split, plan: Plan, share: Callable[[Rows], Sequence[Rows]], options: Train, weigh: Callable[[Rows], float], seed: int, place: Place, step: int
) -> list[Share]:
    """The shares of a step, augmented; none after the last step."""
    if step >= plan.total:
        return []
    torch.manual_seed(_mix(seed, step, place.rank, 1))
    batch = plan.rows(step)
    whole = weigh(batch)
    shares = []
    for rows in share(batch):
        # A rank without rows computes one that counts nothing: the others wait for its gradients.
        x, y = _batch(train, rows if len(rows) else batch[:1], options.augment, place.device)
        shares.append(Share(rows, x, y, weigh(rows) / whole if len(rows) else 0.0))
    return shares


def _batch(train: Split, rows: Rows, augment: str, device: str) -> tuple[Tensor, Tensor]:
    x, y = (torch.from_numpy(array) for array in train.take(rows))
    if augment != "none":
        x = shift(x, 2)
    if augment == "shift_flip":
        x = torch.where((torch.rand(len(x)) < 0.5).view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
    return (x.pin_memory(), y.pin_memory()) if device.startswith("cuda") else (x, y)


def shift(x_BCHW: Tensor, pixels: int) -> Tensor:
    """Move every picture by up to `pixels` in both directions, filling with the edge's own padding value 0."""
    B, _, H, W = x_BCHW.shape
    padded = F.pad(x_BCHW, (pixels,) * 4)
    down, right = torch.randint(0, 2 * pixels + 1, (2, B))
    rows = (down[:, None] + torch.arange(H))[:, None, :, None]
    columns = (right[:, None] + torch.arange(W))[:, None, None, :]
    return padded[torch.arange(B)[:, None, None, None], torch.arange(x_BCHW.shape[1])[None, :, None, None], rows, columns]


# --- a step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learner:
    """What a step works on. `trained`: `model`, distributed or not."""

    model: nn.Module
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    ladder: Ladder
    loss: Loss
    options: Train
    place: Place


def gradients(learner: Learner, shares: Sequence[Share], precision: str) -> Tensor:
    """Both passes over this rank's shares; returns its part of the global batch's mean loss, a scalar on the device.

    DDP averages over ranks what is to be summed, since the weights are of the whole batch: hence the factor `world`.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    place, value = learner.place, torch.zeros((), device=learner.place.device)
    # torch fails when the exchange of a static graph pauses; exchanged each time, the sum is the same.
    pauses = place.world > 1 and not getattr(learner.trained, "static_graph", False)
    with products(precision, place.device):
        for share in shares:
            x, y = (array.to(place.device, non_blocking=True) for array in (share.x, share.y))
            if x.ndim == 4 and "channels_last" in learner.options.speed:
                x = x.to(memory_format=torch.channels_last)
            # Gradients are exchanged once a step, with the last micro-batch.
            with learner.trained.no_sync() if pauses and share is not shares[-1] else nullcontext():  # type: ignore[operator]
                with autocast(precision, place.device):
                    part = learner.loss(learner.trained(x), x, y) * share.weight
                scaled = learner.ladder.scaler.scale(part) if precision == "fp16" else part
                (scaled * place.world).backward()  # type: ignore[no-untyped-call]
            value += part.detach()
    return value


def update(learner: Learner, precision: str) -> bool:
    """Clip the gradients and apply them; False, and no weight changed, when they are not all finite.

    They are the same on all ranks by then, and so is their norm: all decide alike and need not ask. Reading it is the only wait for
    the device in a step; the next batch is loaded before it, and fp16's scaler would wait in any case.
    """
    parameters, half = [*learner.model.parameters()], precision == "fp16"
    if half:
        learner.ladder.scaler.unscale_(learner.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not math.isfinite(norm.item()):
        return False
    if learner.options.clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, learner.options.clip_norm, norm)
    if half:
        learner.ladder.scaler.step(learner.optimizer)
        learner.ladder.scaler.update()
    else:
        learner.optimizer.step()
    return True


def diagnose(learner: Learner, shares: Sequence[Share]) -> str:
    """Where the numbers of a step stop being finite, on the first rank that sees it: a layer's output, the loss, or a gradient."""
    device = learner.place.device

    def forward() -> None:
        values.extend(learner.loss(learner.model(share.x.to(device)), share.x.to(device), share.y.to(device)) for share in shares)

    values: list[Tensor] = []
    text = first_overflow(learner.model, forward)
    if not text and not all(value.isfinite() for value in values):
        text = "every layer's output is finite and the loss is not"
    spoilt = [name for name, p in learner.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if not text and spoilt:
        text = f"outputs and loss are finite and the gradient of {spoilt[-1]} is not"
    return distributed.first_said(text)


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """The default loss."""
    return lambda logits, x, y: F.cross_entropy(logits, y, label_smoothing=label_smoothing)


def make_optimizer(model: nn.Module, options: Train) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; no weight decay on biases and norms (vectors)."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    fused = "fused" in options.speed or None
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.learning_rate, fused=fused)
    return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum, nesterov=options.momentum > 0, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, options: Train, step: int, total: int) -> None:
    """The learning rate of a step."""
    for group in optimizer.param_groups:
        group["lr"] = options.learning_rate * rate_factor(step, total, options.warmup_fraction, options.schedule)


# What is left of the learning rate when a part, 0 to 1, of the way from the end of the warm-up to the last step is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),  # Loshchilov & Hutter 2017, arXiv:1608.03983
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def rate_factor(step: int, total: int, warmup_fraction: float, schedule: str = "cosine") -> float:
    """Factor on the learning rate: linear warm-up, then as `schedule` says."""
    warmup = max(1, round(total * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[schedule]((step - warmup) / max(1, total - warmup))


def score(model: nn.Module, rows: Split, weights: Mapping[str, Tensor] | None = None) -> float:
    """Accuracy on a split, of the averaged weights when given."""
    judged = model
    if weights:
        judged = copy.deepcopy(model)
        judged.load_state_dict(weights)
    logits = [predictor(judged)(rows.take(part)[0]) for part in _chunks(len(rows), 512)]
    return evaluate.accuracy(np.concatenate(logits), rows.y)


def _chunks(rows: int, size: int) -> Iterator[Rows]:
    for start in range(0, rows, size):
        yield np.arange(start, min(start + size, rows), dtype=np.int64)


def _finite(losses: list[Tensor], model: nn.Module, step: int, before: float) -> float:
    """Mean loss of the steps, over all ranks; `before` where every one of them was left out."""
    value = distributed.total(torch.stack(losses).mean()).item() if losses else before
    if (losses and not math.isfinite(value)) or not all(torch.isfinite(p).all() for p in model.parameters()):
        raise UserError(f"train: the loss is {value} and weights may not be finite by step {step + 1}; lower train.learning_rate, set train.clip_norm, or take train.precision=fp32")
    return value


def _settled(model: nn.Module, options: Train, loss: Loss, load: Callable[[int], list[Share]], total: int, place: Place, note: Note) -> Train:
    """The options without `auto`: what a few steps of copies of the model show to be the fastest here; `note` is told what was measured."""
    if "auto" not in (options.precision, options.speed):
        return options
    shares = [load(step % total) for step in range(ROUNDS + 1)]

    def trial(tried: Train) -> Callable[[], float]:
        copied = _laid_out(copy.deepcopy(model), tried).train()
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


def _laid_out(model: nn.Module, options: Train) -> nn.Module:
    """In the order of memory that the options ask for."""
    return model.to(memory_format=torch.channels_last) if "channels_last" in options.speed else model  # type: ignore[call-overload]


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbouring steps get unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


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
    settled = {"precision": learner.options.precision, "speed": list(learner.options.speed)}
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
