"""Step logs of training: one JSON object a line, appended; readable while it grows, and after a crash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(dict(values)) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines, in order of `step`; a step that was repeated after a resume counts once, as last written."""
    return [row for _, row in sorted({row["step"]: row for row in lines(path) if "step" in row}.items())]


def lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines, as they were written."""
    return [row for line in path.read_text().splitlines() if (row := _row(line))] if path.exists() else []


def last(path: Path) -> dict[str, Any] | None:
    """The newest whole line, from the end of the file alone: cheap however long it is. None without one."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 2**16))
        lines = stream.read().decode(errors="replace").splitlines()
    return next((row for line in reversed(lines) if (row := _row(line))), None)


def _row(line: str) -> dict[str, Any] | None:
    """A line that a crash tore is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
