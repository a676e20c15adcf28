"""Pareto fronts: what no other point dominates, and the volume that a front dominates. Knows no trials: points are rows of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def costs(values: Sequence[Mapping[str, float]], objectives: Mapping[str, str]) -> NDArray[np.float64]:
    """Rows of values, [rows, objectives], signs turned so that less is better. `objectives`: name -> min or max."""
    return np.array([[row[name] * (1 if mode == "min" else -1) for name, mode in objectives.items()] for row in values], dtype=float).reshape(-1, len(objectives))


def front(points: NDArray[np.float64]) -> list[int]:
    """Indices of the rows of `points` [n, objectives] (less is better) that no other row dominates; of equal rows the first."""
    kept: list[int] = []
    for index, point in enumerate(points):
        dominated = ((points <= point).all(1) & (points < point).any(1)).any()
        twin = any((points[other] == point).all() for other in kept)
        if not dominated and not twin:
            kept.append(index)
    return kept


def hypervolume(points: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """Volume dominated by the rows of `points` (less is better) below `reference` (Zitzler & Thiele 1998)."""
    from optuna._hypervolume import compute_hypervolume  # exact (WFG); private, hence the bound on optuna's version and a test

    inside = points[(points < reference).all(1)]
    return float(compute_hypervolume(inside, reference)) if len(inside) else 0.0


def hypervolume_history(points: NDArray[np.float64], reference: NDArray[np.float64]) -> list[dict[str, float]]:
    """Hypervolume after each finished trial."""
    return [{"trials": count, "value": hypervolume(points[:count], reference)} for count in range(1, len(points) + 1)]
