"""`engine.backend: auto`: build what this machine can run, time all of it interleaved, take the fastest by the objective.

Speed of sound engines only: whether the answers are good enough is for the gate, which judges the fastest backend of each
precision. An int8 engine counts only against what it would replace: it wins by being faster, never by being int8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from portaisys import evaluate
from portaisys.engine import Arrays, Engine, Options, backend, verify
from portaisys.engine.cache import Cache, get_or_build, load
from portaisys.engine.onnxruntime import reference
from portaisys.engine.verify import AS_IS
from portaisys.spec import UserError


@dataclass(frozen=True)
class Timed:
    """A line of the table. `ms`: batch -> (p50, p90, p99) milliseconds; None where the engine must not or cannot run here, and `because` says why."""

    backend: str
    precision: str
    ms: Mapping[int, tuple[float, ...]] | None
    because: str = ""


def measure(
    files: Mapping[tuple[str, str], Path], feeds: Arrays, options: Options, cache: Cache, *, batches: Sequence[int], rounds: int, seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Timed]:  # fmt: skip
    """Build, verify and time every candidate that runs here, all interleaved at each batch size.

    `files`: (backend, precision) -> ONNX file; `feeds`: rows of every input, repeated where a batch needs more of them; batch AS_IS takes them as they are.
    """
    engines: dict[tuple[str, str], Engine] = {}
    refused: list[Timed] = []
    for (name, precision), file in files.items():
        tell(f"building {precision} with {name}")
        found = _open(name, file, replace(options, precision=precision), cache)
        if not isinstance(found, str) and (problem := _problem(found, file, _first(feeds, batches), batches, seed)):
            found.close()
            found = f"unsound: {problem}"
        if isinstance(found, str):
            refused.append(Timed(name, precision, None, found))
        else:
            engines[name, precision] = found
    ms: dict[tuple[str, str], dict[int, tuple[float, ...]]] = {key: {} for key in engines}
    for batch in batches:
        tell(f"timing {len(engines)} engines at batch {batch}")
        for key, times in _times(engines, batch_of(feeds, batch), rounds, seed).items():
            p50, p90, p99 = np.percentile(times, (50, 90, 99))
            ms[key][batch] = (float(p50), float(p90), float(p99))
    for engine in engines.values():
        engine.close()
    return [Timed(*key, found) for key, found in ms.items()] + refused


VERIFIED_ROWS = 32


def _problem(found: Engine, file: Path, feeds: Arrays, batches: Sequence[int], seed: int) -> str:
    """What `verify` says; an exact engine is held against the file run without optimisation, a reduced one, which the gate judges, against itself."""
    expected = None
    if found.precision in ("fp32", "tf32"):
        with contextlib.suppress(UserError):  # a file that ONNX Runtime does not take
            expected = reference(file, feeds, min(batches))
    return verify.problem(found, feeds, batches=batches, seed=seed, expected=expected)


def _first(feeds: Arrays, batches: Sequence[int]) -> Arrays:
    """Rows to verify with: a few, but a whole fixed batch."""
    return feeds if AS_IS in batches else {name: array[: max(VERIFIED_ROWS, min(batches))] for name, array in feeds.items()}


def batch_of(feeds: Arrays, batch: int) -> Arrays:
    """So many rows of each input, in order and again from the start; AS_IS all as they are."""
    return feeds if batch == AS_IS else {name: np.ascontiguousarray(array[np.arange(batch) % len(array)]) for name, array in feeds.items()}


def _times(engines: Mapping[tuple[str, str], Engine], feeds: Arrays, rounds: int, seed: int) -> dict[tuple[str, str], NDArray[np.float64]]:
    names = {" ".join(key): key for key in engines}
    calls = {name: partial(engines[key].run, feeds) for name, key in names.items()}
    return {names[name]: times for name, times in evaluate.latency(calls, rounds, 10, seed).items()}


def _open(name: str, file: Path, options: Options, cache: Cache) -> Engine | str:
    """The engine, or why it does not run here."""
    module = backend(name)
    if options.precision not in module.PRECISIONS:
        return f"{name} has no {options.precision}"
    try:
        if module.device() == "none":
            return "no device for it on this machine"
        return load(get_or_build(file, name, options, cache), options)
    except UserError as error:
        return str(error)


def pick(table: Sequence[Timed], objective: str, p99_limit_ms: float | None = None) -> tuple[Timed, str]:
    """The best line and why: `latency`, the least median at the smallest batch; `throughput`, the most rows a second at a p99 within the limit.

    Raises UserError when nothing runs, or nothing keeps the limit.
    """
    runs = [line for line in table if line.ms]
    if not runs:
        raise UserError(f"engine.backend: nothing runs on this machine: {'; '.join(f'{line.backend} {line.precision}: {line.because}' for line in table)}")
    if objective == "latency":
        best = min(runs, key=lambda line: _p50(line, min(line.ms or {})))
        batch = min(best.ms or {})
        return best, f"{_p50(best, batch):.3f} ms at batch {batch}, the least of {len(runs)} engines"
    rates = [(max(1, batch) / p50 * 1e3, line, batch) for line in runs for batch, (p50, *_, p99) in (line.ms or {}).items() if p99_limit_ms is None or p99 <= p99_limit_ms]
    if not rates:
        raise UserError(f"engine.p99_limit_ms: no engine keeps {p99_limit_ms:g} ms at any batch size; raise it, or lower export.opt_batch")
    rate, best, batch = max(rates, key=lambda found: found[0])
    return best, f"{rate:,.0f} rows/s at batch {batch}, the most of {len(runs)} engines{'' if p99_limit_ms is None else f' within a p99 of {p99_limit_ms:g} ms'}"


def pick_each(table: Sequence[Timed], objective: str, p99_limit_ms: float | None = None) -> dict[str, Timed]:
    """The best backend of every precision that runs here: should the gate refuse int8, the fp32 engine left is the fastest fp32 one.

    A precision none of whose engines keeps the limit has its least latency instead, since the gate may leave nothing else.
    """
    best = {}
    for precision in dict.fromkeys(line.precision for line in table if line.ms):
        lines = [line for line in table if line.precision == precision]
        try:
            best[precision] = pick(lines, objective, p99_limit_ms)[0]
        except UserError:
            best[precision] = pick(lines, "latency")[0]
    return best


def _p50(line: Timed, batch: int) -> float:
    return (line.ms or {})[batch][0]
