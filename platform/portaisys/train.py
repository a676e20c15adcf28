"""fit(): the one training loop. Read it top to bottom.

It knows no Ray: what distribution needs is handed in (`prepare`, `rank`, `world`, `report`). Everything random is
drawn from (seed, step, rank), so a checkpoint needs no generator state: a run that was stopped at any step and
resumed computes the same bits as one that was not.
"""

from __future__ import annotations

import copy
import json
import math
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from portaisys import artifact, evaluate
from portaisys.data import Split
from portaisys.models import predictor
from portaisys.spec import Train, UserError

CHECKPOINT = "checkpoint.safetensors"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Report = Callable[[dict[str, float], Path | None], None]


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
    seed: int = 0,
    validation: Split | None = None,
    loss: Loss | None = None,
    report: Report = lambda metrics, checkpoint: None,
    place: Place = Place(),
) -> nn.Module:
    """Train `model` in place and return it, with its averaged weights when `ema_decay` is set.

    `folder` keeps the checkpoint; one that is there is resumed if it carries `key`. `loss(logits, x, y)` is a mean
    over the batch. `report(metrics, checkpoint)` is called by every rank, equally often, after each epoch and each
    checkpoint; only rank 0 has metrics of the validation split.
    Raises UserError for a foreign or damaged checkpoint, a batch larger than the data and a loss that is not finite.
    """
    steps_per_epoch = len(train) // options.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"train.batch_size: {options.batch_size} exceeds the {len(train)} training rows; take at most {len(train)}")
    total = steps_per_epoch * options.epochs
    loss = loss or cross_entropy(options.label_smoothing)

    model.to(place.device)
    trained = place.prepare(model)
    optimizer = make_optimizer(model, options)
    scaler = torch.amp.GradScaler(place.device, enabled=options.precision == "fp16")
    average = _copy(model) if options.ema_decay else None

    start = resume(folder / CHECKPOINT, key, model, optimizer, scaler, average)
    clock, done, losses = time.monotonic(), start, []
    for step in range(start, total):
        trained.train()
        torch.manual_seed(_mix(seed, step, place.rank))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * cosine(step, total, options.warmup_fraction)

        mine = _indices(len(train), seed, step, steps_per_epoch, options.batch_size)[place.rank :: place.world]
        for last, part in _parts(mine, options.accumulate_steps):
            x, y = _batch(train, part, options.augment, place.device)
            # Gradients are exchanged once a step, with the last micro-batch.
            with nullcontext() if last or place.world == 1 else trained.no_sync():  # type: ignore[operator]
                with _autocast(place.device, options.precision):
                    value = loss(trained(x), x, y) / options.accumulate_steps
                scaler.scale(value).backward()  # type: ignore[no-untyped-call]
            losses.append(value.detach() * options.accumulate_steps)

        if options.clip_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if average:
            _average(average, model, options.ema_decay or 0.0)

        epoch_ends, stops = (step + 1) % steps_per_epoch == 0, step + 1 == total
        saves = stops or (step + 1) % options.checkpoint_every_steps == 0
        # Looked at before it is saved: what has diverged must not become what the next attempt goes on from.
        mean_loss = _finite(losses, model, step) if saves or epoch_ends else 0.0
        if saves and place.rank == 0:
            save(folder / CHECKPOINT, key, step + 1, model, optimizer, scaler, average)
        if saves or epoch_ends:
            metrics = {"step": step + 1, "steps": total, "epoch": (step + 1) / steps_per_epoch, "loss": mean_loss}
            metrics["samples_per_s"] = (step + 1 - done) * options.batch_size / (time.monotonic() - clock)
            if epoch_ends and validation and place.rank == 0:
                metrics["validation_accuracy"] = score(model, validation, average)
            report(metrics, folder if saves else None)
            clock, done, losses = time.monotonic(), step + 1, []

    if average:
        model.load_state_dict(average)
    return model.eval()


# --- the loop's parts -----------------------------------------------------------------------------------------


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """The default loss."""
    return lambda logits, x, y: F.cross_entropy(logits, y, label_smoothing=label_smoothing)


def make_optimizer(model: nn.Module, options: Train) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; no weight decay on biases and norms (vectors)."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.learning_rate)
    return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum, nesterov=options.momentum > 0)


def cosine(step: int, total: int, warmup_fraction: float) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    warmup = max(1, round(total * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def score(model: nn.Module, rows: Split, weights: dict[str, Tensor] | None = None) -> float:
    """Accuracy on a split, of the averaged weights when given."""
    judged = model
    if weights:
        judged = copy.deepcopy(model)
        judged.load_state_dict(weights)
    logits = [predictor(judged)(rows.take(part)[0]) for part in _chunks(len(rows), 512)]
    return evaluate.accuracy(np.concatenate(logits), rows.y)


def _chunks(rows: int, size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, rows, size):
        yield np.arange(start, min(start + size, rows), dtype=np.int64)


def _indices(rows: int, seed: int, step: int, steps_per_epoch: int, batch: int) -> NDArray[np.int64]:
    """The global batch of a step: a slice of its epoch's permutation; the tail that fills no batch waits for another epoch."""
    epoch, index = divmod(step, steps_per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    return order[index * batch : (index + 1) * batch]


def _parts(indices: NDArray[np.int64], count: int) -> Iterator[tuple[bool, NDArray[np.int64]]]:
    parts = np.array_split(indices, count)
    yield from ((index == count - 1, part) for index, part in enumerate(parts))


def _batch(rows: Split, part: NDArray[np.int64], augment: str, device: str) -> tuple[Tensor, Tensor]:
    x, y = (torch.from_numpy(array) for array in rows.take(part))
    if augment != "none":
        x = shift(x, 2)
    if augment == "shift_flip":
        x = torch.where((torch.rand(len(x)) < 0.5).view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def shift(x_BCHW: Tensor, pixels: int) -> Tensor:
    """Move every picture by up to `pixels` in both directions, filling with the edge's own padding value 0."""
    B, _, H, W = x_BCHW.shape
    padded = F.pad(x_BCHW, (pixels,) * 4)
    down, right = torch.randint(0, 2 * pixels + 1, (2, B))
    rows = (down[:, None] + torch.arange(H))[:, None, :, None]
    columns = (right[:, None] + torch.arange(W))[:, None, None, :]
    return padded[torch.arange(B)[:, None, None, None], torch.arange(x_BCHW.shape[1])[None, :, None, None], rows, columns]


def _autocast(device: str, precision: str) -> Any:
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device, types[precision]) if precision in types else nullcontext()


def _finite(losses: list[Tensor], model: nn.Module, step: int) -> float:
    value = torch.stack(losses).mean().item()
    if not math.isfinite(value) or not all(torch.isfinite(p).all() for p in model.parameters()):
        raise UserError(f"train: the loss is {value} and weights may not be finite by step {step + 1}; lower train.learning_rate, set train.clip_norm, or take train.precision=fp32")
    return value


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbouring steps get unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Exponential moving average of weights and running statistics; counters are copied."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, 1 - decay)
        else:
            average[name].copy_(tensor)


# --- checkpoints ----------------------------------------------------------------------------------------------


def save(
    path: Path, key: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, average: dict[str, Tensor] | None
) -> None:
    """All that is needed to go on after `step`, in one safetensors file, whole or not at all."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average/{name}": tensor for name, tensor in (average or {}).items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in values.items() if value is not None}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"key": key, "step": str(step), "scaler": json.dumps(scaler.state_dict())}
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_bytes(path, safetensors.torch.save(plain, about))


def resume(
    path: Path, key: str, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, average: dict[str, Tensor] | None
) -> int:
    """Restore a checkpoint; the step to go on with, 0 when there is none. Raises UserError for a foreign or damaged one."""
    if not path.exists():
        return 0
    about, tensors = read_checkpoint(path)
    if about["key"] != key:
        raise UserError(f"train: {path} was written by a run of another spec, data or parent; go on with that spec, take another name (name=...), or delete {path.parent}")
    model.load_state_dict(_below(tensors, "model/"))
    for name, tensor in _below(tensors, "average/").items():
        if average is not None:
            average[name].copy_(tensor)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below(tensors, "optimizer/").items():
        index, _, part = name.partition("/")
        state.setdefault(int(index), {})[part] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    scaler.load_state_dict(json.loads(about["scaler"]))
    return int(about["step"])


def read_checkpoint(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors. Raises UserError for a truncated or foreign file."""
    raw = path.read_bytes()
    try:
        tensors = safetensors.torch.load(raw)
        about = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]
        return {name: about[name] for name in ("key", "step", "scaler")}, tensors
    except (safetensors.SafetensorError, KeyError, ValueError, struct.error) as error:
        raise UserError(f"train: checkpoint {path} is truncated or none of ours ({error}); delete {path.parent} to train from the start") from None


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
