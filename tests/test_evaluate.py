"""What `evaluate` promises about any callable that predicts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portaisys.evaluate import accuracy, class_recall, correct, latency, parity, predict_rows, summarize
from portaisys.spec import UserError

# The same cases on every run, and no deadline: the machine is shared.
repeatable = settings(derandomize=True, deadline=None)


def _logits(rows: int, classes: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, classes)).astype(np.float32)


@repeatable
@given(rows=st.integers(1, 60), batch=st.integers(1, 70))
def test_predicting_in_chunks_gives_every_row_once_and_in_order(rows, batch):
    x, seen = _logits(rows), []

    def run(chunk):
        seen.append(len(chunk))
        return 2 * chunk

    np.testing.assert_array_equal(predict_rows(run, x, batch), 2 * x)
    assert max(seen) <= batch


def test_predicting_no_rows_is_refused():
    with pytest.raises(UserError, match="no rows"):
        predict_rows(lambda chunk: chunk, _logits(0), batch=4)


@pytest.mark.parametrize("run", [lambda chunk: chunk[:1], lambda chunk: chunk.argmax(axis=1)])
def test_a_model_that_does_not_answer_row_for_row_with_logits_is_refused(run):
    with pytest.raises(UserError, match=r"must answer 4 rows with logits"):
        predict_rows(run, _logits(8), batch=4)


def test_accuracy_is_the_fraction_of_rows_answered_rightly():
    logits = np.eye(4)[[0, 1, 2, 3]]
    assert accuracy(logits, np.array([0, 1, 2, 0])) == 0.75
    assert correct(logits, np.array([0, 1, 2, 0])).dtype == np.bool_


def test_a_row_of_nan_is_never_right():
    assert accuracy(np.full((3, 2), np.nan), np.zeros(3, dtype=int)) == 0.0


def test_recall_is_counted_within_each_class_and_unknown_for_an_absent_one():
    y = np.array([0, 0, 1, 1, 1, 2])
    answers = np.array([0, 1, 1, 1, 0, 2])
    np.testing.assert_allclose(class_recall(np.eye(4)[answers], y, classes=4), [1 / 2, 2 / 3, 1.0, np.nan])


def test_an_engine_is_at_parity_with_itself():
    logits = _logits(7)
    same = parity(logits, logits.copy())
    assert (same.max_abs, same.argmax_agreement, same.finite, same.rows) == (0.0, 1.0, True, 7)


def test_parity_reports_the_largest_difference_and_the_share_of_equal_answers():
    reference = np.eye(4, dtype=np.float32)
    candidate = reference.copy()
    candidate[0] = [0.0, 2.5, 0.0, 0.0]
    found = parity(reference, candidate)
    assert found.max_abs == 2.5
    assert found.argmax_agreement == 0.75


def test_parity_of_halves_is_measured_in_double_precision():
    found = parity(np.full((1, 2), 6e4, dtype=np.float16), np.full((1, 2), -6e4, dtype=np.float16))
    assert found.finite
    assert found.max_abs == pytest.approx(1.2e5, rel=1e-3)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate", "both"])
def test_logits_that_are_not_finite_are_never_at_parity(poison, side):
    sides = {"reference": _logits(4), "candidate": _logits(4)}
    for name in sides if side == "both" else [side]:
        sides[name][1, 0] = poison
    found = parity(**sides)
    assert not found.finite
    assert found.max_abs == float("inf")
    assert found.argmax_agreement == 0.75


@pytest.mark.parametrize("shape", [(3, 5), (4, 6), (4, 1)])
def test_parity_of_different_shapes_is_refused(shape):
    with pytest.raises(UserError, match="parity"):
        parity(_logits(4), np.zeros(shape, dtype=np.float32))


def test_parity_of_nothing_is_refused():
    with pytest.raises(UserError, match="parity"):
        parity(_logits(0), _logits(0))


def _recorded_rounds(seed: int) -> list[tuple[str, ...]]:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    ms = latency(calls, rounds=30, warmup=2, seed=seed)
    assert {name: times.shape for name, times in ms.items()} == {"a": (30,), "b": (30,), "c": (30,)}
    assert all((times >= 0).all() for times in ms.values())
    return [tuple(order[start : start + 3]) for start in range(0, len(order), 3)]


def test_every_round_of_timing_makes_each_call_once_and_the_order_changes():
    rounds = _recorded_rounds(seed=0)
    assert len(rounds) == 32
    assert {tuple(sorted(round_)) for round_ in rounds} == {("a", "b", "c")}
    assert len(set(rounds)) == 6


def test_the_order_of_timing_follows_the_seed():
    assert _recorded_rounds(seed=1) == _recorded_rounds(seed=1)
    assert _recorded_rounds(seed=1) != _recorded_rounds(seed=2)


def test_times_are_filed_under_the_call_they_belong_to_and_its_round(monkeypatch):
    clock = [0]
    monkeypatch.setattr("time.perf_counter_ns", lambda: clock[0])
    cost = {"slow": iter(range(3_000_000, 99_000_000, 1_000_000)), "fast": iter(range(1_000, 99_000, 1_000))}
    calls = {name: (lambda name=name: clock.__setitem__(0, clock[0] + next(cost[name]))) for name in cost}
    ms = latency(calls, rounds=4, warmup=1, seed=0)
    np.testing.assert_allclose(ms["slow"], [4, 5, 6, 7])
    np.testing.assert_allclose(ms["fast"], [0.002, 0.003, 0.004, 0.005])


def test_a_latency_summary_holds_the_median_the_99th_percentile_and_the_rounds():
    assert summarize(np.arange(101.0)) == {"latency_ms_p50": 50.0, "latency_ms_p99": 99.0, "rounds": 101}
