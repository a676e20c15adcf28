"""Scores in, Decision(action, because) out: paired statistics, never a bare comparison of two means.

Judges accuracy and the recall of each class (non-inferiority on the same rows), speed (paired rounds) and parity, and
says how many rows a judgement takes. Knows nothing of models, engines or files, and acts on nothing: others carry its decisions out.

Throughout, of n rows that both models answered, b were answered rightly by the baseline alone and c by the
candidate alone; the drop is d = (b - c) / n, a fraction. Every bound is one-sided, unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from portaisys.evaluate import Parity
from portaisys.spec import UserError

Action = Literal["pass", "fail", "inconclusive"]
Correct = NDArray[np.bool_]

# More rows than anyone labels for one test split: beyond it we say "too near the margin" and name no number.
REASONABLE_ROWS = 1_000_000
RESAMPLES = 2_000
# With fewer rounds the bootstrap has too few blocks to see the noise; one round would always look certain.
LEAST_ROUNDS = 20


@dataclass(frozen=True)
class Decision:
    """A verdict, its reason in words with figures, and the figures themselves (JSON-able)."""

    action: Action
    because: str
    figures: Mapping[str, float | int]

    def to_dict(self) -> dict[str, Any]:
        """The decision as plain JSON-able values."""
        return {"action": self.action, "because": self.because, "figures": dict(self.figures)}


# --- accuracy: Tango's interval -----------------------------------------------------------------------------------


def tango_bound(b: float, c: float, n: float, confidence: float) -> tuple[float, float]:
    """Lower and upper bound of d = (b - c) / n, each one-sided at `confidence`.

    The score interval of Tango (1998), Statistics in Medicine 17:891-908. Unlike Wald's it holds without a
    discordant pair: at b = c = 0 the upper bound is z^2 / (n + z^2), not 0.
    """
    assert n > 0 and b >= 0 and c >= 0 and b + c <= n, (b, c, n)
    z = _z(confidence)
    return -_upper(c, b, n, z), _upper(b, c, n, z)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(confidence)


def _upper(b: float, c: float, n: float, z: float) -> float:
    # Bisection, not a root finder: at b = c = 0 and at d = -1 the equation has a second, spurious root at d itself.
    low, high = (b - c) / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if b - c - n * middle + z * math.sqrt(n * _variance(b / n, c / n, middle)) > 0:
            low = middle
        else:
            high = middle
    return high


def _variance(b_share: float, c_share: float, d: float) -> float:
    """Variance of one row's (b - c) were the true difference `d`: Tango's constrained maximum-likelihood estimate."""
    linear = (2 - b_share + c_share) * d - b_share - c_share
    root = math.sqrt(max(0.0, linear**2 + 8 * c_share * d * (1 - d)))
    return max(0.0, (root - linear) / 2 + d * (1 - d))


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value of McNemar's test of b = c. Reported only: "not significant" is no evidence of equality."""
    return min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5)))


def corrected(confidence: float, looks: int) -> float:
    """Bonferroni: the confidence of one look, so that all `looks` at the same test split together keep `confidence`.

    `looks` >= 1 counts every distinct look, this family of candidates included. It holds for the looks so far, judged
    at today's count; verdicts passed earlier, at a smaller count, are not taken back by later ones.
    """
    assert looks >= 1, looks
    return 1 - (1 - confidence) / looks


def non_inferior(baseline_correct: Correct, candidate_correct: Correct, margin: float, confidence: float, looks: int = 1) -> Decision:
    """Whether the candidate loses at most `margin` (a fraction) of accuracy, from paired booleans [n], [n].

    Upper bound of the drop <= margin: pass. Lower bound > margin: fail. Otherwise inconclusive, with `n_needed`, the
    rows that would decide it at this drop and discordance (absent where that is more than REASONABLE_ROWS).
    Raises UserError when the two did not answer the same rows.
    """
    n, b, c = _discordant(baseline_correct, candidate_correct)
    each = corrected(confidence, looks)
    low, high = tango_bound(b, c, n, each)
    figures: dict[str, float | int] = {
        "n": n, "b": b, "c": c, "drop": (b - c) / n, "low": low, "high": high, "margin": margin, "confidence": confidence,
        "looks": looks, "corrected_confidence": each, "mcnemar_p": mcnemar(b, c),
    }  # fmt: skip
    drop = f"accuracy drop {_points((b - c) / n)} points, {_percent(each)}"
    if high <= margin:
        return Decision("pass", f"{drop} bound {_points(high)} <= margin {_points(margin)} (n={n:,})", figures)
    if low > margin:
        return Decision("fail", f"{drop} lower bound {_points(low)} > margin {_points(margin)} (n={n:,})", figures)
    between = f"{drop} bounds {_points(low)} and {_points(high)} enclose margin {_points(margin)} (n={n:,})"
    needed = _rows(margin, (b - c) / n, _variance(b / n, c / n, margin), _z(each))
    if needed > REASONABLE_ROWS:
        return Decision("inconclusive", f"{between}; the drop is too near the margin for any reasonable number of rows", figures)
    because = f"{between}; about {needed:,} rows would decide, should drop and discordance stay as observed"
    return Decision("inconclusive", because, {**figures, "n_needed": int(needed)})


# --- recall of each class -----------------------------------------------------------------------------------------


def classes_non_inferior(
    y: NDArray[np.int64], baseline_correct: Correct, candidate_correct: Correct, labels: Sequence[str], margin: float, confidence: float, looks: int = 1
) -> Decision:
    """Whether every class that has rows in y [n] loses at most `margin` (a fraction of its own rows) of recall, from paired booleans [n], [n].

    `non_inferior` on the rows of each class, the confidence corrected (Bonferroni) for classes times looks. All pass: pass.
    The lower bound of one is beyond the margin: fail. Otherwise inconclusive. The verdict names the worst class; its index is `class` of the figures.
    """
    there = [int(index) for index in np.unique(y)]
    found = {index: non_inferior(baseline_correct[y == index], candidate_correct[y == index], margin, confidence, looks * len(there)) for index in there}
    failed = [index for index in there if found[index].action == "fail"]
    worst = max(failed, key=lambda index: found[index].figures["low"]) if failed else max(there, key=lambda index: found[index].figures["high"])
    action = found[worst].action
    figures = {**found[worst].figures, "class": worst, "classes": len(there), "classes_failed": len(failed), "looks": looks}
    return Decision(action, f"worst class {labels[worst]!r}: {_class_said(figures, action)}", figures)


def _class_said(figures: Mapping[str, float | int], action: Action) -> str:
    low, high, margin = (_points(figures[name]) for name in ("low", "high", "margin"))
    bound = {"pass": f"bound {high} <= margin {margin}", "fail": f"lower bound {low} > margin {margin}", "inconclusive": f"bounds {low} and {high} enclose margin {margin}"}[action]
    others = f"; {figures['classes_failed']:,} classes fail" if figures["classes_failed"] > 1 else ""
    decides = f"; about {figures['n_needed']:,} rows of it would decide" if "n_needed" in figures else ""
    each = f"corrected for {figures['classes']} classes x {figures['looks']} look{'s' * (figures['looks'] != 1)} (Bonferroni)"
    return f"recall drop {_points(figures['drop'])} points, {_percent(figures['corrected_confidence'])} {bound} (n={figures['n']:,}; {each}{decides}{others})"


def macro_f1_drop(
    y: NDArray[np.int64], baseline: NDArray[np.int64], candidate: NDArray[np.int64], classes: int, confidence: float, seed: int = 0
) -> dict[str, float]:
    """`drop` of macro-F1 from one model's answers [n] to another's, with `low` and `high`, each one-sided at `confidence`: reported, not gated.

    Paired bootstrap (Efron 1979) over rows, percentiles; rows of like label and answers are drawn together, which is the same draw. -1 answers no class.
    """
    cells, counts = np.unique(np.stack([y, baseline, candidate]), axis=1, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(y), counts / len(y), size=RESAMPLES)
    drops = _macro_f1(drawn, cells[0], cells[1], classes) - _macro_f1(drawn, cells[0], cells[2], classes)
    drop = _macro_f1(counts[None], cells[0], cells[1], classes) - _macro_f1(counts[None], cells[0], cells[2], classes)
    low, high = np.quantile(drops, (1 - confidence, confidence))
    return {"drop": float(drop[0]), "low": float(low), "high": float(high), "confidence": confidence}


def _macro_f1(counts: NDArray[Any], y: NDArray[np.int64], answers: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """[draws] from counts [draws, cells] of (label, answer): mean over the classes that were drawn."""
    of = np.eye(classes + 1)  # the last row: -1, no class
    rows, given, hits = (counts.astype(np.float64) @ part for part in (of[y], of[answers], of[y] * (y == answers)[:, None]))
    f1 = np.divide(2 * hits, rows + given, out=np.zeros_like(hits), where=rows > 0)[:, :classes]
    return np.asarray(f1.sum(1) / (rows[:, :classes] > 0).sum(1))


def accuracy_interval(accuracy: float, rows: int, confidence: float) -> tuple[float, float]:
    """Two-sided interval of one accuracy over so many rows (Wilson 1927), for a picture: verdicts come from paired rows."""
    z2 = _z((1 + confidence) / 2) ** 2
    middle, half = (accuracy + z2 / (2 * rows)) / (1 + z2 / rows), math.sqrt(z2 * (accuracy * (1 - accuracy) / rows + z2 / (4 * rows**2))) / (1 + z2 / rows)
    return max(0.0, middle - half), min(1.0, middle + half)


def _discordant(baseline: Correct, candidate: Correct) -> tuple[int, int, int]:
    if baseline.ndim != 1 or baseline.shape != candidate.shape or not baseline.size:
        raise UserError(f"gate: baseline and candidate must answer the same rows; got {list(baseline.shape)} and {list(candidate.shape)}")
    assert baseline.dtype == candidate.dtype == np.bool_, "on integers ~ would count wrong pairs without a word"
    return len(baseline), int((baseline & ~candidate).sum()), int((~baseline & candidate).sum())


def _points(fraction: float) -> str:
    return f"{100 * fraction:.3g}"


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.4g} %"


# --- how many rows a judgement takes ------------------------------------------------------------------------------


def _rows(margin: float, d: float, variance: float, z: float, spread: float = 0.0) -> float:
    """n at which sqrt(n) |d - margin| reaches z sqrt(variance) + spread: infinite at the margin itself."""
    if d == margin:
        return math.inf
    return math.ceil(((z * math.sqrt(variance) + spread) / (d - margin)) ** 2)


def planned_rows(margin: float, discordance: float, confidence: float, power: float = 0.8) -> int:
    """Test rows at which the gate decides both ways with at least `power`.

    A candidate of no true loss, differing from the baseline in a fraction `discordance` of rows, passes; one that
    loses twice the margin fails, though its loss come on top of that discordance. Pass the `corrected` confidence.
    Sample size of the score test, Nam (1997), Biometrics 53:1422-1430: asymptotic, within a point of the power asked.
    """
    z, z_power = _z(confidence), _z(power)
    half = discordance / 2
    no_loss = _rows(margin, 0.0, _variance(half, half, margin), z, z_power * math.sqrt(discordance))
    loss = 2 * margin
    sd_lossy = math.sqrt(discordance + loss - loss**2)
    lossy = _rows(margin, loss, _variance(half + loss, half, margin), z, z_power * sd_lossy)
    return int(max(no_loss, lossy))


def least_rows(margin: float, confidence: float, looks: int = 1) -> int:
    """Rows below which not even a candidate that never differs from the baseline could pass."""
    return int(_rows(margin, 0.0, _variance(0.0, 0.0, margin), _z(corrected(confidence, looks))))


def refuse_undecidable(rows: int, margin: float, confidence: float, looks: int = 1) -> None:
    """Raise UserError, before any work is spent, when `rows` test rows cannot pass any candidate."""
    each = corrected(confidence, looks)
    _, bound = tango_bound(0, 0, rows, each)
    if bound <= margin:
        return
    raise UserError(
        f"gate.max_accuracy_drop: {margin:g} cannot be decided with {rows:,} test rows at {_percent(each)} confidence "
        f"(looks at this test split: {looks}): even a candidate that never differs has a bound of {bound:.4f}; "
        f"give at least {least_rows(margin, confidence, looks):,} test rows (data.test_rows) "
        f"or widen gate.max_accuracy_drop to at least {math.ceil(bound * 1e4) / 1e4:.4f}"
    )


def refuse_undecidable_classes(rows: Mapping[str, int], margin: float, confidence: float, looks: int = 1) -> None:
    """Raise UserError, before any work is spent, when a class has too few test rows to pass any candidate. `rows`: of each class by its label."""
    tests = looks * len(rows)
    label = min(rows, key=lambda name: rows[name])
    _, bound = tango_bound(0, 0, rows[label], corrected(confidence, tests))
    if bound <= margin:
        return
    needed = least_rows(margin, confidence, tests)
    few = sum(count < needed for count in rows.values())
    raise UserError(
        f"gate.max_class_recall_drop: {margin:g} cannot be decided for class {label!r}, which has {rows[label]:,} test rows and needs {needed:,} "
        f"at {_percent(corrected(confidence, tests))} confidence ({len(rows)} classes x {looks} looks at this test split){f'; {few} classes have too few' if few > 1 else ''}: "
        f"even a candidate that never differs has a bound of {bound:.4f}; give more test rows (data.test_rows), "
        f"widen gate.max_class_recall_drop to at least {math.ceil(bound * 1e4) / 1e4:.4f}, or leave it out: recall is then reported and not gated"
    )


# --- speed and parity ---------------------------------------------------------------------------------------------


def faster(baseline_ms: NDArray[np.float64], candidate_ms: NDArray[np.float64], confidence: float, seed: int = 0) -> Decision:
    """Whether the candidate is faster, from paired rounds [rounds], [rounds] in milliseconds (`evaluate.latency`).

    The ratio candidate / baseline of medians with a two-sided bootstrap interval: upper bound < 1 passes, lower
    bound >= 1 fails. Raises UserError when the rounds are not paired or are fewer than LEAST_ROUNDS.
    """
    if baseline_ms.shape != candidate_ms.shape or len(baseline_ms) < LEAST_ROUNDS:
        shapes = f"{list(baseline_ms.shape)} and {list(candidate_ms.shape)}"
        raise UserError(f"gate.latency_pairs: needs {LEAST_ROUNDS} or more paired rounds, got {shapes}")
    ratio = float(np.median(candidate_ms) / np.median(baseline_ms))
    index = _resampled(len(baseline_ms), np.random.default_rng(seed))
    ratios = np.median(candidate_ms[index], axis=1) / np.median(baseline_ms[index], axis=1)
    low, high = (float(bound) for bound in np.quantile(ratios, ((1 - confidence) / 2, (1 + confidence) / 2)))
    action: Action = "pass" if high < 1 else "fail" if low >= 1 else "inconclusive"
    verdict = {"pass": "faster", "fail": "not faster", "inconclusive": "1 lies within, more rounds may decide"}[action]
    interval = f"{_percent(confidence)} interval {low:.3f} to {high:.3f}"
    because = f"latency ratio {ratio:.3f}, {interval}: {verdict} ({len(baseline_ms)} paired rounds)"
    return Decision(action, because, {"ratio": ratio, "low": low, "high": high, "rounds": len(baseline_ms)})


def _resampled(rounds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Round numbers [RESAMPLES, rounds], drawn in circular blocks of consecutive rounds (Politis & Romano 1992)."""
    # A busy neighbour or a clock change lasts for many rounds. Rounds drawn one by one would count such a spell as
    # many independent witnesses and give an interval far too narrow; a block keeps the spell together. Simulated with
    # no difference and 300 rounds (nominal: 2.5 % wrongly "faster"): noise of lag-1 correlation 0.8 gives 18 % with
    # single rounds, 5 % with blocks of sqrt(rounds); 0.95, in each engine for itself, 32 % and 12 %.
    length = math.ceil(math.sqrt(rounds))
    starts = rng.integers(rounds, size=(RESAMPLES, math.ceil(rounds / length), 1))
    blocks = (starts + np.arange(length)) % rounds
    return blocks.reshape(RESAMPLES, -1)[:, :rounds]


def parity_ok(parity: Parity, tolerance: float) -> Decision:
    """Whether two engines' logits are finite and nowhere further apart than `tolerance` (logits)."""
    figures: dict[str, float | int] = {"tolerance": tolerance, "argmax_agreement": parity.argmax_agreement, "rows": parity.rows}
    if not parity.finite:
        # No max_abs among the figures: infinity is not JSON.
        return Decision("fail", f"NaN or infinity among the logits of {parity.rows:,} rows", figures)
    figures["max_abs"] = parity.max_abs
    if parity.max_abs <= tolerance:
        return Decision("pass", f"largest difference {parity.max_abs:.3g} <= tolerance {tolerance:g} ({parity.rows:,} rows)", figures)
    return Decision("fail", f"largest difference {parity.max_abs:.3g} > tolerance {tolerance:g} ({parity.rows:,} rows)", figures)


# --- the choice ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """An engine that may be served; `because` says why it is admissible or not."""

    name: str
    admissible: bool
    latency_ms_p50: float
    because: str


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The fastest admissible candidate; the first of equals, so put the plainest first."""
    admissible = [candidate for candidate in candidates if candidate.admissible]
    assert admissible, "the dense fp32 engine is always admissible"
    return min(admissible, key=lambda candidate: candidate.latency_ms_p50)
