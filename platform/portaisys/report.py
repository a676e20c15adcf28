"""One self-contained HTML page a run: what was decided and why, the table, the curves.

Reads artifacts and logs; computes no score of its own.
"""

from __future__ import annotations

import html
import io
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
.inconclusive{color:#8a5a00}pre{background:#f5f7f9;padding:1rem;overflow:auto}svg{max-width:100%;height:auto}code{font-size:13px}
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
        f"<h1>{html.escape(spec.name)}</h1><p>Published as <b>{html.escape(version)}</b>, served by <b>{html.escape(best)}</b> on {spec.engine.backend}.</p>",
        "<h2>Candidates</h2>", _table(rows, best),
        "<h2>Verdicts</h2>", _verdicts(rows, artifacts["judge"].scores["looks"]),
        "<h2>Training</h2>", _curves(logs),
        "<h2>Stages</h2>", _stages(artifacts),
        "<h2>Spec</h2><pre>", html.escape(to_yaml(spec)), "</pre>",
    ]  # fmt: skip
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(spec.name)}: report</title><style>{_STYLE}</style>{"".join(parts)}</html>\n'
    artifact.write_text(path, page)
    return path


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


def _stages(artifacts: Mapping[str, Artifact]) -> str:
    body = "".join(
        f"<tr><td>{name}</td><td><code>{found.digest[:12]}</code></td><td class='n'>{found.seconds:.1f}</td><td>{html.escape('; '.join(found.notes)) or '-'}</td></tr>"
        for name, found in artifacts.items()
    )
    return f"<table><thead><tr><th>stage</th><th>digest</th><th>seconds</th><th>notes and fall-backs</th></tr></thead><tbody>{body}</tbody></table>"


def _curves(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Loss and validation accuracy over epochs, a line a stage, as inline SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, 2)
    for name, rows in logs.items():
        for axis, key in zip(axes, ("loss", "validation_accuracy"), strict=True):
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker=".")
    for axis, title in zip(axes, ("training loss", "validation accuracy"), strict=True):
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]
