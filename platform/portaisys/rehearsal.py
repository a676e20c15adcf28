"""What a training run would do, without training: steps, shares, shapes and memory of a spec for 16 workers, told by one process without them.

Reads the data and makes the model, so what is wrong with either is found here. Asks no cluster: whether the workers have room there is
said when they start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from portaisys import data, distributed, teachers
from portaisys.compress import prune
from portaisys.compress.quantize import refuse_no_module
from portaisys.compress.sparsify import sparsify
from portaisys.data import Splits
from portaisys.fits import batches
from portaisys.rows import Batches, Plan, shares_of_all, shuffled
from portaisys.spec import Spec, Train, UserError
from portaisys.weights import fresh

TRIED_ROWS = 256  # a worker's rows that are computed here at most; memory is reckoned up from them

# What an optimizer keeps, in numbers a parameter.
_KEPT = {"adamw": 2, "sgd": 1}


@dataclass(frozen=True)
class Rehearsal:
    """`workers` at least 1. Rows of the largest and smallest global batch; `micro_batches` and `micro_rows`: the most in a step of a worker; sizes in bytes, of one worker."""

    rows: int
    workers: int
    epochs: int
    steps_per_epoch: int
    steps: int
    batch_rows: tuple[int, int]
    micro_batches: int
    micro_rows: int
    rows_an_epoch: int
    parameters: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    bytes_by: Mapping[str, int]
    exchanged_bytes: int

    @property
    def memory_bytes(self) -> int:
        return sum(self.bytes_by.values())


def rehearse(options: Spec) -> Rehearsal:
    """Read, build, plan and compute one micro-batch on this CPU in fp32. Raises UserError for what could not be trained."""
    splits = data.load(options.data)
    train, rows = options.train, len(splits.train)
    given = batches(train, splits.train, options.seed)
    plan_of: Batches = given.get("batches") or shuffled(rows, train.batch_size, options.seed)
    plan = Plan(plan_of, train.epochs)
    shares = shares_of_all(plan_of(0), train, given.get("cut"))
    lengths = splits.train.lengths
    largest = max((part for parts in shares for part in parts), key=lambda part: len(part) * (1 if lengths is None or not len(part) else lengths[part].max()))
    model = fresh(options, splits)
    output_shape, bytes_by = _weighed(model, splits, train, largest)
    sizes = [len(batch) for batch in plan_of(0)]
    workers = max(1, train.num_workers)
    return Rehearsal(
        rows, workers, train.epochs, plan.steps(0), plan.total, (max(sizes), min(sizes)), max(map(len, shares)), len(largest),
        sum(len(part) for parts in shares for part in parts), sum(p.numel() for p in model.parameters()), tuple(splits.shape), output_shape,
        bytes_by, distributed.exchanged_bytes(model, train.ddp, workers),
    )  # fmt: skip


def _weighed(model: nn.Module, splits: Splits, train: Train, rows: Any) -> tuple[tuple[int, ...], dict[str, int]]:
    """The shape of the model's answer for these rows, and what a worker holds by what it is for."""
    tried = rows[:TRIED_ROWS]
    x, y = (torch.from_numpy(array) for array in splits.train.take(tried))
    with _kept_for_backward() as kept:
        logits = model.train()(x)
        loss = nn.functional.cross_entropy(logits, y)
    if logits.shape != (len(tried), len(splits.labels)):
        raise UserError(f"model: it answers {list(logits.shape)} for {len(tried)} rows of {len(splits.labels)} classes; it must be [{len(tried)}, {len(splits.labels)}]")
    loss.backward()  # type: ignore[no-untyped-call]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    weights = sum(p.nbytes for p in model.parameters())
    buffers = 0 if train.ddp.gradient_as_bucket_view or not train.num_workers else weights
    activations = sum(size for place, size in kept.items() if place not in own)
    return tuple(logits.shape[1:]), {
        "weights and buffers": weights + sum(buffer.nbytes for buffer in model.buffers()), "gradients": weights + buffers,
        "optimizer": weights * (_KEPT[train.optimizer] if train.optimizer == "adamw" or train.momentum else 0), "average": weights if train.ema_decay else 0,
        "rows": round(x.nbytes * len(rows) / len(tried)), "activations": round(activations * len(rows) / len(tried)),
    }  # fmt: skip


def rehearse_steps(options: Spec, splits: Splits) -> None:
    """Every compression step on the model with its first weights. Raises UserError for names, teachers and targets that are beyond it, which would else be found when all before is paid for."""
    model = fresh(options, splits)
    for step in options.steps:
        if step.distill:
            model = model if step.distill.student is None else teachers.built(step.distill.student, splits, "compress.distill.student")
            teachers.refuse_unteachable(options, splits, step.distill, model)
        elif step.prune:
            prune.rehearse(model, splits.shape, step.prune, len(splits.labels))
        elif step.sparsify:
            sparsify(model, step.sparsify)
        elif step.quantize:
            refuse_no_module(step.quantize.keep, [name for name, _ in model.named_modules() if name])


@contextmanager
def _kept_for_backward() -> Iterator[dict[int, int]]:
    """Storage -> bytes of everything that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}
    held = []  # so that no storage is freed and its address given away within the block

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept

