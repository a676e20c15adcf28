"""What several processes that train one model have to agree on: gradients, sums, and who saw what.

Torch only; who started the processes (Ray, torchrun, a test) is not known here. Alone, every function does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from portaisys.spec import Ddp, UserError


@dataclass(frozen=True)
class Place:
    """Where this process stands. `prepare` makes the model a distributed one (DDP), or leaves it."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model


def ddp(model: nn.Module, options: Ddp) -> nn.Module:
    """The model with its gradients averaged over all processes (Li et al. 2020, arXiv:2006.15704).

    Raises UserError for SyncBatchNorm without a GPU, which torch does not have.
    """
    if options.sync_batchnorm:
        if next(model.parameters()).device.type == "cpu":
            raise UserError("train.ddp.sync_batchnorm: torch has it for GPUs only; set train.use_gpu=true or train.ddp.sync_batchnorm=false")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    wrapped = DistributedDataParallel(
        model, bucket_cap_mb=options.bucket_mib, gradient_as_bucket_view=options.gradient_as_bucket_view, static_graph=options.static_graph
    )  # fmt: skip
    if options.compress == "bf16":
        wrapped.register_comm_hook(None, _in_bf16)
    return wrapped


def _in_bf16(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    """The bucket's mean over ranks, summed in bf16. torch's own hook of that kind refuses gloo, which can do it."""
    halved = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    return dist.all_reduce(halved, async_op=True).get_future().then(lambda done: bucket.buffer().copy_(done.value()[0]))


def exchanged_bytes(model: nn.Module, options: Ddp, world: int) -> int:
    """Bytes that a rank gives to the exchange in one step: its gradients, and the buffers that rank 0 hands out.

    What then goes over the wire is the backend's: a ring sends 2 * (world - 1) / world of the gradients.
    """
    if world == 1:
        return 0
    gradients = sum(p.numel() * (2 if options.compress == "bf16" else p.element_size()) for p in model.parameters() if p.requires_grad)
    return gradients + sum(buffer.nbytes for buffer in model.buffers())


def total(value: Tensor) -> Tensor:
    """Sum over all ranks, the same bits on each. Waits for the slowest."""
    if _several():
        dist.all_reduce(value)
    return value


def first_said(text: str) -> str:
    """The text of the first rank that has one, the same on each."""
    if not _several():
        return text
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return next((f"rank {rank}: {said}" for rank, said in enumerate(texts) if said), "")


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def any_rank(flag: bool, device: str | torch.device) -> bool:
    """Whether it is so on some rank."""
    return bool(total(torch.tensor(float(flag), device=device)).item())


class Agreed:
    """Whether some rank wants it, known to all ranks after the same step.

    They ask each other about once in `every_s`: the sum that says it also says how long their steps take, from which all reckon the
    same next time. So it costs one sum of two numbers a second, or one a step where steps are longer. One process asks nobody.
    """

    def __init__(self, wanted: Callable[[], bool], device: str, every_s: float = 1.0) -> None:
        self._wanted, self._device, self._every_s = wanted, device, every_s
        self._asked, self._next = (0, time.monotonic()), 1

    def after(self, done: int) -> bool:
        """Of the `done`-th step of this process, asked after each."""
        if not _several():
            return self._wanted()
        if done < self._next:
            return False
        (before, then), now = self._asked, time.monotonic()
        wanted, seconds = total(torch.tensor([float(self._wanted()), now - then], dtype=torch.float32, device=self._device)).tolist()
        step_s = seconds / dist.get_world_size() / (done - before)
        self._asked, self._next = (done, now), done + max(1, min(1000, int(self._every_s / max(step_s, 1e-9))))
        return bool(wanted > 0)
