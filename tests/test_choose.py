"""`engine.backend: auto`: everything that runs here is timed, the best by the objective is taken, and it is said why."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx_graphs import cnn, rows

from portaisys import engine
from portaisys.compress.quantize import quantize
from portaisys.engine import Options
from portaisys.engine.cache import Cache
from portaisys.engine.choose import Timed, measure, pick, pick_each
from portaisys.spec import Quantize, SpecError, UserError, parse


def line(backend, precision, ms, because=""):
    return Timed(backend, precision, ms, because)


TABLE = [
    line("onnxruntime", "fp32", {1: (2.0, 3.0), 8: (10.0, 12.0), 64: (70.0, 80.0)}),
    line("onnxruntime", "int8", {1: (2.5, 3.0), 8: (6.0, 9.0), 64: (40.0, 60.0)}),
    line("openvino", "int8", {1: (1.5, 9.0), 8: (7.0, 8.0), 64: (50.0, 51.0)}),
    line("tensorrt", "fp32", None, "no device for it on this machine"),
]


@pytest.mark.parametrize(
    ("objective", "limit", "expected", "says"),
    [
        ("latency", None, ("openvino", "int8"), "1.500 ms at batch 1, the least of 3 engines"),
        ("throughput", None, ("onnxruntime", "int8"), "1,600 rows/s at batch 64"),
        ("throughput", 55.0, ("onnxruntime", "int8"), "1,333 rows/s at batch 8, the most of 3 engines within a p99 of 55 ms"),
        ("throughput", 8.5, ("openvino", "int8"), "1,143 rows/s at batch 8"),
    ],
)
def test_the_best_by_the_objective_is_taken_and_it_is_said_why(objective, limit, expected, says):
    best, because = pick(TABLE, objective, limit)
    assert (best.backend, best.precision) == expected and because.startswith(says)


def test_int8_that_is_slower_is_not_taken():
    assert pick(TABLE[:2], "latency")[0].precision == "fp32"


@pytest.mark.parametrize(
    ("objective", "limit", "expected"),
    [
        ("latency", None, {"fp32": "onnxruntime", "int8": "openvino"}),
        ("throughput", None, {"fp32": "onnxruntime", "int8": "onnxruntime"}),
        ("throughput", 1.0, {"fp32": "onnxruntime", "int8": "openvino"}),  # none keeps it: the least latency
    ],
)
def test_each_precision_has_its_own_best_backend(objective, limit, expected):
    assert {precision: found.backend for precision, found in pick_each(TABLE, objective, limit).items()} == expected


def test_a_limit_that_none_keeps_and_a_machine_that_runs_nothing_are_said():
    with pytest.raises(UserError, match=r"engine\.p99_limit_ms: no engine keeps 1 ms at any batch size"):
        pick(TABLE, "throughput", 1.0)
    with pytest.raises(UserError, match=r"nothing runs on this machine: tensorrt fp32: no device"):
        pick(TABLE[3:], "latency")


def test_everything_that_runs_here_is_timed_and_what_does_not_says_why(tmp_path):
    fp32 = cnn(tmp_path / "cnn.onnx")
    quantize(fp32, tmp_path / "int8.onnx", rows(100), Quantize())
    files = {(backend, precision): path for backend in engine.BACKENDS for precision, path in (("fp32", fp32), ("int8", tmp_path / "int8.onnx"))}
    table = measure(files, {"x": rows(20)}, Options(), Cache(tmp_path / "cache"), batches=(1, 8), rounds=5)
    assert {(one.backend, one.precision) for one in table} == files.keys()
    for one in table:
        assert one.ms or not one.because.startswith("unsound")
        assert (one.ms is None) == (one.backend not in engine.available()) and bool(one.because) == (one.ms is None)
        assert one.ms is None or (set(one.ms) == {1, 8} and all(0 < p50 <= p90 <= p99 for p50, p90, p99 in one.ms.values()))
    again = measure(files, {"x": rows(20)}, Options(), Cache(tmp_path / "cache"), batches=(1,), rounds=5)
    assert len(again) == len(table)


def test_a_backend_that_cannot_build_this_file_is_left_out_with_its_reason(tmp_path):
    files = {("onnxruntime", "fp32"): cnn(tmp_path / "cnn.onnx"), ("onnxruntime", "bf16"): tmp_path / "none.onnx", ("openvino", "bf16"): tmp_path / "none.onnx"}
    table = measure(files, {"x": rows(20)}, Options(), Cache(tmp_path / "cache"), batches=(1,), rounds=5)
    reasons = {(one.backend, one.precision): one.because for one in table}
    assert reasons["onnxruntime", "bf16"] == "onnxruntime has no bf16" and "none.onnx: cannot be read" in reasons["openvino", "bf16"]
    assert reasons["onnxruntime", "fp32"] == ""


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"p99_limit_ms": 5}, r"engine\.p99_limit_ms: only a choice by throughput heeds it"),
        ({"backend": "auto", "precisions": ["int4"]}, r"engine\.precisions\.0: 'int4'"),
        ({"backend": "auto", "precisions": ["fp8"]}, r"engine\.precisions: 'fp8' needs a quantize step"),
        ({"backend": "auto", "objective": "speed"}, r"engine\.objective: 'speed'"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_refused(section, says):
    with pytest.raises(SpecError, match=says):
        parse({"name": "a", "engine": section})


def test_rows_fill_every_batch_size(tmp_path):
    table = measure({(backend, "fp32"): cnn(tmp_path / "cnn.onnx") for backend in engine.BACKENDS}, {"x": rows(3)}, Options(), Cache(tmp_path / "cache"), batches=(7,), rounds=5)
    assert np.isfinite([p50 for one in table if one.ms for p50, *_ in one.ms.values()]).all()


def test_a_backend_that_answers_otherwise_than_the_file_is_not_timed(tmp_path):
    """OpenVINO passes over `antialias` without a word: fast, sound against itself, and wrong."""
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    resize = node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear", antialias=1, axes=[2, 3])
    face = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 1, size, size]) for name, size in (("x", 12), ("y", 3))]
    graph = onnx.helper.make_graph([resize], "g", face[:1], face[1:], [tensor(np.array([3, 3], np.int64), "sizes")])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), tmp_path / "resize.onnx")
    files = {(backend, "fp32"): tmp_path / "resize.onnx" for backend in ("onnxruntime", "openvino")}
    table = {line.backend: line for line in measure(files, {"x": rows(20)}, Options(), Cache(tmp_path / "cache"), batches=(1, 8), rounds=5)}
    assert table["onnxruntime"].ms and table["openvino"].ms is None and "from the reference" in table["openvino"].because
