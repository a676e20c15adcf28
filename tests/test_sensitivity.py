"""Layers: named as users know them, measured one by one, kept by hand, given back to fp32 by a search."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx_graphs import Graph, cnn, rows

from portaisys import models, spec
from portaisys.compress.quantize import HeldOut, layers_of, make_plan, quantize
from portaisys.compress.sensitivity import enough
from portaisys.engine import Options, onnxruntime
from portaisys.export import export
from portaisys.spec import Gate, Quantize, UserError

BAD = "Conv_3"  # in `lame`


def lame(path):
    """A CNN of three convolutions, the second of which reads one channel a thousand times larger than the others, which a range for all of them rounds away."""
    graph = Graph()
    x = graph.op("Relu", graph.conv("x", 1, 8))
    up = graph.weight(1, 8, 1, 1)
    scale = np.ones((1, 8, 1, 1), np.float32)
    scale[0, 0] = 1000
    graph.weights[-1] = numpy_helper.from_array(scale, up)
    x = graph.op("Mul", x, up)
    weight, bias = graph.weight(8, 8, 3, 3, fan_in=72), graph.weight(8)
    values = numpy_helper.to_array(graph.weights[-2]) / scale
    graph.weights[-2] = numpy_helper.from_array(values.astype(np.float32), weight)
    x = graph.op("Relu", graph.op("Conv", x, weight, bias, pads=[1] * 4))
    x = graph.op("Relu", graph.conv(x, 8, 8))
    x = graph.op("Flatten", graph.op("GlobalAveragePool", x))
    return graph.save(path, graph.op("Gemm", x, graph.weight(8, 10, fan_in=8), graph.weight(10)), ["batch", 1, 12, 12])


@pytest.fixture(scope="module")
def lame_file(tmp_path_factory):
    return lame(tmp_path_factory.mktemp("lame") / "lame.onnx")


@pytest.fixture(scope="module")
def searched(lame_file):
    figures = quantize(lame_file, lame_file.with_name("mixed.onnx"), rows(64), Quantize(max_drop=0.02), held_out=HeldOut(rows(200, seed=5)), asked=Gate(max_accuracy_drop=0.04))
    return figures, onnx.load(lame_file.with_name("mixed.onnx")).graph


def reads_float(graph, kind):
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    return [node.name for node in graph.node if node.op_type == kind and made_by.get(node.input[0]) != "DequantizeLinear"]


def test_the_report_says_of_each_layer_what_quantizing_it_alone_costs_worst_first(searched):
    lines = searched[0]["sensitivity"]
    assert [set(line) for line in lines] == [{"layer", "action", "drop", "error", "latency_ratio"}] * 3
    assert lines[0]["layer"] == BAD and lines[0]["error"] > 5 * lines[1]["error"]
    assert lines[0]["drop"] > lines[1]["drop"] - 1e-9 and all(line["action"] == "quantized" and line["latency_ratio"] > 0 for line in lines)
    json.dumps(lines)


def test_the_search_gives_back_the_worst_layer_alone_and_says_why(searched):
    figures, graph = searched
    assert figures["returned"] == [BAD] and figures["quantized_nodes"] == 2
    assert reads_float(graph, "Conv") == [BAD]
    (note,) = [note for note in figures["notes"] if note.startswith("mixed")]
    assert f"given back to fp32, worst first: {BAD}; all quantized: drop " in note and "asked: at most 2 points" in note


def test_the_mixed_file_answers_better_and_is_what_engines_take(lame_file, searched, tmp_path):
    quantize(lame_file, tmp_path / "all.onnx", rows(64), Quantize())
    x, answers = rows(100, seed=9), {}
    for name, path, precision in (("fp32", lame_file, "fp32"), ("all", tmp_path / "all.onnx", "int8"), ("mixed", lame_file.with_name("mixed.onnx"), "int8")):
        onnxruntime.build(path, Options(precision=precision), tmp_path / name)
        (answers[name],) = onnxruntime.load(tmp_path / name, Options(precision=precision)).run({"x": x}).values()
    off = {name: np.linalg.norm(found - answers["fp32"]) for name, found in answers.items()}
    assert off["mixed"] < 0.2 * off["all"]
    onnx.checker.check_model(onnx.load(lame_file.with_name("mixed.onnx")), full_check=True)


def test_a_model_that_bears_it_keeps_every_layer_quantized(tmp_path):
    figures = quantize(cnn(tmp_path / "cnn.onnx"), tmp_path / "int8.onnx", rows(64), Quantize(mixed=True), held_out=HeldOut(rows(60, seed=5)), asked=Gate(max_accuracy_drop=0.2))
    assert figures["returned"] == [] and figures["quantized_nodes"] == 9
    assert any(note.startswith("mixed: no layer had to go back to fp32") for note in figures["notes"])


def test_where_no_choice_meets_the_margin_one_layer_stays_quantized_and_the_gate_decides(lame_file, tmp_path):
    figures = quantize(lame_file, tmp_path / "int8.onnx", rows(64), Quantize(mixed=True), held_out=HeldOut(rows(300, seed=5)), asked=Gate(max_accuracy_drop=1e-9))
    assert figures["quantized_nodes"] >= 1
    assert len(figures["returned"]) == 3 - figures["quantized_nodes"]


@pytest.mark.parametrize(
    ("b", "c", "n", "limit", "passes"),
    [
        (0, 0, 200, 0.0, True),  # too few rows for a bound at half a point: the drop itself decides
        (1, 0, 200, 0.0025, False),
        (3, 3, 3000, 0.0025, True),
        (30, 30, 3000, 0.0025, True),
        (150, 148, 3000, 0.0025, False),  # the drop is small and its bound is not
    ],
)
def test_enough_is_half_the_margin_and_where_rows_allow_a_bound_within_it(b, c, n, limit, passes):
    assert enough(b, c, n, limit, Gate(max_accuracy_drop=0.005)) is passes


# --- names --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = models.build(spec.ConvNet(channels=(8, 16)), (1, 12, 12), 10)
    path = tmp_path_factory.mktemp("named") / "model.onnx"
    export(model, rows(64), spec.Export(max_batch=16), path)
    return path


def test_layers_have_the_names_of_torch_modules_through_export_and_preprocessing(exported, tmp_path):
    model = onnx.load(exported)
    names = layers_of(model, make_plan(model.graph, None))
    weighted = {"net.0", "net.3.conv1", "net.3.conv2", "net.4.conv1", "net.4.conv2", "net.4.shortcut.0"}
    assert weighted | {"net.3:sum", "net.4:sum"} < {*names.values()} and "net.7" in names.values()
    figures = quantize(exported, tmp_path / "int8.onnx", rows(40), Quantize(keep=("net.3", "net.4.conv2")))
    assert figures["notes"] == ["kept in fp32: net.7 (the head)", "kept in fp32 as asked: net.3.conv1, net.3.conv2, net.3:sum, net.4.conv2"]
    assert figures["quantized_nodes"] == 5 and figures["quantized_adds"] == 1


def test_an_unknown_layer_is_refused_with_the_nearest_names(exported, tmp_path):
    with pytest.raises(UserError, match=r"compress\.quantize\.keep: 'net\.3\.conv3' is no layer .* nearest: net\.3\.conv2, net\.3\.conv1"):
        quantize(exported, tmp_path / "int8.onnx", rows(40), Quantize(keep=("net.3.conv3",)))


def test_keeping_everything_is_refused(exported, tmp_path):
    with pytest.raises(UserError, match="nothing is left to quantize"):
        quantize(exported, tmp_path / "int8.onnx", rows(40), Quantize(keep=("net",)))
