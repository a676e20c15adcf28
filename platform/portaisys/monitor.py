"""Windows of what serving saw -> a Decision: keep, or fall back to a more precise engine. Pure: it acts on nothing and knows no clock.

A window counts rows that an engine answered and, of those, rows that the reference (the version's fp32 engine) answered too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

DIFFERS = 1e-2  # of the largest answer, where there are no classes to decide between


@dataclass(frozen=True)
class Decision:
    """What to do and why, with the figures behind it."""

    action: Literal["keep", "fall back"]
    because: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Bounds:
    """`agreement`: the least share of rows that must be answered as the reference answers them; `confidence`: that it is below; `rows`: compared before anything is said."""

    agreement: float = 0.98
    confidence: float = 0.99
    rows: int = 50


@dataclass
class Window:
    """Since an engine took over. `odd`: rows with NaN or infinity in their answer; `agreed`: of the rows `compared` with the reference."""

    rows: int = 0
    odd: int = 0
    compared: int = 0
    agreed: int = 0


def decide(window: Window, bounds: Bounds) -> Decision:
    """"fall back" when an answer was no number, or when the share that agrees is below its bound beyond doubt; else "keep".

    Beyond doubt: the upper end of the one-sided exact interval (Clopper and Pearson 1934, Biometrika 26, p. 404) is below it, so a few
    ties that fell the other way change nothing.
    """
    figures = {"rows": window.rows, "odd": window.odd, "compared": window.compared, "agreed": window.agreed}
    if window.odd:
        return Decision("fall back", f"{window.odd} of {window.rows} rows were answered with NaN or infinity", figures)
    if window.compared < bounds.rows:
        return Decision("keep", f"{window.compared} rows compared, too few to say", figures)
    upper = _upper(window.agreed, window.compared, bounds.confidence)
    share = f"{window.agreed / window.compared:.2%} of {window.compared} rows as the reference, {bounds.confidence:.0%} bound {upper:.2%}"
    if upper < bounds.agreement:
        return Decision("fall back", f"{share} < {bounds.agreement:.2%}", {**figures, "upper": upper})
    return Decision("keep", f"{share} >= {bounds.agreement:.2%}", {**figures, "upper": upper})


def _upper(agreed: int, compared: int, confidence: float) -> float:
    return 1.0 if agreed == compared else float(stats.beta.ppf(confidence, agreed + 1, compared - agreed))


def differing(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> int:
    """Rows whose answers differ: in their largest score, where an output is [n, classes]; else in any number, by more than DIFFERS of the largest."""
    rows = len(next(iter(one.values())))
    wrong = np.zeros(rows, bool)
    for name, array in one.items():
        others = other.get(name)
        if others is None or others.shape != array.shape:
            return rows
        if array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind == "f":
            wrong |= array.argmax(1) != others.argmax(1)
        else:
            off = np.abs(np.subtract(array, others, dtype=np.float64)).reshape(rows, -1).max(1, initial=0)
            wrong |= off > DIFFERS * float(np.abs(array.astype(np.float64)).max(initial=0))
    return int(wrong.sum())
