"""One self-contained HTML page a run (before and after, the candidates, verdicts, flipped rows, steps, curves) and one a search (front, parallel coordinates, hypervolume).

Reads artifacts, logs and the test rows whose answers changed; computes no score of its own. What an artifact does not hold is left out.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portaisys import artifact
from portaisys.artifact import Artifact
from portaisys.spec import Spec, to_yaml

if TYPE_CHECKING:
    from portaisys.data import Split

COLUMNS = ("engine", "backend", "status", "accuracy", "params", "MACs", "KiB", "p50 ms", "p99 ms", "verdict")
NUMBERS = range(3, 9)

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;width:100%;font-size:14px}th,td{padding:.4rem .6rem;text-align:left;border-bottom:1px solid #d9dee4}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}tr.best{background:#eaf6ec}.pass{color:#136f2d}.fail{color:#b3261e}
.inconclusive{color:#8a5a00}.wide{overflow-x:auto}pre{background:#f5f7f9;padding:1rem;overflow:auto}svg{max-width:100%;height:auto}code{font-size:13px}
.flips{display:flex;flex-wrap:wrap;gap:.6rem}figure{margin:0;font-size:12px;max-width:15rem}figure img{width:72px;height:72px;object-fit:contain;image-rendering:pixelated;display:block}
"""


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the closing table as text, in the order of COLUMNS; the terminal shows the same."""
    return (
        row["engine"], row["backend"], row["status"], _percent(row["accuracy"]), f"{row['parameters'] / 1e3:,.0f}k",
        f"{row['macs'] / 1e6:,.2f}M", f"{row['size_bytes'] / 1024:,.0f}", _ms(row["latency_ms_p50"]), _ms(row["latency_ms_p99"]), verdict(row),
    )  # fmt: skip


def verdict(row: Mapping[str, Any]) -> str:
    """Admissible, or the word that kept it out."""
    if row["status"] == "built":
        return "not run"
    if not row["verdicts"]:
        return "-"
    failed = [f"{name} {found['action']}" for name, found in row["verdicts"].items() if found["action"] != "pass"]
    return ", ".join(failed) or "admissible"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write(
    path: Path, spec: Spec, artifacts: Mapping[str, Artifact], logs: Mapping[str, Sequence[Mapping[str, Any]]], version: str, test: Split | None = None
) -> Path:
    """Write the page for a finished run: its artifacts and step logs by stage name; `test`: the rows, of which those whose answer changed are shown."""
    rows = artifacts["judge"].scores["rows"]
    best = artifacts["version"].scores["admitted"][0]
    parts = [
        f"<h1>{html.escape(spec.name)}</h1><p>Published as <b>{html.escape(version)}</b>, served by <b>{html.escape(best)}</b> on {_backend(rows, best)}{_choice(artifacts)}.</p>",
        "<h2>Before and after</h2>", _before_and_after(rows, best),
        "<h2>Candidates</h2>", _table(rows, best), _pareto(rows, spec.gate.confidence),
        "<h2>Verdicts</h2>", _intervals(rows), _verdicts(rows, artifacts["judge"].scores["looks"]),
        _titled("Rows whose answer changed", _flips(artifacts["judge"], _compressed(rows, best), best, test)),
        _titled("Sensitivity", _sensitivity(artifacts)),
        "<h2>What each step bought</h2>", _steps(artifacts),
        "<h2>Training</h2>", _curves(logs),
        "<h2>Stages</h2>", _stages(artifacts),
        "<h2>Spec</h2><pre>", html.escape(to_yaml(spec)), "</pre>",
    ]  # fmt: skip
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(spec.name)}: report</title><style>{_STYLE}</style>{"".join(parts)}</html>\n'
    artifact.write_text(path, page)
    return path


def _backend(rows: Sequence[Mapping[str, Any]], best: str) -> str:
    return str(next(row["backend"] for row in rows if row["engine"] == best))


def _choice(artifacts: Mapping[str, Artifact]) -> str:
    """Why this backend, where `auto` chose it."""
    if "choose" not in artifacts:
        return ""
    scores = artifacts["choose"].scores
    return f", chosen by speed: {html.escape(scores['precision'])}, {html.escape(scores['because'])}"


def _table(rows: Sequence[Mapping[str, Any]], best: str) -> str:
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = []
    for row in rows:
        kinds = ["n" if index in NUMBERS else "t" for index in range(len(COLUMNS))]
        texts = [f"<td class='{kind}'>{html.escape(text)}</td>" for kind, text in zip(kinds, cells(row), strict=True)]
        chosen = row["engine"] == best and row["status"] == "executed" and row["admissible"]
        body.append(f"<tr class='{'best' if chosen else ''}'>{''.join(texts)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _titled(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def _rows_of(head: Sequence[str], body: Sequence[Sequence[str]], name: str = "") -> str:
    """A table whose first column names what stands in the others."""
    top = "".join(f"<th class='{'n' if index else 't'}'>{html.escape(text)}</th>" for index, text in enumerate(head))
    lines = ["".join(f"<td class='{'n' if index else 't'}'>{html.escape(text)}</td>" for index, text in enumerate(row)) for row in body]
    return f"<div class='wide'><table id='{name}'><thead><tr>{top}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table></div>"


# --- before and after -----------------------------------------------------------------------------------------------

# Title, key of a row, factor, unit.
_MEASURES = (
    ("accuracy", "accuracy", 100, "%"), ("macro-F1", "macro_f1", 100, "%"), ("parameters", "parameters", 1e-3, "k"), ("MACs", "macs", 1e-6, "M"),
    ("file", "size_bytes", 1 / 1024, "KiB"), ("latency p50, batch 1", "latency_ms_p50", 1, "ms"), ("latency p99, batch 1", "latency_ms_p99", 1, "ms"),
    ("answers as the dense model", "agreement", 100, "%"), ("largest difference of logits", "max_abs", 1, ""), ("rows with NaN or infinity", "rows_not_finite", 1, ""),
)  # fmt: skip


def _before_and_after(rows: Sequence[Mapping[str, Any]], best: str) -> str:
    """The dense torch model, its plain engine and what is served, and from the first to the last what changed."""
    executed = {row["engine"]: row for row in reversed(rows) if row["status"] == "executed"}
    dense, served = rows[0], executed[best]
    shown = list({row["engine"]: row for row in (dense, executed.get("dense fp32", served), served)}.values())
    body = []
    for title, key, factor, unit in _MEASURES:
        values = [row.get(key) for row in shown]
        if any(value is not None for value in values):
            body.append([title, *(_value(value, factor, unit) for value in values), _change(title, key, dense, served)])
    if worst := _worst_class(dense, served):
        body.append(worst[:1] + [""] * (len(shown) - 1) + worst[1:])
    return _rows_of(["", *(f"{row['engine']} ({row['backend']})" for row in shown), "change"], body, "before-and-after")


def _value(value: float | None, factor: float, unit: str) -> str:
    return "-" if value is None else f"{value * factor:,.4g} {unit}".strip()


def _change(title: str, key: str, dense: Mapping[str, Any], served: Mapping[str, Any]) -> str:
    """Of what is judged in pairs the drop with its bounds; of sizes and times the ratio."""
    paired = {"accuracy": ((served.get("verdicts") or {}).get("accuracy") or {}).get("figures"), "macro_f1": served.get("macro_f1_drop")}
    if figures := paired.get(key):
        confidence = figures.get("corrected_confidence", figures.get("confidence", 0))
        return f"drop {100 * figures['drop']:.2f} points, between {100 * figures['low']:.2f} and {100 * figures['high']:.2f} (each at {100 * confidence:.4g} %)"
    if key in ("parameters", "macs", "size_bytes") or key.startswith("latency"):
        before, after = dense.get(key), served.get(key)
        return f"{after / before - 1:+.1%}" if before and after else ""
    return ""


def _worst_class(dense: Mapping[str, Any], served: Mapping[str, Any]) -> list[str]:
    """The class that lost most recall."""
    before, after = dense.get("recall") or {}, served.get("recall") or {}
    drops = {label: before[label] - after[label] for label in before if before[label] is not None and after.get(label) is not None}
    if not drops:
        return []
    label = max(drops, key=lambda name: drops[name])
    return [f"recall of the class that lost most, {label}", f"{before[label]:.2%} to {after[label]:.2%}", f"drop {100 * drops[label]:.2f} points"]


def _pareto(rows: Sequence[Mapping[str, Any]], confidence: float) -> str:
    """Accuracy with its interval against latency, and against MACs; the bubble is as large as the model has parameters, and the line joins what nothing beats."""
    from portaisys.gate import accuracy_interval

    shown = [row for row in rows if row["accuracy"] is not None and row["latency_ms_p50"] is not None]
    if not shown:
        return ""
    figure, most = _figure(11, 4.2), max(row["parameters"] for row in shown) or 1
    for axis, (key, factor, title) in zip(figure.subplots(1, 2, sharey=True), (("latency_ms_p50", 1, "latency p50 at batch 1, ms"), ("macs", 1e-6, "MACs, millions")), strict=True):
        points = [(row[key] * factor, 100 * row["accuracy"]) for row in shown]
        for row, (x, y) in zip(shown, points, strict=True):
            colour = _colour(row)
            if row.get("test_rows"):
                low, high = (100 * bound for bound in accuracy_interval(row["accuracy"], row["test_rows"], confidence))
                axis.errorbar(x, y, yerr=[[max(0.0, y - low)], [max(0.0, high - y)]], color=colour, capsize=3, alpha=0.6)
            axis.scatter(x, y, s=30 + 300 * row["parameters"] / most, color=colour, alpha=0.6, edgecolors="none")
        front = [point for point in sorted(set(points)) if not any(x <= point[0] and y >= point[1] and (x, y) != point for x, y in points)]
        axis.plot(*zip(*front, strict=True), color="#1f5fa8", linewidth=1, linestyle="--")
        axis.set(xlabel=title, xscale="log")
        axis.margins(0.15)
        _ticks(axis)
        axis.grid(alpha=0.3)
        _labels(axis, shown, points)
    figure.axes[0].set_ylabel(f"test accuracy, % ({100 * confidence:.4g} % interval)")
    return _svg(figure, "pareto", "accuracy with its interval against latency and against MACs of each engine; bubbles as large as the parameters, green admissible, red not, grey torch")


def _colour(row: Mapping[str, Any]) -> str:
    return "#6b7680" if row["backend"] == "torch" else "#136f2d" if row["admissible"] else "#b3261e"


def _ticks(axis: Any) -> None:
    """1, 2, 5 of each decade, or where the points lie closer together than that, even steps: one tick gives no scale."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_xlim()
    round_ones = [tick for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high))) for tick in (10**power, 2 * 10**power, 5 * 10**power) if low <= tick <= high]
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if len(round_ones) > 1 else MaxNLocator(4))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _labels(axis: Any, rows: Sequence[Mapping[str, Any]], points: Sequence[tuple[float, float]]) -> None:
    """Right of the panel, in the order of accuracy, a line from each to its point: beside points that lie near each other it could not be told whose a name is."""
    names = Counter(row["engine"] for row in rows)
    order = sorted(range(len(rows)), key=lambda index: (points[index][1], -points[index][0]))
    for place, index in enumerate(order):
        row, height = rows[index], (place + 0.5) / len(rows)
        name = row["engine"] if names[row["engine"]] == 1 else f"{row['engine']} ({row['backend']})"
        line = {"arrowstyle": "-", "color": _colour(row), "alpha": 0.6, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0}
        axis.annotate(name, points[index], xytext=(1.04, height), textcoords="axes fraction", va="center", fontsize=8, color=_colour(row), arrowprops=line)


# --- rows whose answer changed --------------------------------------------------------------------------------------

FLIPS, PAIRS, TEXT = 12, 8, 240  # rows shown of each kind, pairs of classes, characters of a text


def _compressed(rows: Sequence[Mapping[str, Any]], best: str) -> str:
    """The engine whose answers are shown: what is served, or where that is the dense model the smallest candidate that was judged."""
    judged = [row for row in rows if "accuracy" in (row["verdicts"] or {})]
    return best if any(row["engine"] == best for row in judged) or not judged else str(min(judged, key=lambda row: row["size_bytes"])["engine"])


def _flips(judged: Artifact, shown: str, best: str, test: Split | None) -> str:
    """Rows that the dense model answers rightly and another engine wrongly, and the reverse: how many, which classes, some of them."""
    if "answers.npz" not in judged.files:
        return ""
    arrays = artifact.read_arrays(judged.file("answers.npz"))
    y, before, now = arrays["y"], arrays["dense_torch"], arrays[shown.replace(" ", "_")]
    labels = test.table.labels if test else ()
    said = [f"<p>The dense model before, {html.escape(shown)}{', which is served,' if shown == best else ', which was judged and is not served,'} now.</p>"]
    for title, chosen in (("right before, wrong now", (before == y) & (now != y)), ("wrong before, right now", (before != y) & (now == y))):
        positions = chosen.nonzero()[0]
        said.append(f"<h3>{title}: {len(positions):,} of {len(y):,}</h3>")
        counts = Counter((int(y[p]), int(before[p]), int(now[p])) for p in positions)
        pairs = counts.most_common(PAIRS)
        if len(counts) > PAIRS:
            said.append(f"<p>{PAIRS} of {len(counts):,} pairs of classes, those of most rows.</p>")
        if pairs:
            said.append(_rows_of(["class", "before", "now", "rows"], [[*(_named(index, labels) for index in pair), f"{count:,}"] for pair, count in pairs], title.replace(", ", "-").replace(" ", "-")))
        if test:
            said.append(_examples(test, positions[:FLIPS], y, before, now))
    return "".join(said)


def _named(index: int, labels: Sequence[str]) -> str:
    return "none (NaN)" if index < 0 else labels[index] if labels else str(index)


def _examples(test: Split, positions: Any, y: Any, before: Any, now: Any) -> str:
    if not len(positions):
        return ""
    rows, labels, tokens = test.take(positions)[0], test.table.labels, test.table.tokens
    figures = []
    for position, row in zip(positions, rows, strict=True):
        caption = f"row {position}: {_named(int(y[position]), labels)}; before {_named(int(before[position]), labels)}, now {_named(int(now[position]), labels)}"
        if tokens:
            text = tokens.texts[test.indices[position]]
            shown = f"<blockquote>{html.escape(text[:TEXT])}{'…' * (len(text) > TEXT)}</blockquote>"
        else:
            shown = _picture(row, caption)
        figures.append(f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f"<div class='flips'>{''.join(figures)}</div>"


def _picture(row: Any, caption: str) -> str:
    """A row of [1 or 3 channels, height, width] as an inline PNG; of other numbers the first few."""
    if row.ndim != 3 or row.shape[0] not in (1, 3):
        return f"<code>{html.escape(', '.join(f'{value:.3g}' for value in row.reshape(-1)[:8]))}{', …' * (row.size > 8)}</code>"
    import matplotlib.image

    data, low, high = io.BytesIO(), float(row.min()), float(row.max())
    scaled = (row - low) / ((high - low) or 1.0)
    matplotlib.image.imsave(data, scaled[0] if len(row) == 1 else scaled.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1, format="png")
    return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


# --- steps ----------------------------------------------------------------------------------------------------------

LAYERS = 30


def _sensitivity(artifacts: Mapping[str, Artifact]) -> str:
    """What accuracy each layer costs when it alone is compressed, worst first, and beside it what time it takes then: of every artifact that measured it."""
    parts = []
    for name, made in artifacts.items():
        found = sorted(made.scores.get("sensitivity", ()), key=lambda one: -float(one["drop"]))[:LAYERS]
        if not found:
            continue
        timed = any(one.get("latency_ratio") is not None for one in found)
        figure = _figure(11, 1.2 + 0.24 * len(found))
        axes = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
        for axis, (key, factor, title) in zip(axes, (("drop", 100, "validation accuracy drop, points"), ("latency_ratio", 1, "latency over uncompressed")), strict=False):
            # Worse than uncompressed is red in each panel by its own measure: a layer that costs no accuracy may still be slower.
            same = 1.0 if key == "latency_ratio" else 0.0
            heights = [one.get(key) for one in found]
            colours = ["#b3261e" if height is not None and height > same else "#136f2d" for height in heights]
            axis.barh(range(len(found)), [0 if height is None else height * factor for height in heights], color=colours)
            axis.axvline(same, color="#555", linestyle="--", linewidth=1)
            axis.set(title=title, yticks=range(len(found)), yticklabels=[f"{one['layer']} ({one['action']})" for one in found], ylim=(len(found) - 0.5, -0.5))
            axis.grid(alpha=0.3, axis="x")
        parts.append(f"<h3>{html.escape(name)}</h3>" + _svg(figure, f"sensitivity-{name}", f"{name}: drop of accuracy of each layer compressed alone"))
    return "".join(parts)


def _steps(artifacts: Mapping[str, Artifact]) -> str:
    """Each stage's model, beside the first one's, the file it makes, and the seconds it took."""
    first = next((made.scores for made in artifacts.values() if "macs" in made.scores), {})
    body = []
    for name, made in artifacts.items():
        scores = made.scores
        accuracy = scores.get("validation_accuracy")
        beside = f" ({100 * (accuracy - first['validation_accuracy']):+.2f} points)" if accuracy is not None and "validation_accuracy" in first else ""
        sizes = [f"{scores[key] * factor:,.4g} {unit} ({scores[key] / first[key]:.0%})" if scores.get(key) and first.get(key) else "-" for key, factor, unit in (("parameters", 1e-3, "k"), ("macs", 1e-6, "M"))]
        body.append([name, "-" if accuracy is None else f"{accuracy:.2%}{beside}", *sizes, _file_size(scores), f"{made.seconds:,.1f}"])
    total = sum(made.seconds for made in artifacts.values())
    return _rows_of(["stage", "validation accuracy", "parameters", "MACs", "file", "seconds"], [*body, ["all", "", "", "", "", f"{total:,.1f}"]], "steps")


def _file_size(scores: Mapping[str, Any]) -> str:
    """Of a quantized file also beside the fp32 one it was made of: what int8 buys is seen in no other column."""
    fp32 = scores.get("onnx_bytes_fp32")
    rounded = next((size for name, size in scores.items() if name.startswith("onnx_bytes_") and name != "onnx_bytes_fp32"), None)
    if fp32 and rounded:
        return f"{_value(rounded, 1 / 1024, 'KiB')} ({rounded / fp32:.0%} of fp32)"
    return _value(scores.get("size_bytes"), 1 / 1024, "KiB")


def _verdicts(rows: Sequence[Mapping[str, Any]], looks: int) -> str:
    lines = [f"<p>Confidence corrected for {looks} look{'s' if looks != 1 else ''} at this test split (Bonferroni).</p><ul>"]
    for row in rows:
        found = row["verdicts"] or {}
        said = "".join(f"<li><b class='{v['action']}'>{name}: {v['action']}</b> {html.escape(v['because'])}</li>" for name, v in found.items())
        lines.append(f"<li><b>{html.escape(row['engine'])}</b> ({row['backend']}, {row['precision']}, {row['device']}): {html.escape(row['because'])}<ul>{said}</ul></li>")
    return "".join([*lines, "</ul>"])


_COLOURS = {"pass": "#136f2d", "fail": "#b3261e", "inconclusive": "#8a5a00"}


def _intervals(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each candidate's verdict rests on: drops of accuracy and recall and latency ratio against dense with their intervals, and the line they must stay left of."""
    panels = [("accuracy", "drop", 100, "accuracy drop against dense, points"), ("class recall", "drop", 100, "recall drop of the worst class, points"), ("latency", "ratio", 1, "latency over dense")]
    panels = [panel for panel in panels if any(panel[0] in (row["verdicts"] or {}) for row in rows)]
    judged = [row for row in rows if any(name in (row["verdicts"] or {}) for name, *_ in panels)]
    if not judged:
        return ""
    figure = _figure(10, 1.2 + 0.4 * len(judged))
    for axis, (name, key, scale, title) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        shown = [(height, row["verdicts"][name]) for height, row in enumerate(judged) if name in row["verdicts"]]
        for height, found in shown:
            low, middle, high = (found["figures"][part] * scale for part in ("low", key, "high"))
            axis.errorbar(middle, height, xerr=[[middle - low], [high - middle]], fmt="o", capsize=4, color=_COLOURS[found["action"]])
        for limit in {found["figures"].get("margin", 1.0) * scale for _, found in shown}:
            axis.axvline(limit, color="#555", linestyle="--", linewidth=1)
        axis.set(title=title, yticks=range(len(judged)), yticklabels=[row["engine"] for row in judged], ylim=(len(judged) - 0.5, -0.5))
        axis.grid(alpha=0.3, axis="x")
    return _svg(figure, "intervals", "accuracy drop and latency ratio of each candidate with their confidence intervals")


def _stages(artifacts: Mapping[str, Artifact]) -> str:
    body = "".join(
        f"<tr><td>{name}</td><td><code>{found.digest[:12]}</code></td><td class='n'>{found.seconds:.1f}</td><td>{html.escape('; '.join(found.notes)) or '-'}</td></tr>"
        for name, found in artifacts.items()
    )
    return f"<table><thead><tr><th>stage</th><th>digest</th><th>seconds</th><th>notes and fall-backs</th></tr></thead><tbody>{body}</tbody></table>"


def _figure(width: float, height: float) -> Any:
    """An empty figure for SVG, without pyplot's global state."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _svg(figure: Any, name: str, label: str) -> str:
    """The figure as inline SVG that says what it shows; ids carry `name`, so that several stand on one page."""
    import matplotlib

    text = io.StringIO()
    matplotlib.rcParams["svg.hashsalt"] = name
    figure.savefig(text, format="svg")
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    return f'<section id="{name}">{svg.replace("<svg", f"<svg role={chr(34)}img{chr(34)} aria-label={chr(34)}{html.escape(label)}{chr(34)}", 1)}</section>'


def _curves(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Loss and validation accuracy over epochs, a line a stage."""
    figure = _figure(10, 3.4)
    axes = figure.subplots(1, 2)
    for name, rows in logs.items():
        for axis, key in zip(axes, ("loss", "validation_accuracy"), strict=True):
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*_thinned(points), strict=True), label=name, marker=".")
    for axis, title in zip(axes, ("training loss", "validation accuracy"), strict=True):
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    return _svg(figure, "curves", "training loss and validation accuracy over epochs")


def _thinned(points: Sequence[tuple[float, float]], most: int = 500) -> Sequence[tuple[float, float]]:
    """Evenly, and the last: a log has a row every two seconds, and a page should stay small."""
    every = -(-len(points) // most)
    return [*points[:-1:every], points[-1]]


# --- a search -------------------------------------------------------------------------------------------------------


def write_search(path: Path, search: Mapping[str, Any]) -> Path:
    """Write the page of a search: what `tune` leaves in search.json."""
    done = [trial for trial in search["trials"] if trial["state"] == "done"]
    title = html.escape(search["name"])
    parts = [f"<h1>{title}: search</h1><p>{_counts(search['trials'])}. {_chosen(search)}</p>"]
    if done:
        parts += ["<h2>Pareto front</h2>", _scatter(search, done), _front_table(search, done)]
        parts += ["<h2>All finished trials</h2>", _parallel(search, done), "<h2>Hypervolume over time</h2>", _volume(search)]
    parts += ["<h2>Trials without a result</h2>", _without(search["trials"]), "<h2>Space</h2><pre>", html.escape(json.dumps(search["space"], indent=1)), "</pre>"]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}: search</title><style>{_STYLE}</style>{"".join(parts)}</html>\n'
    artifact.write_text(path, page)
    return path


def _counts(trials: Sequence[Mapping[str, Any]]) -> str:
    states = [trial["state"] for trial in trials]
    return f"{len(trials)} trials: " + (", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none")


def _chosen(search: Mapping[str, Any]) -> str:
    if not search["best"]:
        return html.escape(search["because"])
    return f"Best is <b>{search['best']}</b>: {html.escape(search['because'])}. Its spec: <code>{html.escape(search['best_spec'])}</code>"


def _label(objective: Mapping[str, str]) -> str:
    return f"{objective['name']} [{objective['unit']}]" if objective["unit"] else objective["name"]


def _scatter(search: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> str:
    """A panel a pair of objectives; the front stands out, the best is ringed."""
    pairs = list(itertools.combinations(search["objectives"], 2)) or [(search["objectives"][0], search["objectives"][0])]
    figure = _figure(min(4.4 * len(pairs), 13), 3.8)
    for axis, (one, other) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=False):
        for on_front, style in ((False, {"c": "#9aa4af", "s": 18}), (True, {"c": "#b3261e", "s": 34})):
            points = [(trial["values"][one["name"]], trial["values"][other["name"]]) for trial in done if (trial["id"] in search["front"]) is on_front]
            if points:
                axis.scatter(*zip(*points, strict=True), **style)
        best = next(trial["values"] for trial in done if trial["id"] == search["best"])
        axis.scatter(best[one["name"]], best[other["name"]], s=140, facecolors="none", edgecolors="#1b1f24")
        axis.set(xlabel=_label(one), ylabel=_label(other))
        axis.grid(alpha=0.3)
    return _svg(figure, "pareto", "objectives of all finished trials; the Pareto front in red, the chosen trial ringed")


def _front_table(search: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> str:
    names, paths = [objective["name"] for objective in search["objectives"]], list(search["space"])
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ("trial", *names, *paths))
    front = {trial["id"]: trial for trial in done if trial["id"] in search["front"]}
    body = []
    for trial in sorted(front.values(), key=lambda trial: float(trial["values"][names[0]])):
        texts = [trial["id"], *(_number(trial["values"][name]) for name in names), *(_number(trial["params"].get(path, "-")) for path in paths)]
        cells = "".join(f"<td class='{'n' if index else 't'}'>{html.escape(text)}</td>" for index, text in enumerate(texts))
        body.append(f"<tr class='{'best' if trial['id'] == search['best'] else ''}'>{cells}</tr>")
    return f"<div class='wide'><table id='front'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _parallel(search: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> str:
    """Parallel coordinates (Inselberg 1985): an axis a value tried and an objective, a line a trial, coloured by the first objective."""
    import matplotlib

    columns = [(path, [trial["params"].get(path) for trial in done]) for path in search["space"]]
    columns += [(_label(objective), [trial["values"][objective["name"]] for trial in done]) for objective in search["objectives"]]
    heights = [_spread(values) for _, values in columns]
    colour = _spread([trial["values"][search["objectives"][0]["name"]] for trial in done])
    figure = _figure(11, 4.2)
    axis = figure.subplots()
    for index, trial in enumerate(done):
        on_front = trial["id"] in search["front"]
        axis.plot(range(len(columns)), [height[index] for height in heights], color=matplotlib.colormaps["viridis"](colour[index]), alpha=0.95 if on_front else 0.35, lw=2 if on_front else 1)
    for position, (_, values) in enumerate(columns):
        low, high = _ends(values)
        axis.axvline(position, color="#9aa4af", lw=0.8)
        axis.text(position, 1.03, _number(high), ha="center", fontsize=8)
        axis.text(position, -0.07, _number(low), ha="center", fontsize=8)
    axis.set(xticks=range(len(columns)), ylim=(-0.1, 1.1), yticks=[])
    axis.set_xticklabels([name.replace("compress.", "").replace("model.", "").replace("train.", "") for name, _ in columns], rotation=18, ha="right", fontsize=9)
    axis.spines[:].set_visible(False)
    return _svg(figure, "parallel", "parallel coordinates: values tried and objectives of each finished trial")


def _ends(values: Sequence[Any]) -> tuple[Any, Any]:
    order = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    return order[0], order[-1]


def _spread(values: Sequence[Any]) -> list[float]:
    """Heights in [0, 1]; words stand at even distances."""
    low, high = _ends(values)
    if any(isinstance(value, str) for value in values):
        order = sorted(set(values), key=str)
        return [order.index(value) / max(1, len(order) - 1) for value in values]
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]


def _volume(search: Mapping[str, Any]) -> str:
    figure = _figure(7, 2.8)
    axis = figure.subplots()
    axis.step([row["trials"] for row in search["hypervolume"]], [row["value"] for row in search["hypervolume"]], where="post", marker=".", color="#1f5fa8")
    axis.set(xlabel="finished trials", ylabel="hypervolume")
    axis.grid(alpha=0.3)
    return _svg(figure, "hypervolume", "hypervolume of the front after each finished trial")


def _without(trials: Sequence[Mapping[str, Any]]) -> str:
    items = "".join(f"<li><code>{trial['id']}</code> {trial['state']}: {html.escape(trial['because'])}</li>" for trial in trials if trial["state"] != "done")
    return f"<ul>{items}</ul>" if items else "<p>None.</p>"
