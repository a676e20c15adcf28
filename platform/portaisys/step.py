"""One step of training: both passes over a rank's shares, and the update; the optimizer, its rate, and how a model is scored.

Knows neither where rows come from nor how many steps there are.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portaisys import distributed, evaluate
from portaisys.data import Split
from portaisys.distributed import Place
from portaisys.models import predictor
from portaisys.precision import Ladder, autocast, first_overflow, products
from portaisys.rows import Rows, Share
from portaisys.spec import Train, UserError

Loss = Callable[[Any, Tensor, Tensor], Tensor]  # what the model gave, its logits unless `prepare` made it another; x, y


@dataclass(frozen=True)
class Learner:
    """What a step works on. `trained`: `model` as `arranged` has it."""

    model: nn.Module
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    ladder: Ladder
    loss: Loss
    options: Train
    place: Place

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Of the model, listed once: finding them walks through every module."""
        return [*self.model.parameters()]


def seed_step(seed: int, device: str) -> None:
    """What a step draws at random on the host and on its device follows from `seed`.

    torch.manual_seed seeds every kind of device, and notes a stack trace for those that are not there: half a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.startswith("cuda"):
        torch.cuda.manual_seed(seed)


def gradients(learner: Learner, shares: Sequence[Share], precision: str) -> Tensor:
    """Both passes over this rank's shares; returns its part of the global batch's mean loss, a scalar on the device.

    DDP averages over ranks what is to be summed, since the weights are of the whole batch: hence the factor `world`.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    place, value = learner.place, torch.zeros((), device=learner.place.device)
    # torch fails when the exchange of a static graph pauses; exchanged each time, the sum is the same.
    pauses = place.world > 1 and not getattr(learner.trained, "static_graph", False)
    compiled = "compile" in learner.options.speed
    with products(precision, place.device), _compiling() if compiled else nullcontext():
        for share in shares:
            x, y = (array.to(place.device, non_blocking=True) for array in (share.x, share.y))
            if x.ndim == 4 and "channels_last" in learner.options.speed:
                x = x.to(memory_format=torch.channels_last)
            if compiled:
                _of_any_size(x)
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
    parameters, half = learner.parameters, precision == "fp16"
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


def score(model: nn.Module, rows: Split, weights: Mapping[str, Tensor] | None = None, moved: Callable[[], None] = lambda: None) -> float:
    """Accuracy on a split, of the averaged weights when given; `moved()` is called before each 512 rows."""
    judged = model
    if weights:
        judged = copy.deepcopy(model)
        judged.load_state_dict(weights)
    logits = []
    for part in _chunks(len(rows), 512):
        moved()
        logits.append(predictor(judged)(rows.take(part)[0]))
    return evaluate.accuracy(np.concatenate(logits), rows.y)


def _chunks(rows: int, size: int) -> Iterator[Rows]:
    for start in range(0, rows, size):
        yield np.arange(start, min(start + size, rows), dtype=np.int64)


# --- what is trained ----------------------------------------------------------------------------------------------

BACKEND = "inductor"


def arranged(model: nn.Module, options: Train, place: Place) -> nn.Module:
    """What is trained of `model`: in the order of memory that the options ask for, distributed, compiled or captured. The model itself keeps its tensors' names."""
    trained = place.prepare(model.to(memory_format=torch.channels_last) if "channels_last" in options.speed else model)  # type: ignore[call-overload]
    if "compile" in options.speed:
        # Never specialised to what happened to come first, which a run that goes on would not see.
        return torch.compile(trained, dynamic=False, backend=BACKEND)  # type: ignore[return-value]
    return Captured(trained) if "cuda_graphs" in options.speed else trained


def _of_any_size(x: Tensor) -> None:
    """One compiled graph for all numbers of rows and, of texts, all lengths: batches differ by a row, and texts in every one."""
    for dimension in (0,) if x.is_floating_point() else range(x.ndim):
        torch._dynamo.maybe_mark_dynamic(x, dimension)


@contextmanager
def _compiling() -> Iterator[None]:
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        inner = getattr(error, "inner_exception", error)
        cause = f"{type(inner).__name__}: {(str(inner).strip() or 'no message').splitlines()[0]}"
        raise UserError(f"train.speed: compile does not work for this model here: {cause}; leave compile out, or take train.speed=auto") from error


CAPTURES = 8


class Captured(nn.Module):
    """`model`, both passes of which are captured as a CUDA graph when a shape and an arithmetic are first seen in training, and replayed from then on.

    Of CAPTURES kinds at most; what is of another kind runs as it is. A gradient is the graph's own memory: backward once between two
    updates. `capture(model, x)` gives what replays; it is torch.cuda.make_graphed_callables (pytorch.org/docs/stable/notes/cuda.html).
    """

    def __init__(self, model: nn.Module, capture: Callable[[nn.Module, Tensor], Callable[[Tensor], Any]] | None = None) -> None:
        super().__init__()
        self.model, self._capture = model, capture or _captured
        self._replays: dict[Any, Callable[[Tensor], Any]] = {}

    def forward(self, x: Tensor) -> Any:
        """The model's answer."""
        if not (self.training and torch.is_grad_enabled()):
            return self.model(x)
        kind = (x.shape, x.dtype, x.stride(), _autocast_type(x), torch.backends.cuda.matmul.allow_tf32)
        if kind not in self._replays and len(self._replays) < CAPTURES:
            self._replays[kind] = self._capture(self.model, x)
        return self._replays.get(kind, self.model)(x)


def _autocast_type(x: Tensor) -> torch.dtype | None:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


def _captured(model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    """Capturing runs the model a few times: its running statistics are put back."""
    buffers = [*model.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    kind = x.device.type
    # In a shell, since torch patches what it is given; without autocast's cache, which would hold weights of one step in the graph.
    with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
        replay: Callable[[Tensor], Any] = torch.cuda.make_graphed_callables(nn.Sequential(model).train(), (x.clone(),), allow_unused_input=True)
    for buffer, before in zip(buffers, kept, strict=True):
        buffer.copy_(before)
    return replay
