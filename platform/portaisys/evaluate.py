"""Scores any `predict` callable: accuracy, macro-F1, recall of each class, parity with a reference, latency.

Written once and used for eager, pruned, INT8, ONNX and TensorRT alike: a callable goes in, numbers come out.
Knows nothing of what stands behind the callable, of files, and of what is good enough (`gate` judges).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys.spec import UserError

Array = NDArray[Any]


def predict_rows(run: Callable[[Array], Array], x: Array, batch: int) -> Array:
    """Logits [n, classes] of `x` [n, ...], computed in chunks of at most `batch` rows.

    Raises UserError when there are no rows, or when `run` does not answer row for row.
    """
    if not len(x):
        raise UserError("data: there are no rows to predict; the split is empty")
    chunks = [x[start : start + batch] for start in range(0, len(x), batch)]
    answers = [np.asarray(run(chunk)) for chunk in chunks]
    for chunk, answer in zip(chunks, answers, strict=True):
        if answer.ndim != 2 or len(answer) != len(chunk):
            raise UserError(f"model: must answer {len(chunk)} rows with logits [{len(chunk)}, classes]; it gave {list(answer.shape)}")
    return np.concatenate(answers)


def answered(logits: Array) -> NDArray[np.int64]:
    """The class that each row of logits [n, classes] answers, int64 [n]; -1 where a logit is NaN."""
    # argmax calls NaN the largest, so a model of nothing but NaN would answer class 0 and be right now and then.
    return np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1)).astype(np.int64)


def correct(logits: Array, y: Array) -> NDArray[np.bool_]:
    """Whether each row of logits [n, classes] is right about y [n]: what the paired gate compares."""
    return np.asarray(answered(logits) == y)


def rows_not_finite(logits: Array) -> int:
    """Of how many rows of logits [n, classes] one is NaN or infinite."""
    return int((~np.isfinite(logits)).any(axis=1).sum())


def accuracy(logits: Array, y: Array) -> float:
    """Fraction in [0, 1] of logits [n, classes] that are right about y [n]."""
    return float(correct(logits, y).mean())


def class_recall(logits: Array, y: Array, classes: int) -> NDArray[np.float64]:
    """Recall in [0, 1] of each class, [classes]; NaN for a class that has no row in y [n]."""
    rows = np.bincount(y, minlength=classes)
    hits = np.bincount(y[correct(logits, y)], minlength=classes)
    recall = np.full(classes, np.nan)
    np.divide(hits, rows, out=recall, where=rows > 0)
    return recall


def macro_f1(answers: NDArray[np.int64], y: NDArray[np.int64], classes: int) -> float:
    """Mean over the classes that have rows in y [n] of 2 TP / (2 TP + FP + FN), in [0, 1]; `answers` [n], -1 for none."""
    rows, given = np.bincount(y, minlength=classes), np.bincount(answers[answers >= 0], minlength=classes)
    hits = np.bincount(y[answers == y], minlength=classes)
    there = rows > 0
    return float((2 * hits[there] / (rows[there] + given[there])).mean())


@dataclass(frozen=True)
class Parity:
    """How far one engine's logits are from another's on the same rows.

    `max_abs`: the largest absolute difference, in logits; infinite when either side holds a NaN or infinity.
    `argmax_agreement`: fraction in [0, 1] of rows with the same answer; a row that is not finite agrees with nothing.
    """

    max_abs: float
    argmax_agreement: float
    finite: bool
    rows: int


def parity(reference: Array, candidate: Array) -> Parity:
    """Compare logits [n, classes] of two engines. Raises UserError when the shapes differ or there are no rows."""
    if reference.shape != candidate.shape or not reference.size:
        raise UserError(f"parity: needs the same rows and classes twice, got {list(reference.shape)} and {list(candidate.shape)}")
    finite = np.isfinite(reference) & np.isfinite(candidate)
    same = (reference.argmax(axis=-1) == candidate.argmax(axis=-1)) & finite.all(axis=-1)
    sound = bool(finite.all())
    # float64, since float16 logits may differ by more than float16 can hold.
    max_abs = float(np.abs(np.subtract(reference, candidate, dtype=np.float64)).max()) if sound else float("inf")
    return Parity(max_abs, float(same.mean()), sound, len(reference))


def latency(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Milliseconds per call, [rounds] for each name, after `warmup` rounds that are thrown away.

    A round makes each call once, in a fresh seeded order, so that row i of every array met the same state of the
    machine: the arrays are paired, and no call always follows the same other one.
    """
    names = list(calls)
    rng = np.random.default_rng(seed)
    ms = np.empty((len(names), warmup + rounds))
    for column in range(warmup + rounds):
        for row in rng.permutation(len(names)):
            ms[row, column] = _ms(calls[names[row]])
    return {name: ms[row, warmup:] for row, name in enumerate(names)}


def _ms(call: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e6


def summarize(ms: Array) -> dict[str, float | int]:
    """JSON-able summary of latencies [rounds] in milliseconds."""
    p50, p99 = np.percentile(ms, (50, 99))
    return {"latency_ms_p50": float(p50), "latency_ms_p99": float(p99), "rounds": len(ms)}
