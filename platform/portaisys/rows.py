"""Which rows a step takes, and what a rank computes of them: plans, shares, and the loading and changing of rows.

Which rows depends on (seed, epoch) alone, whatever the number of ranks; how they are changed on (seed, step, rank). Knows neither models nor optimizers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from portaisys.data import Split
from portaisys.distributed import Place
from portaisys.microbatch import memory_limit
from portaisys.spec import Train, UserError

Rows = NDArray[np.int64]
Batches = Callable[[int], Sequence[Rows]]
Take = Callable[[Rows], tuple[Tensor, Tensor]]


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
    """What one rank computes at once, on the host or the device. `weight`: of its mean loss in that of the global batch; those of a step sum to 1."""

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


def shares_of_all(epoch: Sequence[Rows], options: Train, cut: Callable[[Rows, int], Sequence[Rows]] | None = None) -> list[Sequence[Rows]]:
    """Of every worker in every step of an epoch, its micro-batches. `train.micro_batch: auto` is found where it runs; until then as if nothing were cut."""
    if options.micro_batch == "auto":
        options = options.model_copy(update={"micro_batch": None})
    world = max(1, options.num_workers)
    return [shares_of(batch, Place(rank=rank, world=world), options, cut) for batch in epoch for rank in range(world)]


# --- loading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loader:
    """What makes a step's shares. `share`: a rank's rows of a global batch, cut; `take`: x and y of rows of `split`, where the host or the device has them."""

    split: Split
    plan: Plan
    share: Callable[[Rows], Sequence[Rows]]
    weigh: Callable[[Rows], float]
    augment: str
    seed: int
    place: Place
    take: Take | None = None


def load(loader: Loader, step: int) -> list[Share]:
    """The shares of a step, augmented; none after the last step. Raises UserError when rows cannot be loaded.

    It draws from a generator of its own: in a thread it would otherwise disturb what the step draws.
    """
    if step >= loader.plan.total:
        return []
    generator = torch.Generator().manual_seed(mix(loader.seed, step, loader.place.rank, 1))
    batch = loader.plan.rows(step)
    whole = loader.weigh(batch)
    shares = []
    for rows in loader.share(batch):
        # A rank without rows computes one that counts nothing: the others wait for its gradients.
        x, y = _taken(loader, rows if len(rows) else batch[:1], step)
        x, y = _pinned(augmented(x, loader.augment, generator), loader.place), _pinned(y, loader.place)
        shares.append(Share(rows, x, y, loader.weigh(rows) / whole if len(rows) else 0.0))
    return shares


def _taken(loader: Loader, rows: Rows, step: int) -> tuple[Tensor, Tensor]:
    try:
        if loader.take:
            return loader.take(rows)
        x, y = loader.split.take(rows)
        return torch.from_numpy(x), torch.from_numpy(y)
    except UserError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise UserError(f"train: rows of step {step + 1} could not be loaded: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}") from error


def _pinned(array: Tensor, place: Place) -> Tensor:
    return array.pin_memory() if place.device.startswith("cuda") and not array.is_cuda else array


DEPTH = 2  # steps that are made ahead


@contextmanager
def loading(loader: Loader, speed: Sequence[str]) -> Iterator[Callable[[int], list[Share]]]:
    """`load` as a function of the step; with `prefetch` in `speed` a thread makes those of the next steps meanwhile.

    What it raises is raised where that step is asked for. The thread has ended when the block has, whichever way.
    """
    if "prefetch" not in speed:
        yield functools.partial(load, loader)
        return
    ahead: dict[int, Future[list[Share]]] = {}
    with thread(loader.place) as pool:

        def asked(step: int) -> list[Share]:
            for number in range(step, step + DEPTH + 1):
                if number not in ahead:
                    ahead[number] = pool.submit(load, loader, number)
            return ahead.pop(step).result()

        try:
            yield asked
        finally:
            pool.shutdown(cancel_futures=True)


def thread(place: Place) -> ThreadPoolExecutor:
    """One thread that makes batches, on this rank's GPU where it has one."""
    device = torch.device(place.device)
    return ThreadPoolExecutor(1, "rows", initializer=functools.partial(torch.cuda.set_device, device) if device.index is not None else None)


# --- rows that stay on the device ---------------------------------------------------------------------------------

RESIDENT_SHARE = 0.25  # of the memory that is free, which models and batches want too


def too_large(loader: Loader) -> str:
    """Why the rows cannot stay on the device; empty when they can. On a CPU every rank has a copy of its own."""
    place = loader.place
    limit = memory_limit(1 if place.device.startswith("cuda") else place.world, place.device) * RESIDENT_SHARE
    size = math.prod(_shape(loader)) * loader.split.take(np.arange(1))[0].itemsize
    return f"the rows take {size / 2**20:,.0f} MiB, and a quarter of the memory that is free is {limit / 2**20:,.0f}" if size > limit else ""


def _shape(loader: Loader) -> tuple[int, ...]:
    """Of all rows as one array; texts are as wide as the longest."""
    split = loader.split
    return (len(split), *split.table.shape) if split.lengths is None else (len(split), max(1, int(split.lengths.max())))


def resident(loader: Loader) -> Loader:
    """With all rows on the device as one tensor, of which batches are gathered there: the same values as of the host's."""
    split, device, lengths = loader.split, loader.place.device, loader.split.lengths
    x_all = torch.zeros(_shape(loader), dtype=torch.from_numpy(split.take(np.arange(1))[0]).dtype, device=device)
    for start in range(0, len(split), 4096):
        part = torch.from_numpy(split.take(np.arange(start, min(start + 4096, len(split))))[0])
        x_all[start : start + len(part), : part.shape[1]] = part.to(device)
    y_all = torch.from_numpy(split.y).to(device)

    def take(rows: Rows) -> tuple[Tensor, Tensor]:
        where = torch.from_numpy(rows).to(device)
        x = x_all if lengths is None else x_all[:, : max(1, int(lengths[rows].max()))]
        return x[where], y_all[where]

    return replace(loader, take=take)


# --- rows changed at random ---------------------------------------------------------------------------------------


def augmented(x: Tensor, augment: str, generator: torch.Generator) -> Tensor:
    """The rows as `train.augment` says, where they are. Drawn on the host: the same on every device."""
    if augment != "none":
        x = shift(x, 2, generator)
    if augment in ("shift_flip", "shift_flip_erase"):
        flips = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
        x = torch.where(flips.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
    return erase(x, generator) if augment == "shift_flip_erase" else x


def shift(x_BCHW: Tensor, pixels: int, generator: torch.Generator | None = None) -> Tensor:
    """Move every picture by up to `pixels` in both directions, filling with the edge's own padding value 0."""
    B, _, H, W = x_BCHW.shape
    count = functools.partial(torch.arange, device=x_BCHW.device)
    padded = F.pad(x_BCHW, (pixels,) * 4)
    down, right = torch.randint(0, 2 * pixels + 1, (2, B), generator=generator).to(x_BCHW.device)
    rows = (down[:, None] + count(H))[:, None, :, None]
    columns = (right[:, None] + count(W))[:, None, None, :]
    return padded[count(B)[:, None, None, None], count(x_BCHW.shape[1])[None, :, None, None], rows, columns]


def erase(x_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Every other picture with a rectangle of 2 to 33 % of it, sides 0.3 to 3.3, made 0 (random erasing, Zhong et al. 2020, arXiv:1708.04896, section 3.2)."""
    B, _, H, W = x_BCHW.shape
    erased, area, aspect, top, left = torch.rand(5, B, generator=generator)
    pixels, ratio = (0.02 + 0.31 * area) * H * W, 0.3 ** (1 - 2 * aspect)
    height, width = (pixels * ratio).sqrt().clamp(max=H).round(), (pixels / ratio).sqrt().clamp(max=W).round()
    top, left = (top * (H + 1 - height)).floor(), (left * (W + 1 - width)).floor()
    y, x = torch.arange(H)[None, :], torch.arange(W)[None, :]
    rows, columns = (y >= top[:, None]) & (y < (top + height)[:, None]), (x >= left[:, None]) & (x < (left + width)[:, None])
    hole = rows[:, None, :, None] & columns[:, None, None, :] & (erased < 0.5)[:, None, None, None]
    return x_BCHW.masked_fill(hole.to(x_BCHW.device), 0.0)


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbouring steps get unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
