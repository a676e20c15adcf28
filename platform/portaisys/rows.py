"""Which rows a step takes, and what a rank computes of them: plans, shares, and the loading and changing of rows.

Which rows depends on (seed, epoch) alone, whatever the number of ranks; how they are changed on (seed, step, rank). Knows neither models nor optimizers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from portaisys.data import Split
from portaisys.distributed import Place
from portaisys.spec import Train, UserError

Rows = NDArray[np.int64]
Batches = Callable[[int], Sequence[Rows]]


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


def load(
    train: Split, plan: Plan, share: Callable[[Rows], Sequence[Rows]], options: Train, weigh: Callable[[Rows], float], seed: int, place: Place, step: int
) -> list[Share]:
    """The shares of a step, augmented; none after the last step."""
    if step >= plan.total:
        return []
    torch.manual_seed(mix(seed, step, place.rank, 1))
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


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbouring steps get unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
