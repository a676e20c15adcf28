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
from portaisys.compress.quantize import LEAST_ROWS, METHODS, HeldOut, kl_range, make_plan, quantize, refuse_calibration
from portaisys.engine import Options
from portaisys.engine import onnxruntime as runtime
from portaisys.engine import tensorrt as gpu
from portaisys.engine.onnx_file import read_for
from portaisys.spec import Quantize, SpecError, UserError, parse


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


# --- chosen by measured error ---------------------------------------------------------------------------------------


def test_auto_keeps_the_calibration_that_errs_least_on_rows_that_it_did_not_see(source, tmp_path):
    calibration = rows(96)
    calibration[0, 0, 0, 0] = 300.0  # one outlier: a range up to it wastes nearly all steps
    figures = quantize(source, tmp_path / "auto.onnx", calibration, Quantize(calibration="auto"), held_out=HeldOut(rows(100, seed=5)))
    table = figures["calibrations"]
    assert {*table} == {*METHODS} and figures["calibration"] == min(table, key=lambda name: table[name]["error"])
    assert table["percentile"]["error"] != table["minmax"]["error"]
    quantize(source, tmp_path / "same.onnx", calibration, Quantize(calibration=figures["calibration"]))
    assert hash_file(tmp_path / "auto.onnx") == hash_file(tmp_path / "same.onnx")  # what was measured is what is kept
    assert all(f"{name} {table[name]['error']:.3g}" in figures["notes"][-1] for name in METHODS)


def test_without_other_rows_auto_measures_on_every_second_one_which_then_calibrates_nothing(source, tmp_path):
    figures = quantize(source, tmp_path / "auto.onnx", rows(64), Quantize(calibration="auto"))
    assert figures["calibration_rows"] == 32 and "to 32 rows that were not calibrated on" in figures["notes"][-1]


def test_auto_chooses_for_fp8_too(source, tmp_path):
    figures = quantize(source, tmp_path / "fp8.onnx", rows(64), Quantize(calibration="auto"), "fp8")
    assert figures["calibration"] in METHODS
    read_for(tmp_path / "fp8.onnx", "fp8")


def test_too_few_calibration_rows_are_refused_with_the_number_that_would_do():
    with pytest.raises(UserError, match=f"data.calibration_rows: 12 rows are too few .* give at least {LEAST_ROWS}"):
        refuse_calibration(12, Quantize())
    refuse_calibration(LEAST_ROWS, Quantize())
    refuse_calibration(1, Quantize(method="weight_only"))  # which calibrates nothing


# --- weights alone --------------------------------------------------------------------------------------------------


def test_weights_alone_make_a_small_file_that_answers_as_fp32_and_is_int8_to_engines(tmp_path):
    path = cnn(tmp_path / "wide.onnx", width=48)
    figures = quantize(path, tmp_path / "int8.onnx", rows(20), Quantize(method="weight_only"))
    assert figures["onnx_bytes_int8"] < 0.3 * figures["onnx_bytes_fp32"] and figures["quantized_nodes"] == 7
    graph = onnx.load(tmp_path / "int8.onnx").graph
    assert not any(node.op_type == "QuantizeLinear" for node in graph.node)
    read_for(tmp_path / "int8.onnx", "int8")
    with pytest.raises(UserError, match="'fp32' was asked for"):
        read_for(tmp_path / "int8.onnx", "fp32")
    notes = runtime.build(tmp_path / "int8.onnx", Options("int8"), tmp_path / "built")
    assert notes == ["weights alone are int8: ONNX Runtime makes them floats when it opens the file"]
    x = rows(200, seed=7)
    (found,) = runtime.load(tmp_path / "built", Options("int8")).run({"x": x}).values()
    assert np.linalg.norm(found - answers(path, x)) < 0.02 * np.linalg.norm(answers(path, x))


def test_tensorrt_builds_a_file_of_int8_weights(source, tmp_path):
    quantize(source, tmp_path / "int8.onnx", rows(20), Quantize(method="weight_only"))
    gpu.build(tmp_path / "int8.onnx", Options("int8"), tmp_path / "plan")
    assert (tmp_path / "plan").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "weight_only", "sensitivity": True}, r"compress\.0\.quantize\.method: weight_only calibrates nothing"),
        ({"method": "weight_only", "calibration": "entropy"}, r"compress\.0\.quantize\.method: weight_only calibrates nothing"),
        ({"method": "qat", "calibration": "auto"}, r"compress\.0\.quantize\.calibration: qat learns the ranges"),
        ({"distill": True}, r"compress\.0\.quantize\.distill: only qat trains, and this is ptq"),
        ({"epochs": 5}, r"compress\.0\.quantize\.epochs: only qat trains, and this is ptq"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, reason):
    with pytest.raises(SpecError, match=reason):
        parse({"name": "x", "compress": [{"quantize": options}]})


def test_a_quantize_step_without_an_engine_that_it_is_for_is_refused():
    with pytest.raises(SpecError, match=r"engine\.precisions: fp32 leave the quantize step without an engine"):
        parse({"name": "x", "compress": [{"quantize": {}}], "engine": {"precisions": ["fp32"]}})


def test_fp8_has_no_form_of_weights_alone():
    with pytest.raises(SpecError, match=r"engine\.precisions: 'fp8' has no weight_only form"):
        parse({"name": "x", "compress": [{"quantize": {"method": "weight_only"}}], "engine": {"also_build": ["tensorrt"], "precisions": ["fp8"]}})


def test_new_options_at_their_defaults_leave_a_stage_its_key():
    assert Quantize().stage == {"calibration": "minmax", "quantize_add": None, "reduce_range": True}
    assert Quantize(sensitivity=True).stage["sensitivity"] is True


def test_entropy_clips_a_few_far_values_and_nothing_of_an_even_distribution():
    values = np.abs(np.random.default_rng(0).standard_normal(100_000))
    counts, _ = np.histogram([*values, 40.0], bins=1024, range=(0, 40))
    assert 2 / 40 < kl_range(counts) < 6 / 40
    assert kl_range(np.full(1024, 50)) > 0.95
