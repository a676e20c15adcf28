"""What `gate` promises: its intervals are right, and over many candidates its decisions are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import xlogy

from portaisys.evaluate import parity
from portaisys.gate import (
    Candidate,
    Decision,
    accuracy_interval,
    choose,
    classes_non_inferior,
    corrected,
    faster,
    least_rows,
    mcnemar,
    non_inferior,
    parity_ok,
    planned_rows,
    refuse_undecidable,
    refuse_undecidable_classes,
    tango_bound,
)
from portaisys.spec import UserError

# Of the simulations.
MARGIN, DISCORDANCE, CONFIDENCE, CANDIDATES = 0.005, 0.04, 0.95, 1000
# The same cases on every run, and no deadline: the machine is shared.
repeatable = settings(derandomize=True, deadline=None)

# --- Tango's interval ---------------------------------------------------------------------------------------------


@st.composite
def tables(draw):
    n = draw(st.integers(1, 3000))
    b = draw(st.integers(0, n))
    return b, draw(st.integers(0, n - b)), n


confidences = st.floats(0.51, 0.9999)


@pytest.mark.parametrize(
    ("table", "confidence", "published"),
    [
        # Airway hyper-responsiveness (Bentur 2009), as in Fagerland, Lydersen & Laake 2014: two-sided 95 %.
        ((1, 7, 21), 0.975, (-0.517, -0.026)),
        # Consolidation therapy (Cavo 2012), from the tests of R's contingencytables: two-sided 95 %.
        ((6, 16, 161), 0.975, (-0.1240, -0.0054)),
        # R's PropCIs::scoreci.mp(25, 28, 618), which counts (second - first): two-sided 90 %.
        ((28, 25, 618), 0.95, (-0.0148, 0.0247)),
    ],
)
def test_the_interval_is_the_published_one(table, confidence, published):
    digits = max(len(str(bound).split(".")[1]) for bound in published)
    assert tuple(round(bound, digits) for bound in tango_bound(*table, confidence)) == published


def _brute_force(b: int, c: int, n: int, z: float) -> tuple[float, float]:
    """Every d on a grid that the score test does not reject; the nuisance is found by looking at the whole likelihood."""
    d = np.linspace(-0.999, 0.999, 1000)[:, None]
    least = np.maximum(0, -d)
    q = least + ((1 - d) / 2 - least) * np.linspace(0, 1, 1001)
    likelihood = xlogy(b, np.maximum(q + d, 0)) + xlogy(c, q) + xlogy(n - b - c, np.maximum(1 - 2 * q - d, 0))
    best = np.take_along_axis(q, likelihood.argmax(axis=1)[:, None], axis=1)
    score = (b - c - n * d) / np.sqrt(n * (2 * best + d * (1 - d)))
    kept = d[np.abs(score) <= z]
    return float(kept.min()), float(kept.max())


@pytest.mark.parametrize("table", [(0, 0, 10), (3, 0, 10), (10, 0, 10), (0, 7, 7), (4, 6, 10), (1, 7, 21), (25, 25, 50), (30, 3, 80)])
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_the_interval_holds_exactly_the_differences_the_score_test_does_not_reject(table, confidence):
    expected = _brute_force(*table, NormalDist().inv_cdf(confidence))
    np.testing.assert_allclose(tango_bound(*table, confidence), expected, atol=0.005)


@repeatable
@given(table=tables(), confidence=confidences)
def test_the_bounds_enclose_the_observed_difference(table, confidence):
    b, c, n = table
    low, high = tango_bound(b, c, n, confidence)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert low < high


@repeatable
@given(table=tables(), confidence=confidences)
def test_exchanging_the_models_mirrors_the_interval(table, confidence):
    b, c, n = table
    low, high = tango_bound(b, c, n, confidence)
    assert tango_bound(c, b, n, confidence) == (-high, -low)


@repeatable
@given(table=tables(), one=confidences, other=confidences)
def test_more_confidence_never_narrows_the_interval(table, one, other):
    low_less, high_less = tango_bound(*table, min(one, other))
    low_more, high_more = tango_bound(*table, max(one, other))
    assert low_more <= low_less + 1e-12
    assert high_more >= high_less - 1e-12


@repeatable
@given(table=tables(), confidence=confidences)
def test_one_more_row_lost_by_the_candidate_never_lowers_the_upper_bound(table, confidence):
    b, c, n = table
    assume(b + c < n)
    assert tango_bound(b + 1, c, n, confidence)[1] >= tango_bound(b, c, n, confidence)[1] - 1e-12


@repeatable
@given(n=st.integers(1, 1_000_000), confidence=st.floats(0.8, 0.9999))
def test_the_bounds_at_the_corners_are_the_closed_forms(n, confidence):
    z2 = NormalDist().inv_cdf(confidence) ** 2
    assert tango_bound(0, 0, n, confidence) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), abs=1e-8)
    assert tango_bound(n, 0, n, confidence) == pytest.approx(((n - z2) / (n + z2), 1), abs=1e-8)
    assert tango_bound(0, n, n, confidence) == pytest.approx((-1, (z2 - n) / (n + z2)), abs=1e-8)


def test_four_percent_discordance_among_ten_thousand_rows_gives_a_third_of_a_point():
    assert tango_bound(200, 200, 10_000, 0.95) == pytest.approx((-0.0033, 0.0033), abs=5e-5)
    assert tango_bound(208, 192, 10_000, 0.95)[1] <= 0.005 < tango_bound(210, 190, 10_000, 0.95)[1]


# --- the other tests ----------------------------------------------------------------------------------------------


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(2 * 9 / 2**8)


def test_every_look_at_the_test_split_costs_confidence():
    assert corrected(0.95, 1) == pytest.approx(0.95)
    assert corrected(0.95, 5) == pytest.approx(0.99)


# --- non-inferiority ----------------------------------------------------------------------------------------------


def _pair(b: int, c: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    baseline = np.arange(n) >= c
    candidate = (np.arange(n) < c) | (np.arange(n) >= b + c)
    return baseline, candidate


def test_a_small_drop_on_many_rows_passes_and_says_why():
    decision = non_inferior(*_pair(112, 100, 10_000), margin=0.005, confidence=0.95)
    assert decision.action == "pass"
    assert decision.because == "accuracy drop 0.12 points, 95 % bound 0.362 <= margin 0.5 (n=10,000)"


def test_a_large_drop_on_many_rows_fails_and_says_why():
    decision = non_inferior(*_pair(250, 100, 10_000), margin=0.005, confidence=0.95)
    assert decision.action == "fail"
    assert decision.because == "accuracy drop 1.5 points, 95 % lower bound 1.2 > margin 0.5 (n=10,000)"


def test_an_undecided_drop_names_the_rows_that_would_decide_it():
    few = non_inferior(*_pair(14, 10, 1000), margin=0.005, confidence=0.95)
    assert few.action == "inconclusive"
    assert f"about {few.figures['n_needed']:,} rows would decide" in few.because
    times = math.ceil(few.figures["n_needed"] / 1000)
    assert non_inferior(*_pair(14 * times, 10 * times, 1000 * times), margin=0.005, confidence=0.95).action == "pass"
    fewer = times - 2
    assert non_inferior(*_pair(14 * fewer, 10 * fewer, 1000 * fewer), margin=0.005, confidence=0.95).action == "inconclusive"


@pytest.mark.parametrize("margin", [0.005, 0.0050001])
def test_a_drop_at_the_margin_is_called_too_near_to_decide(margin):
    decision = non_inferior(*_pair(55, 5, 10_000), margin=margin, confidence=0.95)
    assert decision.action == "inconclusive"
    assert "too near the margin" in decision.because
    assert "n_needed" not in decision.figures


@repeatable
@given(table=tables(), margin=st.floats(0.001, 0.2), confidence=st.floats(0.8, 0.99), looks=st.integers(1, 9))
def test_a_decision_follows_its_bounds_and_is_plain_json(table, margin, confidence, looks):
    b, c, n = table
    decision = non_inferior(*_pair(b, c, n), margin=margin, confidence=confidence, looks=looks)
    figures = decision.figures
    assert (figures["n"], figures["b"], figures["c"], figures["looks"]) == (n, b, c, looks)
    assert (figures["low"], figures["high"]) == tango_bound(b, c, n, 1 - (1 - confidence) / looks)
    expected = "pass" if figures["high"] <= margin else "fail" if figures["low"] > margin else "inconclusive"
    assert decision.action == expected
    assert figures.get("n_needed", n + 1) > n
    assert json.loads(json.dumps(decision.to_dict(), allow_nan=False))["figures"] == figures


def test_more_looks_at_the_test_split_turn_a_narrow_pass_inconclusive():
    pair = _pair(208, 192, 10_000)
    assert non_inferior(*pair, margin=0.005, confidence=0.95).action == "pass"
    later = non_inferior(*pair, margin=0.005, confidence=0.95, looks=2)
    assert later.action == "inconclusive"
    assert "97.5 %" in later.because


def test_mcnemar_is_reported_and_does_not_decide():
    equal_by_mcnemar = non_inferior(*_pair(3, 3, 100), margin=0.005, confidence=0.95)
    assert equal_by_mcnemar.figures["mcnemar_p"] == 1.0
    assert equal_by_mcnemar.action == "inconclusive"


@pytest.mark.parametrize("rows", [(10, 9), (10, 1), (0, 0)])
def test_answers_to_different_rows_are_refused(rows):
    baseline, candidate = (np.ones(count, dtype=bool) for count in rows)
    with pytest.raises(UserError, match="same rows"):
        non_inferior(baseline, candidate, margin=0.005, confidence=0.95)


# --- recall of each class -----------------------------------------------------------------------------------------


def _by_class(tables: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, baseline and candidate of classes with (b, c, n) each."""
    pairs = [_pair(*table) for table in tables]
    y = np.concatenate([np.full(table[2], index) for index, table in enumerate(tables)])
    return y, np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])


def test_the_class_that_lost_most_is_named_with_its_rows_and_the_correction():
    decision = classes_non_inferior(*_by_class([(0, 0, 400), (90, 0, 100), (2, 2, 400)]), ["cat", "dog", "emu"], 0.1, 0.95, looks=2)
    assert decision.action == "fail" and decision.because.startswith("worst class 'dog': recall drop 90 points, 99.17 % lower bound ")
    assert "> margin 10 (n=100; corrected for 3 classes x 2 looks (Bonferroni))" in decision.because
    assert (decision.figures["class"], decision.figures["looks"], decision.figures["corrected_confidence"]) == (1, 2, pytest.approx(1 - 0.05 / 6))
    json.dumps(decision.to_dict(), allow_nan=False)


def test_all_classes_must_pass_and_one_with_too_few_rows_leaves_it_open():
    enough = [(1, 1, 400)] * 3
    assert classes_non_inferior(*_by_class(enough), "abc", 0.1, 0.95).action == "pass"
    decision = classes_non_inferior(*_by_class([*enough[:2], (0, 0, 20)]), "abc", 0.1, 0.95)
    assert decision.action == "inconclusive" and "worst class 'c'" in decision.because and "rows of it would decide" in decision.because


def test_a_class_without_test_rows_is_neither_judged_nor_corrected_for():
    y, baseline, candidate = _by_class([(1, 1, 400)] * 2)
    assert classes_non_inferior(y * 2, baseline, candidate, "abc", 0.1, 0.95).figures["corrected_confidence"] == pytest.approx(0.975)


def test_the_refusal_names_the_rarest_class_its_rows_and_those_it_needs():
    rows = {"cat": 900, "emu": 40, "dog": 60}
    with pytest.raises(UserError) as refused:
        refuse_undecidable_classes(rows, 0.1, 0.95, looks=2)
    needed = least_rows(0.1, 0.95, 6)
    message = str(refused.value)
    assert message.startswith(f"gate.max_class_recall_drop: 0.1 cannot be decided for class 'emu', which has 40 test rows and needs {needed} ")
    assert "2 classes have too few" not in message or needed > 60
    assert "(3 classes x 2 looks at this test split)" in message and "or leave it out" in message
    refuse_undecidable_classes({name: max(count, needed) for name, count in rows.items()}, 0.1, 0.95, looks=2)


CLASSES, CLASS_MARGIN = 10, 0.1


def _class_share(action: str, loss: float, seed: int, candidates: int = 300) -> float:
    """Share of candidates, of this true loss of recall in one class and of none in the others, that the gate answers with `action`."""
    n, rng = planned_rows(CLASS_MARGIN, DISCORDANCE, corrected(CONFIDENCE, CLASSES), power=0.99), np.random.default_rng(seed)
    y, hits = np.repeat(np.arange(CLASSES), n), 0
    lost = np.where(y == 3, DISCORDANCE / 2 + loss, DISCORDANCE / 2)
    for _ in range(candidates):
        row = rng.random(len(y))
        baseline, candidate = (row < lost) | (row > lost + DISCORDANCE / 2), row >= lost
        hits += classes_non_inferior(y, baseline, candidate, "0123456789", CLASS_MARGIN, CONFIDENCE).action == action
    return hits / candidates


def test_a_class_that_loses_the_margin_hardly_ever_passes_and_candidates_that_lose_nothing_do():
    assert _class_share("pass", CLASS_MARGIN, 0) <= 0.02  # nominal: 0.05 / 10 classes
    assert _class_share("pass", 0.0, 1) >= 0.8
    assert _class_share("fail", 2 * CLASS_MARGIN, 2) >= 0.8


def test_the_interval_of_one_accuracy_is_wilsons():
    from scipy.stats import binomtest

    expected = binomtest(570, 600).proportion_ci(0.95, "wilson")
    assert accuracy_interval(0.95, 600, 0.95) == pytest.approx((expected.low, expected.high))


# --- the simulation: is the gate worth having? --------------------------------------------------------------------

Gate = Callable[[np.ndarray, np.ndarray, float, float], Decision]

def _share(gate: Gate, action: str, loss: float, seed: int) -> float:
    """Share of 1,000 candidates of this true loss that the gate answers with `action`, at the planned rows."""
    n, rng = planned_rows(MARGIN, DISCORDANCE, CONFIDENCE), np.random.default_rng(seed)
    lost, won = (DISCORDANCE + loss) / 2, (DISCORDANCE - loss) / 2
    hits = 0
    for _ in range(CANDIDATES):
        row = rng.random(n)
        baseline = (row < lost) | (row > 0.1 + won)
        candidate = ((row >= lost) & (row < lost + won)) | (row > 0.1 + won)
        hits += gate(baseline, candidate, MARGIN, CONFIDENCE).action == action
    return hits / CANDIDATES


def assert_worth_having(gate: Gate, seed: int = 0) -> None:
    """The three promises of the gate, each over 1,000 seeded candidates."""
    assert _share(gate, "pass", MARGIN, seed) <= 0.065, "passes candidates that lose the margin"
    assert _share(gate, "pass", 0.0, seed + 1) >= 0.80, "does not pass candidates that lose nothing"
    assert _share(gate, "fail", 2 * MARGIN, seed + 2) >= 0.80, "does not fail candidates that lose twice the margin"


def test_the_gate_keeps_its_promises_over_a_thousand_candidates_each():
    assert_worth_having(non_inferior)


def test_a_gate_that_is_always_inconclusive_does_not():
    with pytest.raises(AssertionError, match="does not pass candidates that lose nothing"):
        assert_worth_having(lambda *_: Decision("inconclusive", "who knows", {}))


def test_a_gate_that_never_fails_anyone_does_not():
    def lenient(*args):
        decision = non_inferior(*args)
        return decision if decision.action == "pass" else Decision("inconclusive", "", {})

    with pytest.raises(AssertionError, match="does not fail candidates that lose twice the margin"):
        assert_worth_having(lenient)


def test_a_gate_that_compares_two_means_does_not():
    def compare(baseline, candidate, margin, confidence):
        return Decision("pass" if baseline.mean() - candidate.mean() <= margin else "fail", "", {})

    with pytest.raises(AssertionError, match="passes candidates that lose the margin"):
        assert_worth_having(compare)


@pytest.mark.parametrize("discordance", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("power", [0.8, 0.9])
def test_the_planned_rows_decide_with_the_power_asked_though_the_loss_adds_to_the_discordance(discordance, power):
    n, rng = planned_rows(0.02, discordance, 0.95, power), np.random.default_rng(0)
    counts = rng.multinomial(n, [discordance / 2 + 0.04, discordance / 2, 1 - discordance - 0.04], size=1000)
    failed = np.mean([tango_bound(b, c, n, 0.95)[0] > 0.02 for b, c, _ in counts])
    assert failed >= power - 0.03  # three standard errors of 1,000 candidates are 0.03 to 0.04


def test_planning_for_more_discordance_or_a_finer_margin_takes_more_rows():
    assert planned_rows(0.005, 0.02, 0.95) < planned_rows(0.005, 0.04, 0.95) < planned_rows(0.005, 0.04, 0.99)
    assert planned_rows(0.01, 0.04, 0.95) < planned_rows(0.005, 0.04, 0.95)
    assert planned_rows(0.01, 0.04, 0.95) < planned_rows(0.01, 0.04, 0.95, power=0.9)


# --- the least rows -----------------------------------------------------------------------------------------------


@repeatable
@given(margin=st.floats(0.001, 0.5), confidence=st.floats(0.8, 0.99), looks=st.integers(1, 9))
def test_the_least_rows_are_the_first_at_which_an_unchanged_candidate_passes(margin, confidence, looks):
    n = least_rows(margin, confidence, looks)
    assume(n > 1)
    same = np.ones(n, dtype=bool)
    assert non_inferior(same, same, margin, confidence, looks).action == "pass"
    assert non_inferior(same[1:], same[1:], margin, confidence, looks).action == "inconclusive"
    refuse_undecidable(n, margin, confidence, looks)
    with pytest.raises(UserError):
        refuse_undecidable(n - 1, margin, confidence, looks)


def test_three_hundred_and_sixty_rows_cannot_decide_half_a_point_and_the_refusal_says_what_to_change():
    with pytest.raises(UserError) as refused:
        refuse_undecidable(360, 0.005, 0.95)
    message = str(refused.value)
    assert message.startswith("gate.max_accuracy_drop: 0.005 cannot be decided with 360 test rows")
    assert "bound of 0.0075" in message
    assert "give at least 539 test rows (data.test_rows)" in message
    assert "widen gate.max_accuracy_drop to at least 0.0075" in message
    refuse_undecidable(539, 0.005, 0.95)
    refuse_undecidable(360, 0.0075, 0.95)


# --- speed --------------------------------------------------------------------------------------------------------


def _spells(rounds: int, rng: np.random.Generator) -> np.ndarray:
    """Milliseconds about 10 with noise that lasts: lag-1 correlation 0.95."""
    noise = np.zeros(rounds)
    for i in range(1, rounds):
        noise[i] = 0.95 * noise[i - 1] + rng.normal(scale=0.1)
    return 10 + noise


def test_a_clearly_faster_candidate_passes_and_a_slower_one_fails():
    rng = np.random.default_rng(0)
    baseline = rng.normal(10, 0.5, 300)
    quick, slow = (faster(baseline, factor * rng.normal(10, 0.5, 300), 0.95) for factor in (0.9, 1.1))
    assert (quick.action, slow.action) == ("pass", "fail")
    assert quick.figures["ratio"] == pytest.approx(0.9, abs=0.02)
    assert quick.figures["low"] <= quick.figures["ratio"] <= quick.figures["high"] < 1 <= slow.figures["low"]
    assert quick.figures["rounds"] == 300
    assert quick.because.startswith("latency ratio 0.9")
    json.dumps(quick.to_dict(), allow_nan=False)


def test_two_equals_are_not_told_apart():
    rng = np.random.default_rng(1)
    decisions = [faster(rng.normal(10, 0.5, 100), rng.normal(10, 0.5, 100), 0.95).action for _ in range(40)]
    assert decisions.count("pass") <= 4  # 1 of 40 is nominal
    assert decisions.count("inconclusive") >= 34


def test_a_candidate_that_is_the_baseline_is_not_faster():
    same = np.full(50, 3.0)
    assert faster(same, same, 0.95).action == "fail"


def test_noise_that_lasts_for_many_rounds_widens_the_interval():
    rng = np.random.default_rng(2)
    baseline, candidate = _spells(300, rng), _spells(300, rng)
    shuffled = rng.permutation(300)
    lasting = faster(baseline, candidate, 0.95).figures
    scattered = faster(baseline[shuffled], candidate[shuffled], 0.95).figures
    assert lasting["high"] - lasting["low"] > 1.5 * (scattered["high"] - scattered["low"])


def test_noise_that_both_share_does_not_hide_a_small_gain():
    rng = np.random.default_rng(3)
    shared = _spells(300, rng)
    assert faster(shared, 0.97 * shared + rng.normal(scale=0.01, size=300), 0.95).action == "pass"


def test_the_interval_follows_the_seed():
    rng = np.random.default_rng(4)
    pair = rng.normal(10, 1, 60), rng.normal(10, 1, 60)
    assert faster(*pair, 0.95, seed=1) == faster(*pair, 0.95, seed=1)
    assert faster(*pair, 0.95, seed=1) != faster(*pair, 0.95, seed=2)


@pytest.mark.parametrize("rounds", [(19, 19), (1, 1), (30, 29)])
def test_too_few_or_unpaired_rounds_are_refused(rounds):
    with pytest.raises(UserError, match=r"gate\.latency_pairs"):
        faster(np.ones(rounds[0]), np.ones(rounds[1]), 0.95)


# --- parity and the choice ----------------------------------------------------------------------------------------


def test_parity_within_the_tolerance_passes_and_beyond_it_fails():
    found = parity(np.zeros((3, 2)), np.full((3, 2), 0.5))
    assert parity_ok(found, 0.5).action == "pass"
    assert parity_ok(found, 0.4).action == "fail"
    assert parity_ok(found, 0.4).because == "largest difference 0.5 > tolerance 0.4 (3 rows)"


def test_logits_that_are_not_finite_fail_at_any_tolerance_and_the_verdict_stays_json():
    decision = parity_ok(parity(np.full((3, 2), np.nan), np.zeros((3, 2))), 1e9)
    assert decision.action == "fail"
    assert "NaN" in decision.because
    json.dumps(decision.to_dict(), allow_nan=False)


def test_the_fastest_admissible_engine_is_chosen():
    dense = Candidate("fp32", True, 2.0, "the dense engine")
    pruned = Candidate("pruned", True, 1.0, "gate passed")
    broken = Candidate("int8", False, 0.5, "gate failed")
    assert choose([dense, pruned, broken]) is pruned
    assert choose([dense, broken]) is dense


def test_of_two_equally_fast_engines_the_plainer_first_is_chosen():
    dense, pruned = Candidate("fp32", True, 1.0, ""), Candidate("pruned", True, 1.0, "")
    assert choose([dense, pruned]) is dense
