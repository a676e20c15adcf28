"""Digits whose test rows tell when they are read. A data factory (`watched_digits:digits`), so that whatever process loads the data watches itself.

PORTAISYS_TEST_READS names the file that gets a line a load ("loaded PID") and a line a read of test rows or their labels. What `data.load` itself
hashes it reads before there are splits: no answer is compared with it, so it is no look.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from portaisys import data

REAL = data.Splits


def _note(what):
    with Path(os.environ["PORTAISYS_TEST_READS"]).open("a") as file:
        file.write(f"{what}\n")


class Watched(data.Split):
    """The test split: whoever reads rows or labels is noted."""

    @property
    def x(self):
        _note("x")
        return super().x

    @property
    def y(self):
        _note("y")
        return super().y

    def take(self, positions):
        _note("take")
        return super().take(positions)


def watched(*args, **kwargs):
    """data.Splits, the table included: rows of the test split are noted by whatever split they are asked of."""
    made = REAL(*args, **kwargs)
    _note(f"loaded {os.getpid()}")
    table, test = made.test.table, {*made.test.indices.tolist()}

    def rows(indices):
        if test & {*np.asarray(indices).tolist()}:
            _note("rows")
        return table.rows(indices)

    guarded = dataclasses.replace(table, rows=rows)
    parts = {name: data.Split(guarded, getattr(made, name).indices) for name in ("train", "validation", "calibration")}
    return dataclasses.replace(made, **parts, test=Watched(guarded, made.test.indices))


data.Splits = watched


def digits():
    """The rows of spec.Digits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return list(zip(bunch.images[:, None].astype(np.float32), bunch.target, strict=True))
