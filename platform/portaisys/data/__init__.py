"""Rows with labels, split four ways: train, validation, calibration, test.

The splits never overlap and depend on the data and `split_seed` alone. The test split is for the gate;
whatever chooses, tunes or calibrates reads the other three. Knows nothing of models or training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from portaisys import spec
from portaisys.data import sources, texts
from portaisys.data.sources import Table
from portaisys.spec import UserError

SOURCES: dict[type[Any], Callable[..., Table]] = {
    spec.Digits: sources.digits,
    spec.FashionMnist: sources.fashion_mnist,
    spec.Npz: sources.npz,
    spec.Text: texts.text,
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
    def x(self) -> NDArray[Any]:
        """All rows, float32 [n, ...], or int64 ids [n, longest]."""
        return self.table.rows(self.indices)

    @property
    def lengths(self) -> NDArray[np.int64] | None:
        """Tokens of each row, int64 [n]; None where all rows have one shape."""
        return None if self.table.lengths is None else self.table.lengths[self.indices]

    def take(self, positions: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Rows and labels at positions 0..n-1 of this split; ids are padded to the longest of these rows."""
        chosen = self.indices[positions]
        return self.table.rows(chosen), self.table.y[chosen]


@dataclass(frozen=True)
class Splits:
    """The four splits and what a model must know of the data. `mean`, `std`: a value a channel, of the train split; 0 and 1 of token ids."""

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
    def vocabulary(self) -> int:
        """How many token ids there are; 0 where rows are numbers."""
        tokens = self.train.table.tokens
        return tokens.vocabulary if tokens else 0

    @property
    def tokenizer(self) -> str:
        """JSON of what turned text into ids; empty where rows are numbers."""
        tokens = self.train.table.tokens
        return tokens.tokenizer if tokens else ""

    @property
    def test_digest(self) -> str:
        """Names the test split in the ledger: its content, whatever the rest of the data is, or a tokenizer makes of it."""
        tokens = self.test.table.tokens
        x = _digestible([tokens.texts[index] for index in self.test.indices]) if tokens else self.test.x
        return _digest(x, self.test.y)


def load(options: Any) -> Splits:
    """Read a source (a section of `spec.Data`) and split it. Raises UserError naming the spec path."""
    table = SOURCES[type(options)](options)
    parts = _split(table, options)
    _refuse_empty_classes(table, parts)
    if table.learn:
        table = table.learn(parts["train"])
    train, validation, calibration, test = (Split(table, parts[name]) for name in NAMES)
    mean, std = (np.zeros(1, np.float32), np.ones(1, np.float32)) if table.tokens else _moments(train)
    named = [part for name in NAMES for part in (np.frombuffer(name.encode(), np.uint8), parts[name])]
    return Splits(
        train, validation, calibration, test, table.labels, table.shape, mean, std,
        digest=_digest(*named, table.y, np.frombuffer(table.digest.encode(), np.uint8)),
    )  # fmt: skip


NAMES = ("train", "validation", "calibration", "test")


def _split(table: Table, options: Any) -> dict[str, NDArray[np.int64]]:
    everything = np.arange(len(table.y), dtype=np.int64)
    rest, test = everything, table.test
    if test is None:
        rest, test = _hold_out(table, rest, options.test_rows, options.split_seed, "test_rows")
    else:
        rest = np.setdiff1d(everything, test)
    rest, validation = _hold_out(table, rest, options.validation_rows, options.split_seed, "validation_rows")
    rest, calibration = _hold_out(table, rest, options.calibration_rows, options.split_seed, "calibration_rows")
    return {"train": rest, "validation": validation, "calibration": calibration, "test": test}


def _refuse_empty_classes(table: Table, parts: dict[str, NDArray[np.int64]]) -> None:
    """A class that a split lacks can be neither learnt there nor judged, and of one class there is nothing to tell apart."""
    if len(table.labels) < 2:
        raise UserError(f"data: all {len(table.y):,} rows are of one class, {table.labels[0]!r}; give rows of two classes or more")
    rows = np.bincount(table.y, minlength=len(table.labels))
    for name, indices in parts.items():
        empty = np.flatnonzero(np.bincount(table.y[indices], minlength=len(rows)) == 0)
        if len(empty):
            rarest = int(rows[empty].min())
            key, change = (name, "add rows of it") if name == "train" or (name == "test" and table.test is not None) else (f"{name}_rows", f"take at least {-(-len(table.y) // rarest):,}")
            raise UserError(
                f"data.{key}: the {name} split holds {len(indices):,} rows and none of class {table.labels[empty[0]]!r}, "
                f"which has {rows[empty[0]]:,} of all {len(table.y):,}; {change}, or leave the class out of the data"
            )


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


def _digestible(texts: Sequence[str]) -> NDArray[np.uint8]:
    return np.frombuffer("\0".join(texts).encode(), np.uint8)


def _digest(*arrays: NDArray[Any]) -> str:
    state = hashlib.sha256()
    for array in arrays:
        state.update(f"{array.dtype}{array.shape}".encode())
        state.update(array.tobytes())
    return state.hexdigest()
