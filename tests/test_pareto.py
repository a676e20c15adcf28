"""Fronts and their volume."""

from __future__ import annotations

import numpy as np
import pytest

from portaisys.pareto import costs, front, hypervolume, hypervolume_history


def test_costs_are_values_signed_so_that_less_is_better():
    assert costs([{"error": 0.1, "speed": 2, "size": 9}], {"error": "min", "speed": "max"}).tolist() == [[0.1, -2]]
    assert costs([], {"error": "min", "speed": "max"}).shape == (0, 2)


def test_the_front_holds_what_nothing_dominates_and_equal_points_once():
    points = np.array([[1, 3], [2, 2], [3, 1], [2, 3], [2, 2], [4, 4.0]])
    assert front(points) == [0, 1, 2]
    assert front(np.empty((0, 2))) == []


def test_hypervolume_is_the_volume_that_sampling_finds():
    rng = np.random.default_rng(0)
    points, reference = rng.random((12, 3)), np.ones(3)
    samples = rng.random((200_000, 3))
    covered = (points[None] <= samples[:, None]).all(2).any(1).mean()
    assert hypervolume(points, reference) == pytest.approx(covered, abs=0.005)
    history = [row["value"] for row in hypervolume_history(points, reference)]
    assert history == sorted(history) and history[-1] == pytest.approx(hypervolume(points, reference))
    assert hypervolume(points, np.zeros(3)) == 0.0
