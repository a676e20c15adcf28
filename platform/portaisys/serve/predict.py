"""Offline batch inference of a published version with Ray Data: rows in, one Parquet file a part of rows out.

    python jobs/predict.py digits@production rows.npz answers/

A part is written whole or not at all and is named after its rows, so a job that died goes on with the parts that are
missing: no row is lost and none is answered twice. Knows neither HTTP nor training.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys import artifact
from portaisys.engine import Tensor, check_feeds, verify
from portaisys.serve.model import Limits, Opened, ServedModel, open_engine, open_reference
from portaisys.spec import Storage, UserError

PLAN, MANIFEST = "plan.json", "manifest.json"


@dataclass(frozen=True)
class Plan:
    """What a folder of answers is made from: other rows, another version or another cut of the rows is another plan."""

    model: str
    digest: str
    source: str
    source_key: str
    rows: int
    rows_per_part: int
    key: str

    @property
    def parts(self) -> list[tuple[int, int, int]]:
        """(number, first row, row after the last)."""
        starts = range(0, self.rows, self.rows_per_part)
        return [(number, start, min(start + self.rows_per_part, self.rows)) for number, start in enumerate(starts)]


@dataclass(frozen=True)
class Summary:
    """What a job did. `reused_parts`: there before; `rows_per_s`: of the rows answered now, start-up included."""

    folder: Path
    rows: int
    parts: int
    reused_parts: int
    rows_per_s: float
    serving: Mapping[str, Any]


# --- where rows come from -----------------------------------------------------------------------------------------


def _npz(path: Path, key: str) -> NDArray[Any]:
    with np.load(path, allow_pickle=False) as arrays:
        if key not in arrays:
            raise UserError(f"{path}: has no array {key!r}; it has {', '.join(arrays.files)} (--key)")
        return np.asarray(arrays[key])


def _parquet(path: Path, key: str) -> NDArray[Any]:
    """A column of lists (any nesting), a row a list."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    if key not in table.column_names:
        raise UserError(f"{path}: has no column {key!r}; it has {', '.join(table.column_names)} (--key)")
    return np.array(table[key].to_pylist())


READERS: dict[str, Callable[[Path, str], NDArray[Any]]] = {".npz": _npz, ".parquet": _parquet}


def read_rows(path: Path, key: str) -> NDArray[Any]:
    """All rows of a file, [rows, ...]. Raises UserError when there is no such file, array or column, or rows differ in length."""
    if path.suffix not in READERS:
        raise UserError(f"{path}: rows are read from {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path, key)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{path}: {key}: not rows of one shape ({error})") from None


def _fitting(rows: NDArray[Any], model: ServedModel, path: Path) -> NDArray[Any]:
    """The rows as the engine takes them. Raises UserError naming the shape it takes, or the first rows that are not finite."""
    tensor = model.inputs[0]
    shape = tuple(tensor.shape[1:])
    if rows.dtype == object or int(np.prod(rows.shape[1:])) != int(np.prod(shape)):
        raise UserError(f"{path}: rows have shape {list(rows.shape[1:])}, {model.name} takes {list(shape)}")
    fitting = np.ascontiguousarray(rows.reshape(-1, *shape), dtype=tensor.dtype)
    odd = np.flatnonzero(~np.isfinite(fitting.reshape(len(fitting), -1)).all(1))
    if len(odd):
        raise UserError(f"{path}: {len(odd)} rows hold NaN or infinity, the first are {odd[:5].tolist()}; leave them out or fill them")
    return fitting


# --- one file, in this process --------------------------------------------------------------------------------------


def answer_file(reference: str, source: Path, out: Path, storage: Storage, threads: int = 1) -> tuple[Opened, int]:
    """Answer the rows of an .npz (an array an input) into the .npz `out` (an array an output), whole or not at all. Returns the engine, closed, and the number of rows.

    Raises UserError for an unknown version, or arrays that are not what it takes.
    """
    opened = open_engine(reference, storage, Limits(threads=threads))
    feeds = artifact.read_arrays(source)
    try:
        wanted = {tensor.name for tensor in opened.engine.inputs}
        if set(feeds) != wanted:
            raise UserError(f"{source}: holds {', '.join(feeds) or 'nothing'}; {opened.version} takes {', '.join(sorted(wanted))}")
        rows = check_feeds(_of_any_batch(opened), feeds)
        artifact.write_arrays(out, verify.answers(opened.engine, feeds, opened.batch if opened.about.get("min_batch", 1) > 1 else min(opened.batch, rows)))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        opened.engine.close()
    return opened, rows


def _of_any_batch(opened: Opened) -> list[Tensor]:
    """The inputs with the batch free, where the rows of a file are cut to the batch that the engine fixes."""
    return [replace(tensor, shape=(-1, *tensor.shape[1:])) if opened.batch != verify.AS_IS else tensor for tensor in opened.engine.inputs]


# --- the job ----------------------------------------------------------------------------------------------------------


class _Predictor:
    """An actor of Ray Data: one engine, the rows of the file, a part at a time."""

    def __init__(self, plan: Plan, out: str, storage: Mapping[str, Any], threads: int) -> None:
        self._plan, self._out = plan, Path(out)
        self._model = open_reference(plan.model, Storage(**storage), Limits(threads=threads))
        if self._model.lineage["digest"] != plan.digest:
            raise UserError(f"{plan.model} is another version now; ask for NAME@NUMBER")
        self._rows = _fitting(read_rows(Path(plan.source), plan.key), self._model, Path(plan.source))

    def __call__(self, parts: dict[str, NDArray[Any]]) -> dict[str, Any]:
        for number, start, stop in zip(parts["number"], parts["start"], parts["stop"], strict=True):
            logits = _answers(self._model, self._rows[start:stop])
            artifact.write_bytes(_file(self._out, int(number)), _table(int(start), logits, self._model.labels))
        return {"rows": parts["stop"] - parts["start"]}


def _answers(model: ServedModel, rows: NDArray[Any]) -> NDArray[Any]:
    batch = int(model.lineage["serving"]["max_batch"])
    name, output = model.inputs[0].name, model.outputs[0].name
    return np.concatenate([model.engine.run({name: rows[start : start + batch]})[output] for start in range(0, len(rows), batch)])


def _table(first: int, logits: NDArray[Any], labels: Sequence[str]) -> bytes:
    """Parquet: row (its number in the source), label, index of the class, logits."""
    import pyarrow as pa
    import pyarrow.parquet

    classes = logits.argmax(1)
    columns = {
        "row": pa.array(np.arange(first, first + len(logits))), "label": pa.array([labels[index] for index in classes]),
        "class": pa.array(classes.astype(np.int32)), "logits": pa.FixedSizeListArray.from_arrays(pa.array(logits.astype(np.float32).ravel()), logits.shape[1]),
    }  # fmt: skip
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), stream)
    return stream.getvalue()


def _file(out: Path, number: int) -> Path:
    return out / f"part-{number:06d}.parquet"


def predict(
    reference: str, source: Path, out: Path, storage: Storage, *, key: str = "x", rows_per_part: int = 10_000, concurrency: int = 1, threads: int = 1,
    tell: Callable[[str], None] = lambda text: None,
) -> Summary:  # fmt: skip
    """Answer every row of `source` into `out`, going on where an earlier job of the same plan was cut off.

    Raises UserError for a wrong reference, file or shape, and when `out` holds the answers of another plan.
    """
    started = time.monotonic()
    plan, serving = _planned(reference, source, storage, key, rows_per_part, threads)
    _claim(plan, out)
    missing = [part for part in plan.parts if not _file(out, part[0]).exists()]
    reused = len(plan.parts) - len(missing)
    tell(f"{plan.rows:,} rows in {len(plan.parts)} parts" + (f", {reused} were there" if reused else ""))
    if missing:
        _run(plan, missing, out, storage, concurrency, threads)
    answered = sum(stop - start for _, start, stop in missing)
    summary = Summary(out, plan.rows, len(plan.parts), reused, answered / (time.monotonic() - started), serving)
    artifact.write_text(out / MANIFEST, json.dumps({**asdict(summary), "folder": str(out), "plan": asdict(plan)}, indent=1, sort_keys=True))
    return summary


def _planned(reference: str, source: Path, storage: Storage, key: str, rows_per_part: int, threads: int) -> tuple[Plan, Mapping[str, Any]]:
    """Everything that can be wrong is found here, before a cluster is asked for anything."""
    if rows_per_part < 1:
        raise UserError("--rows-per-part: must be at least 1")
    rows = read_rows(source, key)
    model = open_reference(reference, storage, Limits(threads=threads))
    try:
        _fitting(rows, model, source)
        pinned = f"{model.name}@{model.version}"
        source_key = artifact.hash_file(source)
        return Plan(pinned, model.lineage["digest"], str(source.resolve()), source_key, len(rows), rows_per_part, key), model.lineage["serving"]
    finally:
        model.engine.close()


def _claim(plan: Plan, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    mine = {**asdict(plan), "source": ""}  # where the same rows lie may change
    file = out / PLAN
    if file.exists():
        theirs = {**json.loads(file.read_text()), "source": ""}
        odd = [name for name in mine if mine[name] != theirs.get(name)]
        if odd:
            raise UserError(f"{out}: holds answers of another job ({', '.join(odd)} differ); name another folder")
    elif any(out.glob("part-*.parquet")):
        raise UserError(f"{out}: holds parts but no {PLAN}; name an empty folder")
    artifact.write_text(file, json.dumps(asdict(plan), indent=1, sort_keys=True))


def _run(plan: Plan, missing: Sequence[tuple[int, int, int]], out: Path, storage: Storage, concurrency: int, threads: int) -> None:
    import ray

    # Quiet: what the job shows is its own.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    own = not ray.is_initialized()
    if own:
        address = os.environ.get("RAY_ADDRESS")
        ray.init(address=address or "local", log_to_driver=False, **({} if address else {"num_cpus": concurrency * threads + 1, "include_dashboard": False}))
    try:
        _check_room(concurrency, threads)
        _stream(plan, missing, out, storage, concurrency, threads)
    finally:
        if own:
            ray.shutdown()


def _check_room(concurrency: int, threads: int) -> None:
    import ray

    have = ray.cluster_resources().get("CPU", 0)
    if have < concurrency * threads:
        raise UserError(f"--concurrency: {concurrency} engines of {threads} threads need {concurrency * threads} CPUs and the cluster has {have:g}; lower it")


def _stream(plan: Plan, missing: Sequence[tuple[int, int, int]], out: Path, storage: Storage, concurrency: int, threads: int) -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    parts = ray.data.from_items([{"number": number, "start": start, "stop": stop} for number, start, stop in missing], override_num_blocks=len(missing))
    arguments = (plan, str(out.resolve()), storage.model_dump(), threads)
    # A part has nothing to do with another: an actor that dies takes its part with it, and Ray Data gives that part to the next.
    done = parts.map_batches(_Predictor, fn_constructor_args=arguments, concurrency=concurrency, num_cpus=threads, batch_size=1)
    answered = sum(int(batch["rows"].sum()) for batch in done.iter_batches(batch_size=None))
    expected = sum(stop - start for _, start, stop in missing)
    assert answered == expected, f"{answered} of {expected} rows"


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of jobs/predict.py; returns the exit code."""
    options = _parser().parse_args(arguments)
    storage = Storage(path=str(Path(options.storage).expanduser()) if "://" not in options.storage else options.storage)
    try:
        done = predict(
            options.reference, Path(options.source), Path(options.out), storage, key=options.key, rows_per_part=options.rows_per_part,
            concurrency=options.concurrency, threads=options.threads, tell=lambda text: print(text, flush=True),
        )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    served = done.serving
    print(f"{done.rows:,} rows, {done.reused_parts} of {done.parts} parts were there, {done.rows_per_s:,.0f} rows/s, {served['precision']} on {served['backend']} -> {done.folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", metavar="NAME@VERSION")
    parser.add_argument("source", help="rows: an .npz or a .parquet file that every node can read")
    parser.add_argument("out", help="a folder that every node can write")
    parser.add_argument("--key", default="x", help="the array or column that holds the rows (default: %(default)s)")
    parser.add_argument("--storage", default=Storage().path, help="storage.path of the runs (default: %(default)s)")
    for flag, default, text in (("rows-per-part", 10_000, "rows a file"), ("concurrency", 1, "engines at once"), ("threads", 1, "CPUs an engine")):
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"{text} (default: %(default)s)")
    return parser
