"""Which model patterns export, and what each backend makes of them: docs/operators.md says it, and is held against what happens.

`.venv/bin/python tests/test_operators.py --write` writes the page anew.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import logging
import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from model_patterns import PATTERNS
from torch.onnx._internal.exporter._registration import ONNXRegistry

from portaisys.compress.cast import cast
from portaisys.engine import Options, backend
from portaisys.spec import UserError

PAGE = Path(__file__).parents[1] / "docs/operators.md"
COMMAND = "python tests/test_operators.py --write"
COLUMNS = ("torch.onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt fp16")
WORKS = ("exports", "runs", "built")
NOT_TRIED = "-"
BATCHES = (2, 5)
TOLERANCE = 1e-3  # of the largest answer


# --- what happens ---------------------------------------------------------------------------------------------------


def outcome(name: str, folder: Path) -> tuple[str, ...]:
    """What a pattern does now, one word or reason a column."""
    pattern, path = PATTERNS[name], folder / "model.onnx"
    torch.manual_seed(0)
    model = pattern.module().eval()
    rows = {batch: (xs := inputs(name, batch), answers(model, xs)) for batch in BATCHES}
    if failure := export(model, *rows[BATCHES[0]], pattern.dims, path):
        return failure, *[NOT_TRIED] * 4
    runs = [build(each, path, options(name)) or run(each, path, rows, options(name)) for each in ("onnxruntime", "openvino")]
    built = build("tensorrt", path, options(name))
    return "exports", *runs, built or "built", NOT_TRIED if built else build_fp16(path, options(name, "fp16")) or "built"


def options(name: str, precision: str = "fp32") -> Options:
    return Options(precision, opt_batch=2, max_batch=8, dims=PATTERNS[name].dims)


def inputs(name: str, batch: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(batch)
    return PATTERNS[name].inputs(batch)


def answers(model, xs) -> list[np.ndarray]:
    with torch.inference_mode():
        return [leaf.numpy() for leaf in torch.utils._pytree.tree_leaves(model(*xs))]


def export(model, xs, right, dims, path: Path) -> str:
    """Write the file as portaisys.export does, with the batch and `dims` free. Returns why not, or nothing."""
    sizes = {0: torch.export.Dim("batch", min=1, max=8)}
    sizes |= {axis: torch.export.Dim(dim, min=least, max=most) for axis, (dim, least, _, most) in enumerate(dims, 1)}
    shapes = torch.export.ShapesCollection()
    for x in xs:
        shapes[x] = sizes
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # where it prints graphs that it cannot export
        warnings.simplefilter("ignore")
        logging.getLogger("torch").setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                model, xs, dynamo=True, opset_version=20, external_data=False, verbose=False, dynamic_shapes=shapes.dynamic_shapes(model, xs),
                input_names=[f"x{index}" for index in range(len(xs))], output_names=[f"y{index}" for index in range(len(right))],
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            return f"fails: {culprit(error)}"
    onnx.save(program.model_proto, path)
    free = [size.dim_param for size in program.model_proto.graph.input[0].type.tensor_type.shape.dim[: len(sizes)]]
    return "" if all(free) else "fails: fixes the batch"


def culprit(error: Exception) -> str:
    """The operator that the exporter names, or else the kind of error that torch.export raised."""
    named = re.search(r"torch\.ops\.aten\.(\w+)|op='aten\.(\w+)", str(error.__cause__))
    return (named[1] or named[2]) if named else type(error.__cause__).__name__


def build(name: str, path: Path, options: Options) -> str:
    """Build `engine` beside the file. Returns why not, or nothing."""
    try:
        backend(name).build(path, options, path.with_name("engine"))
    except UserError as error:
        return f"refused: {reason(str(error))}"
    return ""


def build_fp16(path: Path, options: Options) -> str:
    cast(path, path.with_name("low.onnx"), "fp16")
    return build("tensorrt", path.with_name("low.onnx"), options)


def reason(message: str) -> str:
    """The operator that a parser names, or else the last it says."""
    named = re.search(r"parser refuses it: (\w+) \S*: ", message)
    return named[1] if named and named[1] != "graph" else message.rpartition(": ")[2].strip()


def run(name: str, path: Path, rows, options: Options) -> str:
    engine = backend(name).load(path.with_name("engine"), options)
    for xs, right in rows.values():
        found = engine.run({f"x{index}": x.numpy() for index, x in enumerate(xs)})
        wrong = [what for index, each in enumerate(right) if (what := difference(each, found[f"y{index}"]))]
        if wrong:
            return wrong[0]
    return "runs"


def difference(right: np.ndarray, found: np.ndarray) -> str:
    if (right.shape, right.dtype) != (found.shape, found.dtype):
        return "wrong shape" if right.dtype == found.dtype else "wrong type"
    error = np.abs(found.astype(float) - right.astype(float)).max()
    return "" if error <= TOLERANCE * np.abs(right.astype(float)).max() and np.isfinite(found).all() else "wrong answers"


# --- the page -------------------------------------------------------------------------------------------------------


def made() -> str:
    """The one line that may differ: date and versions."""
    versions = [f"torch {torch.__version__}", f"onnx {onnx.__version__}", *(backend(each).version() for each in ("onnxruntime", "openvino", "tensorrt"))]
    return f"Made by `{COMMAND}` on {datetime.date.today()}: {', '.join(re.sub('[-+,].*', '', version) for version in versions)}."


def page(rows: dict[str, tuple[str, ...]], made: str) -> str:
    works = [sum(row[column] in WORKS for row in rows.values()) for column in range(len(COLUMNS))]
    counts = ", ".join(f"{count} {word}" for count, word in zip(works, ("export", "run in onnxruntime", "run in openvino", "build in tensorrt", "in tensorrt's fp16"), strict=True))
    return "\n".join([
        "# Operators", "",
        "Which model patterns export from torch, and what the backends make of the file. Each pattern is a small module of",
        "`tests/model_patterns.py`, exported as `portaisys.export` does (`torch.onnx.export`, dynamo, opset 20, the batch free) and built in fp32.", "",
        made, f"Of {len(rows)} patterns {counts}.", "",
        f"`runs`: at batch {BATCHES[0]} and {BATCHES[1]} every answer is within {TOLERANCE:g} of the largest of torch's. `built`: TensorRT-RTX made a plan, which needs no GPU and proves",
        "no answers. `refused`: with the operator, or the backend's words where it names none. `-`: not tried.", "",
        *table(("pattern", *COLUMNS), [(name, *row) for name, row in rows.items()]), "",
        "## What does not work, and what does", "",
        *table(("pattern", "where", "what", "works in", "note"), [line for name, row in rows.items() for line in troubles(name, row)]), "",
    ])  # fmt: skip


def table(head, lines) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def troubles(name: str, row: tuple[str, ...]) -> list[tuple[str, ...]]:
    works = ", ".join(column for column, cell in list(zip(COLUMNS, row, strict=True))[1:] if cell in WORKS) or "none"
    return [(name, column, cell, works, PATTERNS[name].note) for column, cell in zip(COLUMNS, row, strict=True) if cell not in (*WORKS, NOT_TRIED)]


def written(text: str) -> dict[str, tuple[str, ...]]:
    """The rows of a page's first table."""
    cells = [line.strip("| ").split(" | ") for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return {name: tuple(row) for name, *row in cells[2:]}


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_registry():
    """torch reads its 500 operators anew for every export: 0.8 s each, half of this test's time (97 s of processor time without this, 56 with)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_does_what_the_page_says(name, tmp_path):
    now = outcome(name, tmp_path)
    assert now == written(PAGE.read_text()).get(name), f"docs/operators.md says otherwise of {name!r}; if what happens now is right: {COMMAND}"


def test_the_page_is_what_its_own_rows_give():
    text = PAGE.read_text()
    made = next(line for line in text.splitlines() if line.startswith("Made by "))
    rows = written(text)
    assert list(rows) == list(PATTERNS) and page(rows, made) == text, f"docs/operators.md was changed by hand, or a pattern or note was; {COMMAND}"


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (np.array([[1, 2.001]], np.float32), ""),
        (np.array([[1, 2.003]], np.float32), "wrong answers"),
        (np.array([[1, np.nan]], np.float32), "wrong answers"),
        (np.array([[[1, 2]]], np.float32), "wrong shape"),
        (np.array([[1, 2]], np.float64), "wrong type"),
    ],
)
def test_answers_that_are_not_torchs_are_told_from_those_that_are(found, what):
    assert difference(np.array([[1, 2]], np.float32), found) == what


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page({name: outcome(name, Path(folder)) for name in PATTERNS}, made()))
