"""Quantization: the placement engines want, nothing made up, the same bytes every time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_graphs import Graph, cnn, rows

from portaisys.artifact import hash_file
from portaisys.compress.quantize import make_plan, quantize
from portaisys.engine.onnx_file import read_for
from portaisys.spec import Quantize, UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return cnn(tmp_path_factory.mktemp("onnx") / "cnn.onnx")


@pytest.fixture(scope="module")
def figures(source):
    return quantize(source, source.with_name("int8.onnx"), rows(100), Quantize())


@pytest.fixture(scope="module")
def graph(source, figures):
    return onnx.load(source.with_name("int8.onnx")).graph


def answers(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def reads(graph, kind):
    """Operator types that feed the nodes of a kind."""
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    return [Counter(made_by.get(name, "weights") for name in node.input) for node in graph.node if node.op_type == kind]


def test_the_quantized_file_answers_nearly_as_the_fp32_one(source, figures):
    x = rows(200, seed=7)
    expected, actual = answers(source, x), answers(source.with_name("int8.onnx"), x)
    assert np.abs(expected - actual).mean() < 0.03 * np.abs(expected).mean()
    assert (expected.argmax(1) == actual.argmax(1)).mean() > 0.97


def test_the_same_input_gives_the_same_bytes(source, figures, tmp_path):
    quantize(source, tmp_path / "again.onnx", rows(100), Quantize())
    assert hash_file(tmp_path / "again.onnx") == hash_file(source.with_name("int8.onnx"))


def test_everything_quantized_is_signed_and_around_zero_as_tensorrt_wants_it(graph):
    points = {node.input[2] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    tensors = [tensor for tensor in graph.initializer if tensor.name in points]
    assert len(tensors) == len(points)
    assert all(tensor.data_type == TensorProto.INT8 and not numpy_helper.to_array(tensor).any() for tensor in tensors)


def test_weights_have_a_scale_a_channel_and_seven_bits(graph):
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in tensors]
    assert len(weights) == 6
    for node in weights:
        assert tensors[node.input[1]].shape == (tensors[node.input[0]].shape[0],)
        assert np.abs(tensors[node.input[0]].astype(int)).max() <= 64


def test_full_range_weights_are_there_for_who_asks(source, tmp_path):
    quantize(source, tmp_path / "full.onnx", rows(50), Quantize(reduce_range=False))
    int8 = [numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "full.onnx").graph.initializer if tensor.data_type == TensorProto.INT8]
    assert max(np.abs(values.astype(int)).max() for values in int8) == 127


def test_convolutions_and_residual_sums_and_the_pool_are_quantized_and_the_head_is_not(graph, figures):
    assert reads(graph, "Conv") == [Counter(DequantizeLinear=2, weights=1)] * 6  # x and weights; never the bias
    assert reads(graph, "Add") == [Counter(DequantizeLinear=2)] * 2
    assert reads(graph, "GlobalAveragePool") == [Counter(DequantizeLinear=1)]
    assert reads(graph, "Gemm") == [Counter(Flatten=1, weights=2)]
    assert figures["quantized_nodes"] == 9
    assert figures["quantized_adds"] == 2
    assert figures["notes"] == ["kept in fp32: Gemm_15 (the head)"]


def test_nothing_stands_between_a_convolution_and_its_relu(graph):
    assert set().union(*reads(graph, "Relu")) == {"Conv", "Add"}


def test_the_weights_take_a_quarter_of_the_room(tmp_path):
    figures = quantize(cnn(tmp_path / "wide.onnx", width=48), tmp_path / "int8.onnx", rows(20), Quantize())
    assert figures["onnx_bytes_int8"] < 0.35 * figures["onnx_bytes_fp32"]


def test_sums_stay_in_fp32_when_asked(source, tmp_path):
    assert quantize(source, tmp_path / "int8.onnx", rows(50), Quantize(quantize_add=False))["quantized_adds"] == 0
    assert reads(onnx.load(tmp_path / "int8.onnx").graph, "Add") == [Counter(Conv=1, DequantizeLinear=1), Counter(Conv=2)]  # what a Conv shares with it stays quantized


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_every_calibration_method_takes_rows_that_do_not_fill_the_last_batch(source, tmp_path, method):
    quantize(source, tmp_path / "int8.onnx", rows(70), Quantize(calibration=method))
    x = rows(100, seed=7)
    expected, actual = answers(source, x), answers(tmp_path / "int8.onnx", x)
    assert np.abs(expected - actual).mean() < 0.1 * np.abs(expected).mean()


def test_a_transformers_residual_sums_are_not_quantized_though_it_begins_with_a_convolution(tmp_path):
    graph = Graph()
    tokens = graph.op("Flatten", graph.conv("x", 1, 8, 4))
    up = graph.op("Add", graph.op("MatMul", tokens, graph.weight(72, 144)), graph.weight(144))  # a bias is no residual
    x = graph.op("Add", tokens, graph.op("MatMul", graph.op("Relu", up), graph.weight(144, 72)))
    path = graph.save(tmp_path / "transformer.onnx", graph.op("Gemm", x, graph.weight(72, 10), graph.weight(10)), ["batch", 1, 12, 12])
    loaded = onnx.load(path).graph
    assert make_plan(loaded, None).adds == 0
    assert make_plan(loaded, True).adds == 1
    assert make_plan(loaded, None).kept == ("Gemm_7",)


@pytest.mark.parametrize(
    ("calibration", "reason"),
    [
        (np.empty((0, 1, 12, 12), np.float32), "no calibration rows; set data.calibration_rows"),
        (np.full((8, 1, 12, 12), np.nan, np.float32), "NaN or infinity"),
        (np.zeros((8, 1, 12, 12), np.float32), "every calibration value is the same"),
        (np.ones((8, 1, 12, 12)), "takes float32 .* are float64"),
        (np.ones((8, 12, 12), np.float32), r"takes float32 \[-1, 1, 12, 12\], the calibration rows are float32 \[8, 12, 12\]"),
    ],
)
def test_no_scale_is_made_up(source, tmp_path, calibration, reason):
    with pytest.raises(UserError, match=reason):
        quantize(source, tmp_path / "int8.onnx", calibration, Quantize())
    assert not (tmp_path / "int8.onnx").exists()


def test_one_nan_among_the_rows_is_enough_to_refuse(source, tmp_path):
    x = rows(50)
    x[13, 0, 5, 5] = np.inf
    with pytest.raises(UserError, match="NaN or infinity"):
        quantize(source, tmp_path / "int8.onnx", x, Quantize())


def test_a_graph_of_a_head_alone_has_nothing_to_quantize(tmp_path):
    graph = Graph()
    path = graph.save(tmp_path / "linear.onnx", graph.op("Gemm", graph.op("Flatten", "x"), graph.weight(144, 10)), ["batch", 1, 12, 12])
    with pytest.raises(UserError, match="nothing to quantize"):
        quantize(path, tmp_path / "int8.onnx", rows(20), Quantize())


def test_a_damaged_file_is_named(source, tmp_path):
    (tmp_path / "half.onnx").write_bytes(source.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"half\.onnx: not an ONNX file, or a damaged one"):
        quantize(tmp_path / "half.onnx", tmp_path / "int8.onnx", rows(20), Quantize())


def test_fp8_keeps_the_ranges_and_rounds_weights_once_to_eight_bits(tmp_path):
    path = cnn(tmp_path / "cnn.onnx")
    figures = quantize(path, tmp_path / "fp8.onnx", rows(100), Quantize(), "fp8")
    assert figures["quantized_adds"] == 0 and figures["onnx_bytes_fp8"] < 0.35 * figures["onnx_bytes_fp32"]
    model = onnx.load(tmp_path / "fp8.onnx")
    onnx.checker.check_model(model, full_check=True)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantized = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in tensors]
    assert len(dequantized) == figures["quantized_nodes"]
    for node in dequantized:
        weight, scale = (numpy_helper.to_array(tensors[name]) for name in node.input[:2])
        assert tensors[node.input[0]].data_type == onnx.TensorProto.FLOAT8E4M3FN and scale.shape == weight.shape[:1]
        assert (np.abs(weight.astype(np.float32)).reshape(len(weight), -1).max(1) == 448).all()  # every channel uses the range
    x = rows(8)
    (right,), (found,) = (ReferenceEvaluator(str(tmp_path / name)).run(None, {"x": x}) for name in ("cnn.onnx", "fp8.onnx"))
    assert 1e-3 < np.abs(found - right).max() / np.abs(right).max() < 0.1


def test_an_fp8_file_and_an_int8_file_are_not_taken_for_each_other(tmp_path):
    path = cnn(tmp_path / "cnn.onnx")
    for precision in ("int8", "fp8"):
        quantize(path, tmp_path / f"{precision}.onnx", rows(100), Quantize(), precision)
    with pytest.raises(UserError, match=r"'int8' was asked for, but .*fp8\.onnx is quantized to fp8"):
        read_for(tmp_path / "fp8.onnx", "int8")
    with pytest.raises(UserError, match=r"'fp8' was asked for, but .*int8\.onnx is quantized to int8"):
        read_for(tmp_path / "int8.onnx", "fp8")
