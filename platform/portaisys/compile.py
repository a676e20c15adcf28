"""Any ONNX file -> a verified, measured, published version, with no training: `portaisys compile model.onnx`.

The file itself, run by ONNX Runtime with every optimisation off, is the reference; a reduced precision is admitted when its
answers on rows it was not calibrated with stay within bounds and its engine is faster. Knows no data set and no torch.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys import artifact, evaluate, gate
from portaisys.compress.cast import with_islands
from portaisys.compress.quantize import quantize
from portaisys.engine import BACKENDS, TYPED, Arrays, Engine, Options, available, choose, recalled, remembered, verify
from portaisys.engine.cache import Cache, cache_of, get_or_build, load
from portaisys.engine.choose import Timed
from portaisys.engine.onnx_file import Face, face_of, read_onnx
from portaisys.engine.onnxruntime import reference
from portaisys.engine.verify import AS_IS
from portaisys.registry import Version, open_registry
from portaisys.serve.model import Limits, open_engine
from portaisys.spec import BACKEND_PRECISIONS, Quantize, Storage, UserError, digest

ROWS = 32  # made up where no rows are given
QUANTIZED = ("int8", "fp8")
CAST_ROWS = 4  # to find fp32 islands with
LEAST_ROWS = 20  # to quantize: one half calibrates, the other judges
ROUNDS = 50


@dataclass(frozen=True)
class Order:
    """What is asked for. `calibration`: an .npz with an array an input, rows in dimension 0, and labels `y` where there are any.

    `max_batch`: None is 32, or what the file fixes. `max_error`: of a reduced precision's answers, relative to the reference's, where
    there are no labels; with labels `max_accuracy_drop` decides. `backend`: "auto" or one of the table.
    """

    onnx: Path
    name: str
    calibration: Path | None = None
    precisions: tuple[str, ...] = ("fp32",)
    backend: str = "auto"
    objective: str = "latency"
    opt_batch: int = 8
    max_batch: int | None = None
    dims: tuple[tuple[str, int, int, int], ...] = ()
    max_error: float = 0.05
    max_accuracy_drop: float = 0.01
    threads: int = 1
    seed: int = 0
    storage: Storage = field(default_factory=Storage)


@dataclass(frozen=True)
class Judged:
    """One precision on its best backend. `error`: relative to the reference; `agreement`: of the largest score, where the first output is [n, classes]."""

    precision: str
    backend: str
    error: float
    agreement: float | None
    admitted: bool
    because: str


@dataclass(frozen=True)
class Compiled:
    """What was made: the version, the verdicts, best first among the admitted, and every engine that was timed or why it was not."""

    version: Version
    folder: Path
    judged: tuple[Judged, ...]
    table: tuple[Timed, ...]
    notes: tuple[str, ...]


def compile_onnx(order: Order, tell: Callable[[str], None] = lambda text: None, *, promote: bool = True) -> Compiled:
    """Check, quantize, build, verify, time, judge and publish. Raises UserError for a file, rows or an order that cannot be served."""
    folder = _folder(order)
    with artifact.locked(folder):
        artifact.sweep(folder)
        tell("reading")
        source = folder / "source.onnx"
        model = read_onnx(order.onnx)
        artifact.write_bytes(source, model.SerializeToString(deterministic=True))
        face = face_of(model)
        order = _settled(order, face)
        samples, labels, notes = _samples(order, face)
        with artifact.writing(folder / "version", kind="version", key=_key(order, source), parents={}, spec=_recipe(order)) as draft:
            table, judged = _fill(draft, order, face, source, samples, labels, tell)
            draft.notes.extend(notes)
        made = artifact.read(folder / "version")
        version = _publish(order, made, judged, promote)
    return Compiled(version, made.path, tuple(judged), tuple(table), made.notes)


def _folder(order: Order) -> Path:
    if order.storage.remote:
        raise UserError(f"--storage: {order.storage.path} is a store; compile writes to a folder of this machine first, name one")
    return Path(order.storage.path).expanduser().resolve() / order.name


def name_of(path: Path) -> str:
    """A name for the registry out of a file's."""
    name = re.sub(r"[^a-z0-9_-]+", "-", path.stem.lower()).strip("-_")[:63]
    if not name:
        raise UserError(f"{path}: its name makes no name for the registry; give one with --name")
    return name


# --- what is asked, against what the file is ------------------------------------------------------------------------


def _settled(order: Order, face: Face) -> Order:
    """The order with the batch sizes this file allows. Raises UserError when it asks for what cannot be."""
    fixed = face.batch
    _refuse_unknown(order)
    if fixed and order.max_batch not in (None, fixed):
        raise UserError(f"{order.onnx}: its batch is fixed at {fixed}, so --max-batch {order.max_batch} cannot be; export it with a free batch (dynamic_shapes or dynamic_axes)")
    most = order.max_batch or fixed or 32
    if face.quantized and order.precisions not in (("fp32",), ("int8",)):
        raise UserError(f"{order.onnx}: is quantized already, so --precision {', '.join(order.precisions)} cannot be made of it; give the fp32 file")
    if (low := {*QUANTIZED} & {*order.precisions}) and not face.quantized and order.calibration is None:
        raise UserError(f"--precision {min(low)}: needs --calibration data.npz with real rows for every input; scales are never made up")
    unknown = sorted({name for name, *_ in order.dims} - face.free_dims)
    if unknown:
        raise UserError(f"--dim {unknown[0]}: {order.onnx} has no such free dimension; it has {', '.join(sorted(face.free_dims)) or 'none beside the batch'}")
    precisions = ("int8",) if face.quantized else tuple(dict.fromkeys(("fp32", *order.precisions)))
    return replace(order, max_batch=most, opt_batch=min(order.opt_batch, most) if not fixed else most, precisions=precisions)


def _refuse_unknown(order: Order) -> None:
    for precision in order.precisions:
        if order.backend != "auto" and precision not in BACKEND_PRECISIONS[order.backend]:
            raise UserError(f"--precision {precision}: backend {order.backend!r} has {', '.join(BACKEND_PRECISIONS[order.backend])}; take one of these, or another --backend")


def _batches(order: Order, face: Face) -> list[int]:
    if face.batch is None:
        return [AS_IS]
    assert order.max_batch
    return [face.batch] if face.batch else sorted({1, order.opt_batch, order.max_batch})


def _samples(order: Order, face: Face) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None, list[str]]:
    """Rows for every input, their labels where there are any, and notes."""
    if order.calibration is None:
        rng = np.random.default_rng(order.seed)
        rows = {AS_IS: ROWS}.get(face.batch or AS_IS, face.batch or ROWS)
        usual = {name: size for name, _, size, _ in order.dims}
        feeds = {tensor.name: _made_up(rng, tensor.dtype, _shape(order, face, tensor.name, rows, usual)) for tensor in face.inputs}
        return feeds, None, ["verified on made-up rows only: give real ones with --calibration"]
    arrays = artifact.read_arrays(order.calibration)
    labels = arrays.pop("y", None) if "y" not in {tensor.name for tensor in face.inputs} else None
    return _fitting(arrays, face, order.calibration), labels, []


def _shape(order: Order, face: Face, name: str, rows: int, usual: Mapping[str, int]) -> list[int]:
    shape = []
    for axis, size in enumerate(face.dims[name]):
        if isinstance(size, int):
            shape.append(size)
        elif axis == 0 and face.batch is not None:
            shape.append(rows)
        elif size in usual:
            shape.append(usual[size])
        elif size == face.batch_dim:
            shape.append(1)
        else:
            raise UserError(f"{order.onnx}: input {name} has the free dimension {size!r}; give its sizes (--dim {size}=LEAST:USUAL:MOST) or rows (--calibration)")
    return shape


def _made_up(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    """Normal numbers; for integers 0 and 1, which index any table and mask anything."""
    return rng.normal(size=shape).astype(dtype) if dtype.startswith("float") else rng.integers(0, 2, shape).astype(dtype)


def _fitting(arrays: Mapping[str, NDArray[Any]], face: Face, path: Path) -> dict[str, NDArray[Any]]:
    wanted = {tensor.name: tensor for tensor in face.inputs}
    if set(arrays) != set(wanted):
        raise UserError(f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}; the model takes {', '.join(wanted)} (and `y` for labels)")
    for name, tensor in wanted.items():
        array, shape = arrays[name], list(tensor.shape)
        free = shape if face.batch is None else [-1, *shape[1:]]  # a fixed batch is cut out of the rows
        if array.dtype.name != tensor.dtype or len(free) != array.ndim or any(want not in (-1, got) for want, got in zip(free, array.shape, strict=True)):
            raise UserError(f"{path}: {name} is {array.dtype.name} {list(array.shape)}; the model takes {tensor.dtype} {shape} (-1: any)")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; clean the data")
    rows = {len(array) for array in arrays.values()} if face.batch is not None else {1}
    if len(rows) != 1 or min(rows) < max(1, face.batch or 1):
        raise UserError(f"{path}: all inputs need the same number of rows, at least {max(1, face.batch or 1)}; they have {sorted(rows)}")
    return dict(arrays)


def _key(order: Order, source: Path) -> str:
    return digest([_recipe(order), artifact.hash_file(source), artifact.hash_file(order.calibration) if order.calibration else ""])


def _recipe(order: Order) -> dict[str, Any]:
    kept = ("name", "precisions", "backend", "objective", "opt_batch", "max_batch", "dims", "max_error", "max_accuracy_drop", "threads", "seed")
    return {name: getattr(order, name) for name in kept}


# --- build, measure, judge ------------------------------------------------------------------------------------------


def _fill(
    draft: artifact.Draft, order: Order, face: Face, source: Path, samples: Mapping[str, NDArray[Any]], labels: NDArray[Any] | None, tell: Callable[[str], None]
) -> tuple[list[Timed], list[Judged]]:
    """The version's files. Half the rows calibrate, the other half judge; without int8 all judge."""
    calibrates, judges = _halves(samples, bool({*QUANTIZED} & {*order.precisions}) and not face.quantized)
    held = {name: array[judges] for name, array in samples.items()} if face.batch is not None else dict(samples)
    right = reference(source, held, face.batch or 1 if face.batch is not None else AS_IS)
    options = Options(opt_batch=order.opt_batch, max_batch=order.max_batch or 1, dims=order.dims, hint=order.objective, threads=order.threads)
    cache, batches = cache_of(order.storage), _batches(order, face)
    with tempfile.TemporaryDirectory(dir=draft.path) as scratch:
        few = choose.batch_of(held, batches[0] if face.batch != 0 else CAST_ROWS)
        files = _files(draft, order, source, Path(scratch), {name: array[calibrates] for name, array in samples.items()}, few, tell)
        table = choose.measure(files, held, options, cache, batches=batches, rounds=ROUNDS, seed=order.seed, tell=tell)
        _refuse_none(order, source, table, options, cache)
        best = choose.pick_each(table, order.objective)
        engines = {precision: _open(files[line.backend, precision], line, options, cache) for precision, line in best.items()}
        judged = _judge(order, engines, held, right, None if labels is None else labels[judges], batches[0])
        for one in judged:
            if one.admitted:
                shutil.copyfile(files[one.backend, one.precision], draft.path / f"{one.precision}.onnx")
    _write(draft, order, face, engines, {one.precision: one for one in judged}, held, batches)
    for engine in engines.values():
        engine.close()
    draft.scores.update(rows=[asdict(one) for one in judged], table=[asdict(line) for line in table])
    return table, judged


def _halves(samples: Mapping[str, NDArray[Any]], calibrated: bool) -> tuple[slice, slice]:
    rows = min(len(array) for array in samples.values())
    if not calibrated:
        return slice(0, 0), slice(None)
    if rows < LEAST_ROWS:
        raise UserError(f"--calibration: {rows} rows; quantizing takes at least {LEAST_ROWS}, since one half calibrates and the other judges")
    return slice(0, rows // 2), slice(rows // 2, None)


def _files(
    draft: artifact.Draft, order: Order, source: Path, folder: Path, calibration: Arrays, few: Arrays, tell: Callable[[str], None]
) -> dict[tuple[str, str], Path]:
    """(backend, precision) -> its ONNX file, made in `folder` where it is not the source. Where precision is a matter of types, only for what runs here."""
    made = {precision: source for precision in order.precisions}
    for precision in {*QUANTIZED} & {*order.precisions} if len(order.precisions) > 1 else ():
        tell(f"quantizing to {precision}")
        made[precision] = folder / f"{precision}.onnx"
        draft.notes.extend(quantize(source, made[precision], calibration, Quantize(), precision)["notes"])
    names = tuple(BACKENDS) if order.backend == "auto" else (order.backend,)
    files = {(name, precision): path for name in names for precision, path in made.items()}
    for name in (name for name in TYPED if name in names and name in available()):
        for precision, path in made.items():
            low = "fp16" if precision in QUANTIZED and "fp16" in made else precision
            if low in ("fp16", "bf16"):
                tell(f"casting {precision} to {low}")
                files[name, precision] = folder / f"typed-{precision}.onnx"
                draft.notes.extend(_cast(path, files[name, precision], low, few, verify.TOLERANCE[precision]))
    return {key: path for key, path in files.items() if path.exists()}


def _cast(source: Path, out: Path, precision: str, few: Arrays, tolerance: float) -> tuple[str, ...]:
    """Notes; where nothing of the kind can be made they say why, and there is no file."""
    try:
        return with_islands(source, out, precision, few, tolerance).notes
    except UserError as error:
        return (f"no {precision}: {error}",)


def _refuse_none(order: Order, source: Path, table: Sequence[Timed], options: Options, cache: Cache) -> None:
    """Where a named backend cannot run the plainest file, say which of the others can."""
    plain = order.precisions[0]
    if any(line.ms for line in table if line.precision == plain):
        return
    why = "; ".join(f"{line.backend}: {line.because}" for line in table if line.precision == plain)
    others = [name for name in BACKENDS if name != order.backend and order.backend != "auto" and _builds(name, source, replace(options, precision=plain), cache)]
    raise UserError(f"{order.onnx}: {why}" + (f"; it can be built for {', '.join(others)} (--backend)" if others else "; no backend here can run it"))


def _builds(name: str, file: Path, options: Options, cache: Cache) -> bool:
    try:
        get_or_build(file, name, options, cache)
    except UserError:
        return False
    return True


def _open(file: Path, line: Timed, options: Options, cache: Cache) -> Engine:
    settings = replace(options, precision=line.precision)
    return load(get_or_build(file, line.backend, settings, cache), settings)


def _judge(order: Order, engines: Mapping[str, Engine], held: Arrays, right: Arrays, labels: NDArray[Any] | None, batch: int) -> list[Judged]:
    """The plainest precision by parity, every other by its answers and by being faster than it; admitted ones first, the fastest leading."""
    plain = order.precisions[0]
    feeds = choose.batch_of(held, batch)
    ms = evaluate.latency({precision: partial(engine.run, feeds) for precision, engine in engines.items()}, ROUNDS * 4, 10, order.seed)
    found = []
    for precision, engine in engines.items():
        answers = verify.answers(engine, held, batch)
        error, agreed = _error(right, answers), _agreement(right, answers)
        if precision == plain:
            bound = verify.TOLERANCE["fp32" if precision != "int8" else "int8"]
            decisions = [gate.Decision("pass" if error <= bound else "fail", f"relative error {error:.2g} (bound {bound:g}) from the file run without optimisation", {})]
        else:
            decisions = [_accurate(order, right, answers, labels, error), gate.faster(ms[plain], ms[precision], 0.95, order.seed)]
        because = "; ".join(decision.because for decision in decisions)
        found.append(Judged(precision, engine.backend, error, agreed, all(decision.action == "pass" for decision in decisions), because))
    if not next(one for one in found if one.precision == plain).admitted:
        raise UserError(f"{order.onnx}: its {plain} engine does not answer as the file does: {next(one for one in found if one.precision == plain).because}")
    return sorted(found, key=lambda one: (not one.admitted, float(np.median(ms[one.precision]))))


def _accurate(order: Order, right: Arrays, answers: Arrays, labels: NDArray[Any] | None, error: float) -> gate.Decision:
    if labels is None:
        within = error <= order.max_error
        return gate.Decision("pass" if within else "fail", f"relative error {error:.2g} on rows it was not calibrated with (bound {order.max_error:g})", {})
    output = next(iter(right))
    return gate.non_inferior(evaluate.correct(right[output], labels), evaluate.correct(answers[output], labels), order.max_accuracy_drop, 0.95)


def _error(right: Arrays, answers: Arrays) -> float:
    """The largest over the outputs of mean |difference| / mean |reference|; an integer output counts the share that differs."""
    errors = []
    for name, expected in right.items():
        if answers[name].shape != expected.shape:
            return float("inf")
        if expected.dtype.kind != "f":
            errors.append(float((answers[name] != expected).mean()) if expected.size else 0.0)
            continue
        scale = float(np.abs(expected, dtype=np.float64).mean()) or 1.0
        errors.append(float(np.abs(np.subtract(answers[name], expected, dtype=np.float64)).mean()) / scale)
    return max(errors)


def _agreement(right: Arrays, answers: Arrays) -> float | None:
    name, first = next(iter(right.items()))
    return float((first.argmax(1) == answers[name].argmax(1)).mean()) if first.ndim == 2 and first.shape[1] > 1 else None


def _write(
    draft: artifact.Draft, order: Order, face: Face, engines: Mapping[str, Engine], judged: Mapping[str, Judged], held: Arrays, batches: Sequence[int]
) -> None:
    """golden.npz and version.json, as serving reads them."""
    admitted = [precision for precision, one in judged.items() if one.admitted]
    answers: dict[str, NDArray[Any]] = {}
    for precision in admitted:
        answers |= {f"{name}_{precision}": array for name, array in verify.answers(engines[precision], held, batches[0]).items()}
    if set(answers) & set(held):
        raise UserError(f"{order.onnx}: an input is called {sorted(set(answers) & set(held))[0]!r}, which is what its answers would be kept as; rename it")
    golden = ROWS if face.batch is not None else None
    artifact.write_arrays(draft.path / "golden.npz", {name: array[:golden] for name, array in {**held, **answers}.items()})
    about = {
        "name": order.name, "labels": [], "backends": {precision: judged[precision].backend for precision in admitted}, "precisions": admitted,
        "engines": {precision: f"onnx {precision}" for precision in admitted}, "opt_batch": order.opt_batch, "max_batch": order.max_batch,
        "min_batch": face.batch or 1, "batched": face.batch is not None, "dims": order.dims, "tolerance": None, "threads": order.threads, "options": remembered(Options(hint=order.objective)),
        "verdicts": [asdict(one) for one in judged.values()], "lineage": {"onnx": artifact.hash_file(order.onnx)},
    }  # fmt: skip
    (draft.path / "version.json").write_text(json.dumps(about, indent=1, sort_keys=True))


def _publish(order: Order, made: artifact.Artifact, judged: Sequence[Judged], promote: bool) -> Version:
    registry = open_registry(order.storage)
    lineage = {"onnx": artifact.hash_file(order.onnx), "version": made.digest}
    known = registry.of_digest(order.name, made.digest)
    run_id = known.run_id if known else registry.log_run(order.name, _recipe(order), lineage, {f"{one.precision} {one.backend}": asdict(one) for one in judged}, {})
    version = registry.publish(order.name, made.path, run_id, lineage, {"action": "pass", "because": judged[0].because})
    return registry.promote(order.name, version.version, because=judged[0].because) if promote else version


def benchmark(
    reference: str, storage: Storage, batches: Sequence[int], rounds: int, threads: int, tell: Callable[[str], None] = lambda text: None
) -> tuple[Version, list[Timed]]:
    """Time a version's files on every backend that runs here, its golden rows as input. Raises UserError for an unknown version or batches it does not take."""
    opened = open_engine(reference, storage, Limits(threads=threads))
    opened.engine.close()
    about = opened.about
    most, least = about["max_batch"], about.get("min_batch", 1)
    if opened.batch == AS_IS:
        sizes: Sequence[int] = [AS_IS]
    else:
        sizes = batches or sorted({least, about["opt_batch"], most})
        if odd := [size for size in sizes if not least <= size <= most]:
            raise UserError(f"--batches {odd[0]}: {opened.version} was verified from {least} to {most}")
    files = {(name, precision): path for name in BACKENDS for precision, path in opened.files.items()}
    if "fp32" in opened.files:
        files |= {(name, "bf16"): opened.files["fp32"] for name in BACKENDS if name not in TYPED}  # another arithmetic on the same file, where a CPU has it
    options = recalled(about, "fp32", threads)
    table = choose.measure(files, opened.golden, options, cache_of(storage), batches=sizes, rounds=rounds, tell=tell)
    return opened.version, table
