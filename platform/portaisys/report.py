"""One self-contained HTML page a run (what was decided and why, the table, the curves) and one a search (front, parallel coordinates, hypervolume).

Reads artifacts and logs; computes no score of its own.
"""

from __future__ import annotations

import html
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portaisys import artifact
from portaisys.artifact import Artifact
from portaisys.spec import Spec, to_yaml

COLUMNS = ("engine", "backend", "status", "accuracy", "params", "MACs", "KiB", "p50 ms", "p99 ms", "verdict")
NUMBERS = range(3, 9)

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;width:100%;font-size:14px}th,td{padding:.4rem .6rem;text-align:left;border-bottom:1px solid #d9dee4}
td.n{text-align:right;font-variant-numeric:tabular-nums}tr.best{background:#eaf6ec}.pass{color:#136f2d}.fail{color:#b3261e}
.inconclusive{color:#8a5a00}.wide{overflow-x:auto}pre{background:#f5f7f9;padding:1rem;overflow:auto}svg{max-width:100%;height:auto}code{font-size:13px}
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


def write(path: Path, spec: Spec, artifacts: Mapping[str, Artifact], logs: Mapping[str, Sequence[Mapping[str, Any]]], version: str) -> Path:
    """Write the page for a finished run: its artifacts and step logs by stage name."""
    rows = artifacts["judge"].scores["rows"]
    best = artifacts["version"].scores["admitted"][0]
    parts = [
        f"<h1>{html.escape(spec.name)}</h1><p>Published as <b>{html.escape(version)}</b>, served by <b>{html.escape(best)}</b> on {_backend(rows, best)}{_choice(artifacts)}.</p>",
        "<h2>Candidates</h2>", _table(rows, best),
        "<h2>Verdicts</h2>", _intervals(rows), _verdicts(rows, artifacts["judge"].scores["looks"]),
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


def _verdicts(rows: Sequence[Mapping[str, Any]], looks: int) -> str:
    lines = [f"<p>Confidence corrected for {looks} look{'s' if looks != 1 else ''} at this test split (Bonferroni).</p><ul>"]
    for row in rows:
        found = row["verdicts"] or {}
        said = "".join(f"<li><b class='{v['action']}'>{name}: {v['action']}</b> {html.escape(v['because'])}</li>" for name, v in found.items())
        lines.append(f"<li><b>{html.escape(row['engine'])}</b> ({row['backend']}, {row['precision']}, {row['device']}): {html.escape(row['because'])}<ul>{said}</ul></li>")
    return "".join([*lines, "</ul>"])


_COLOURS = {"pass": "#136f2d", "fail": "#b3261e", "inconclusive": "#8a5a00"}


def _intervals(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each candidate's verdict rests on: accuracy drop and latency ratio against dense with their intervals, and the line they must stay left of."""
    panels = [("accuracy", "drop", 100, "accuracy drop against dense, points"), ("latency", "ratio", 1, "latency over dense")]
    judged = [row for row in rows if any(name in (row["verdicts"] or {}) for name, *_ in panels)]
    if not judged:
        return ""
    figure = _figure(10, 1.2 + 0.4 * len(judged))
    for axis, (name, key, scale, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
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
