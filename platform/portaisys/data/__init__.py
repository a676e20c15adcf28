"""Rows with labels, split four ways: train, validation, calibration, test.

The splits never overlap and depend on the data and `split_seed` alone. The test split is for the gate;
whatever chooses, tunes or calibrates reads the other three. Knows nothing of models or training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from portaisys import spec
from portaisys.data import sources
from portaisys.data.sources import Table
from portaisys.spec import UserError

SOURCES: dict[type[Any], Callable[..., Table]] = {
    spec.Digits: sources.digits,
    spec.FashionMnist: sources.fashion_mnist,
    spec.Npz: sources.npz,
    spec.DataFactory: sources.factory,
}


@dataclass(frozen=True)
class Split:
    """Some rows of a table. `indices`: which, int64 [n]."""

    table: Table = field(repr=False)
    indices: NDArray[np.int64] = field(repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def y(self) -> NDArray[np.int64]:
        """Labels, int64 [n]."""
        return self.table.y[self.indices]

    @property
    def x(self) -> NDArray[np.float32]:
        """All rows, float32 [n, ...]."""
        return self.table.rows(self.indices)

    def take(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Rows and labels at positions 0..n-1 of this split."""
        chosen = self.indices[positions]
        return self.table.rows(chosen), self.table.y[chosen]


@dataclass(frozen=True)
class Splits:
    """The four splits and what a model must know of the data. `mean`, `std`: a value a channel, of the train split."""

    train: Split
    validation: Split
    calibration: Split
    test: Split
    labels: tuple[str, ...]
    shape: tuple[int, ...]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    digest: str

    @property
    def test_digest(self) -> str:
        """Names the test split in the ledger: its content, whatever the rest of the data is."""
        return _digest(self.test.x, self.test.y)


def load(options: Any) -> Splits:
    """Read a source (a section of `spec.Data`) and split it. Raises UserError naming the spec path."""
    table = SOURCES[type(options)](options)
    train, validation, calibration, test = _split(table, options)
    mean, std = _moments(train)
    splits = {"train": train, "validation": validation, "calibration": calibration, "test": test}
    parts = [part for name, split in splits.items() for part in (np.frombuffer(name.encode(), np.uint8), split.indices)]
    return Splits(
        train, validation, calibration, test, table.labels, table.shape, mean, std,
        digest=_digest(*parts, table.y, np.frombuffer(table.digest.encode(), np.uint8)),
    )  # fmt: skip


def _split(table: Table, options: Any) -> tuple[Split, Split, Split, Split]:
    everything = np.arange(len(table.y), dtype=np.int64)
    rest, test = everything, table.test
    if test is None:
        rest, test = _hold_out(table, rest, options.test_rows, options.split_seed, "test_rows")
    else:
        rest = np.setdiff1d(everything, test)
    rest, validation = _hold_out(table, rest, options.validation_rows, options.split_seed, "validation_rows")
    rest, calibration = _hold_out(table, rest, options.calibration_rows, options.split_seed, "calibration_rows")
    return Split(table, rest), Split(table, validation), Split(table, calibration), Split(table, test)


def _hold_out(table: Table, rows: NDArray[np.int64], count: int, seed: int, key: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Stratified, so that a small split still holds every class."""
    classes = len(table.labels)
    if count < classes or len(rows) - count < classes:
        raise UserError(f"data.{key}: {count} rows cannot be held out of {len(rows)} with {classes} classes; each side needs at least {classes}")
    try:
        kept, held = train_test_split(rows, test_size=count, random_state=seed, stratify=table.y[rows])
    except ValueError as error:
        raise UserError(f"data.{key}: cannot hold out {count} of {len(rows)} rows: {error}") from None
    return np.sort(kept), np.sort(held)


def _moments(train: Split) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Per channel for rows of [channels, ...]; one value for flat rows. Read in chunks: a data set may be large."""
    total, squares, count = np.float64(0), np.float64(0), 0
    for start in range(0, len(train), 4096):
        x, _ = train.take(np.arange(start, min(start + 4096, len(train))))
        axes = (0, *range(2, x.ndim)) if x.ndim > 2 else tuple(range(x.ndim))
        total = total + x.sum(axes, dtype=np.float64)
        squares = squares + np.square(x, dtype=np.float64).sum(axes)
        count += x.size // (x.shape[1] if x.ndim > 2 else 1)
    mean = np.atleast_1d(total / count)
    deviation = np.sqrt(np.maximum(np.atleast_1d(squares / count) - mean**2, 0))
    return mean.astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)


def _digest(*arrays: NDArray[Any]) -> str:
    state = hashlib.sha256()
    for array in arrays:
        state.update(f"{array.dtype}{array.shape}".encode())
        state.update(array.tobytes())
    return state.hexdigest()
