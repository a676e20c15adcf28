"""What the terminal shows: a bar a stage, a closing table of what was made and where. Decides nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from portaisys import report

# Without a terminal (a log, a pipe) the width is unknown and lines may be long.
console = Console() if sys.stdout.isatty() else Console(width=120)


class Screen:
    """A `Tell` for launch.run: `with Screen() as tell`. Without a terminal it prints a line a change instead of bars."""

    def __init__(self) -> None:
        self._progress = Progress(TextColumn("{task.fields[mark]} {task.description:<14}"), BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.fields[text]}"), console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Screen:
        if console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, text: str = "", fraction: float | None = None, state: str = "running") -> None:
        mark = {"running": "…", "done": "✓", "reused": "="}[state]
        if not console.is_terminal:
            console.print(f"{mark} {stage:<14} {text}", highlight=False, soft_wrap=True)
            return
        task = self._tasks.get(stage)
        if task is None:
            task = self._tasks[stage] = self._progress.add_task(stage, total=None, mark=mark, text=text)
        self._progress.update(task, total=1.0 if fraction is not None else None, completed=fraction or 0.0, mark=mark, text=text)
        if state != "running":
            self._progress.stop_task(task)


def closing_table(outcome: Any) -> None:
    """The table of candidates, the verdicts in words, what was reused, and where everything lies."""
    console.print(candidates_table(outcome.rows, outcome.artifacts["version"].scores["admitted"][0]))
    for row in outcome.rows:
        console.print(f"[bold]{row['engine']}[/] ({row['backend']}): {row['because']}", highlight=False, soft_wrap=True)
    if outcome.reused:
        console.print(f"Finished before and reused: {', '.join(outcome.reused)}", soft_wrap=True)
    cached = [f"{row['engine']} ({row['backend']})" for row in outcome.rows if row["reused"]]
    if "judge" in outcome.reused:
        console.print("Engines: judged before, not built again")
    elif cached:
        console.print(f"Engines from the cache: {', '.join(cached)}", soft_wrap=True)
    places = _places()
    for name, place in (("version", outcome.version), ("report", outcome.report), ("artifacts", outcome.folder), *outcome.left.items()):
        places.add_row(f"[bold]{name}", str(place))
    console.print(places)


def _places() -> Table:
    """Names and paths, of which nothing is cut off."""
    return Table(Column(), Column(overflow="fold"), box=None, show_header=False)


def candidates_table(rows: Sequence[Mapping[str, Any]], best: str) -> Table:
    """One line an engine; the served one is marked."""
    table = Table(title="Candidates: accuracy on the test split, latency at batch 1", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(report.COLUMNS):
        table.add_column(name, justify="right" if index in report.NUMBERS else "left", no_wrap=index < 9)
    for row in rows:
        chosen = row["engine"] == best and row["admissible"]
        table.add_row(*report.cells(row), style="green" if chosen else None)
    return table


def stage_table(made: Any, left: Mapping[str, Any]) -> None:
    """What one stage left, and where; `left`: files beside its artifact."""
    places = _places()
    scores = ", ".join(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in made.scores.items() if not isinstance(value, list | dict))
    notes = ((f"note {number}" if number > 1 else "note", note) for number, note in enumerate(made.notes, 1))
    for name, value in (("stage", made.kind), ("scores", scores), *notes, ("digest", made.digest[:12]), ("artifact", made.path), *left.items()):
        places.add_row(f"[bold]{name}", str(value))
    console.print(places)


def rehearsal_table(found: Any) -> None:
    """What a training run would do, and what a worker would hold."""
    most, least = found.batch_rows
    rows = {
        "rows": f"{found.rows:,} of {list(found.input_shape)}, {found.rows_an_epoch:,} of them in an epoch",
        "steps": f"{found.steps:,}: {found.epochs} epochs of {found.steps_per_epoch:,}",
        "a step": f"{most:,} rows" + (f" ({least:,} in the smallest)" if least != most else "") + f" over {found.workers} workers, {found.micro_batches} micro-batches of at most {found.micro_rows:,} rows in each",
        "model": f"{found.parameters:,} parameters, answers {list(found.output_shape)} a row",
        "exchanged": f"{found.exchanged_bytes / 2**20:,.2f} MiB a worker and step",
        "memory": f"about {found.memory_bytes / 2**20:,.1f} MiB a worker in fp32, beside torch itself and what a layer needs while it computes: " + ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in found.bytes_by.items() if size),
    }
    table = Table(box=None, show_header=False)
    for name, value in rows.items():
        table.add_row(f"[bold]{name}", value)
    console.print(table)
    console.print("nothing was trained, and no cluster was asked")


def search_table(found: Any, objectives: Iterable[str]) -> None:
    """The Pareto front, what became of the other trials, and where everything lies."""
    front = [trial for trial in found.trials if trial.id in found.front]
    table = Table("trial", *objectives, "values", title="Pareto front (validation split; latency alone, batch 1)", box=box.SIMPLE, pad_edge=False)
    for trial in sorted({trial.id: trial for trial in front}.values(), key=lambda trial: next(iter(trial.values.values()))):
        tried = ", ".join(f"{path.split('.', 1)[-1]}={value:.3g}" if isinstance(value, float) else f"{path.split('.', 1)[-1]}={value}" for path, value in trial.params.items())
        table.add_row(trial.id, *(f"{trial.values[name]:,.4g}" if trial.values[name] < 1e4 else f"{trial.values[name]:,.0f}" for name in objectives), tried)
    console.print(table)
    states = [trial.state for trial in found.trials]
    console.print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)), highlight=False)
    for trial in found.trials:
        if trial.state in ("failed", "invalid"):
            console.print(f"{trial.id} {trial.state}: {trial.because}", highlight=False, soft_wrap=True)
    places = Table(box=None, show_header=False)
    for name, place in (("best spec", found.best or "-"), ("chosen as", found.because), ("report", found.report), ("trials", found.folder / "trials.jsonl")):
        places.add_row(f"[bold]{name}", str(place))
    console.print(places)


def entries_table(entries: Sequence[Any], folder: Any) -> Table:
    """One line a built engine, last used first."""
    total = sum(entry.size_bytes for entry in entries) / 2**20
    table = Table("key", "backend", "precision", "device", "MiB", "last used", "state", title=f"{len(entries)} engines, {total:.1f} MiB in {folder}", box=box.SIMPLE)
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.used))
        table.add_row(entry.key[:12], entry.backend, entry.precision, entry.device, f"{entry.size_bytes / 2**20:.1f}", used, entry.problem or "sound")
    return table


def timings_table(table: Iterable[Any], title: str) -> Table:
    """One line a backend, precision and batch; what does not run says why."""
    shown = Table("backend", "precision", "batch", "p50 ms", "p90 ms", "p99 ms", "rows/s", title=title, box=box.SIMPLE, pad_edge=False)
    for line in table:
        if line.ms is None:
            shown.add_row(line.backend, line.precision, "-", line.because)
        for batch, (p50, p90, p99) in (line.ms or {}).items():
            shown.add_row(line.backend, line.precision, str(batch or "as is"), f"{p50:.3f}", f"{p90:.3f}", f"{p99:.3f}", f"{max(1, batch) / p50 * 1e3:,.0f}")
    return shown


def compiled_table(made: Any) -> None:
    """Every engine that was timed, what was admitted and why, and where it lies."""
    console.print(timings_table(made.table, "Engines built and timed here"))
    for one in made.judged:
        same = "" if one.agreement is None else f", largest score where the file's is in {one.agreement:.1%} of rows"
        console.print(f"[bold]{one.precision}[/] on {one.backend}: {'admitted' if one.admitted else 'not admitted'}: {one.because}{same}", highlight=False, soft_wrap=True)
    for note in made.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    places = Table(box=None, show_header=False)
    for name, place in (("version", made.version), ("files", made.folder)):
        places.add_row(f"[bold]{name}", str(place))
    console.print(places)


def answered_table(opened: Any, rows: int, out: Any) -> Table:
    """What answered how many rows, and where the answers are."""
    places = Table(box=None, show_header=False)
    engine = f"{opened.engine.backend} {opened.engine.precision}" + "".join(f"; not {reason}" for reason in opened.fallbacks)
    for name, value in (("version", opened.version), ("engine", engine), ("rows", f"{rows:,}"), ("answers", out)):
        places.add_row(f"[bold]{name}", str(value))
    return places


def converted_table(made: Any) -> Table:
    """What was made of what, what it takes and gives, how far its answers are off, and where it is."""
    places = Table(box=None, show_header=False)
    inputs, outputs = (", ".join(f"{tensor.name} {tensor.dtype} [{', '.join('any' if size < 0 else str(size) for size in tensor.shape)}]" for tensor in tensors) for tensors in (made.inputs, made.outputs))
    batches = ", ".join(str(batch or "as is") for batch in made.batches)
    checked = f"{made.rows} rows in batches {batches}: largest difference {made.max_abs:.2g}"
    for name, value in (("source", made.source), ("by", made.library), ("takes", inputs), ("gives", outputs), ("checked", checked), *(("note", note) for note in made.notes)):
        places.add_row(f"[bold]{name}", escape(value))  # a shape looks like markup
    places.add_row("[bold]written", escape(f"{made.path} ({made.size_bytes / 2**20:.2f} MiB)"))
    return places


def audit_table(found: Any) -> None:
    """Each engine of a version in two lines, as it was judged and as it is now, and what it was held against."""
    table = Table("engine", "", "accuracy", r"drop \[bounds], points", r"worst class \[bounds]", "p50 ms", "verdict", title=f"{found.version} on {found.test_rows:,} test rows", box=box.SIMPLE, pad_edge=False)
    for line in found.lines:
        then = line.then.get("verdicts") or {}
        now = {name: decision.to_dict() for name, decision in line.now.items()}
        for when, verdicts, accuracy, ms in (("then", then, line.then.get("accuracy"), line.then.get("latency_ms_p50")), ("now", now, line.accuracy, line.latency_ms_p50)):
            actions = [f"{name} {verdict['action']}" for name, verdict in verdicts.items() if name != "latency"]
            numbers = ("-" if accuracy is None else f"{accuracy:.2%}", _drop(verdicts.get("accuracy")), _drop(verdicts.get("class recall")), "-" if ms is None else f"{ms:.3f}")
            table.add_row(line.engine if when == "then" else f"({line.backend})", when, *numbers, ", ".join(actions) or "-")
    console.print(table)
    console.print(f"Held against {found.baseline}; margins and confidence of its spec, {found.looks} look{'s' * (found.looks != 1)} at this test split.", highlight=False, soft_wrap=True)
    console.print("Speed was measured again on this machine and is shown; no verdict about it is compared. Nothing is chosen here, so no look is counted.", soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    console.print("[red]the verdict does not stand" if found.differs else "[green]the same verdict")


def _drop(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return "-"
    drop, low, high = (100 * verdict["figures"][name] for name in ("drop", "low", "high"))
    return f"{drop:.2f} [{low:.2f}, {high:.2f}]"


def versions_table(versions: Sequence[Any]) -> Table:
    """One line a version."""
    table = Table("version", "aliases", "verdict", "digest", "run")
    for version in versions:
        table.add_row(str(version), ", ".join(version.aliases), version.verdict, version.digest[:12], version.run_id)
    return table


def ledger_table(entries: Sequence[Any]) -> Table:
    """One line an entry, oldest first."""
    table = Table("when", "event", "name", "version", "who", "because")
    for entry in entries:
        name = entry.name if len(entry.name) < 40 else entry.name[:12]
        table.add_row(entry.when, entry.event, name, str(entry.version or ""), entry.who, entry.because)
    return table
