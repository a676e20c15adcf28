"""fp16 and bf16 files: right where they can be, fp32 islands where they cannot, found and named."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_graphs import Graph, cnn, rows

from portaisys import models, spec
from portaisys.compress.cast import MOST_TRIALS, cast, cast_model, error_of, with_islands
from portaisys.compress.quantize import quantize
from portaisys.engine import Options
from portaisys.engine import tensorrt as gpu
from portaisys.export import export
from portaisys.spec import Quantize, UserError


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cast")
    torch.manual_seed(0)
    model = models.build(spec.Transformer(name="transformer", dim=32, depth=1, heads=2), (1, 12, 12), 10, 0.0, 1.0)
    export(model, rows(64), spec.Export(max_batch=16), folder / "transformer.onnx")
    return folder / "transformer.onnx"


def overflowing(path, times=1):
    """Pictures scaled beyond fp16's range and back, once or twice, and a head."""
    graph, x = Graph(), "x"
    for _ in range(times):
        scale = graph.weight(1)
        graph.weights[-1] = numpy_helper.from_array(np.array([3e3], np.float32), scale)
        x = graph.op("Relu", x)
        for kind in ("Mul", "Mul", "Div", "Div"):
            x = graph.op(kind, x, scale)
    x = graph.op("Flatten", graph.op("GlobalAveragePool", x))
    return graph.save(path, graph.op("Gemm", x, graph.weight(1, 10), graph.weight(10)), ["batch", 1, 12, 12])


def answers(path, x):
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(str(path)).run(None, {"x": x})


def casts(path):
    return [node for node in onnx.load(path).graph.node if node.op_type == "Cast"]


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 0.005), ("bf16", 0.03)])
def test_a_cnn_is_all_low_between_one_cast_at_each_end(tmp_path, precision, bound):
    path = cnn(tmp_path / "cnn.onnx")
    assert cast(path, tmp_path / "low.onnx", precision) == []
    onnx.checker.check_model(onnx.load(tmp_path / "low.onnx"), full_check=True)
    model, x = onnx.load(tmp_path / "low.onnx"), rows(4)
    assert error_of(model, {"x": x}, answers(path, x)) < bound and len(casts(tmp_path / "low.onnx")) == 2
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16}
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)] == [TensorProto.FLOAT] * 2


def test_a_transformer_keeps_its_norms_and_softmax(transformer, tmp_path):
    cast(transformer, tmp_path / "low.onnx", "fp16")
    onnx.checker.check_model(onnx.load(tmp_path / "low.onnx"), full_check=True)
    x = rows(4)
    assert error_of(onnx.load(tmp_path / "low.onnx"), {"x": x}, answers(transformer, x)) < 0.005
    low = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "low.onnx"))
    kinds = {value.name: value.type.tensor_type.elem_type for value in low.graph.value_info}
    for node in low.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax", "MatMul"):
            assert kinds[node.output[0]] == (TensorProto.FLOAT16 if node.op_type == "MatMul" else TensorProto.FLOAT), node.name


@pytest.mark.parametrize("times", [1, 2])
def test_what_overflows_is_found_and_named_and_nothing_else_is_kept(tmp_path, times):
    path, x = overflowing(tmp_path / "big.onnx", times), rows(4)
    cast(path, tmp_path / "low.onnx", "fp16")
    assert not np.isfinite(answers(tmp_path / "low.onnx", x)[0]).all()
    report = with_islands(path, tmp_path / "mixed.onnx", "fp16", {"x": x}, 0.01)
    assert report.error < 0.01 and report.trials < MOST_TRIALS
    first = {f"{kind}_{index}" for start in range(0, 5 * times, 5) for kind, index in (("Mul", start + 2), ("Div", start + 3))}
    assert set(report.islands) == first and all(name in report.notes[-1] for name in first)
    for name in report.islands:  # a minimal set: without any one of them it fails
        assert error_of(cast_model(onnx.load(path), "fp16", set(report.islands) - {name})[0], {"x": x}, answers(path, x)) > 0.01


def test_a_file_that_can_bear_it_has_no_islands_and_one_trial(tmp_path):
    report = with_islands(cnn(tmp_path / "cnn.onnx"), tmp_path / "low.onnx", "fp16", {"x": rows(4)}, 0.01)
    assert (report.islands, report.trials, report.notes) == ((), 1, ())


def test_a_bound_that_nothing_meets_is_said(tmp_path):
    with pytest.raises(UserError, match=r"whatever is kept in fp32; use fp32|did not find"):
        with_islands(cnn(tmp_path / "cnn.onnx"), tmp_path / "low.onnx", "fp16", {"x": rows(2)}, -1.0)
    assert not (tmp_path / "low.onnx").exists()


def test_a_weight_that_fp16_has_not_stays_and_is_noted(tmp_path):
    path = overflowing(tmp_path / "big.onnx")
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([1e6], np.float32), "w0"))
    onnx.save(model, path)
    notes = cast(path, tmp_path / "low.onnx", "fp16")
    assert len(notes) == 4 and "w0 holds numbers that fp16 has not" in notes[0]
    x = rows(4)
    assert error_of(onnx.load(tmp_path / "low.onnx"), {"x": x}, answers(path, x)) < 0.01


def test_a_guard_against_zero_is_not_rounded_to_zero(tmp_path):
    graph = Graph()
    least = graph.weight(1)
    graph.weights[-1] = numpy_helper.from_array(np.array(1e-12, np.float32), least)
    path = graph.save(tmp_path / "norm.onnx", graph.op("Div", "x", graph.op("Max", graph.op("Abs", "x"), least)), ["batch", 1, 12, 12])
    notes = cast(path, tmp_path / "low.onnx", "fp16")
    assert len(notes) == 1 and "is 1e-12, which would be 0: it becomes 6e-05" in notes[0]
    x = rows(2)
    x[0] = 0
    assert np.isfinite(answers(tmp_path / "low.onnx", x)[0]).all()


def test_a_quantized_files_flipped_roundings_are_no_reason_for_islands(tmp_path):
    path = cnn(tmp_path / "cnn.onnx")
    quantize(path, tmp_path / "int8.onnx", rows(100), Quantize())
    report = with_islands(tmp_path / "int8.onnx", tmp_path / "mixed.onnx", "fp16", {"x": rows(4)}, 1e-6)
    assert (report.islands, report.trials) == ((), 1) and report.error > 1e-6


def test_the_same_file_gives_the_same_bytes(transformer, tmp_path):
    for name in ("a", "b"):
        cast(transformer, tmp_path / name, "fp16")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_quantized_file_becomes_int8_and_fp16(tmp_path):
    path = cnn(tmp_path / "cnn.onnx")
    quantize(path, tmp_path / "int8.onnx", rows(100), Quantize())
    cast(tmp_path / "int8.onnx", tmp_path / "mixed.onnx", "fp16")
    model, x = onnx.load(tmp_path / "mixed.onnx"), rows(4)
    onnx.checker.check_model(model, full_check=True)
    scales = {node.input[1] for node in model.graph.node if node.op_type.endswith("QuantizeLinear")}
    assert {tensor.data_type for tensor in model.graph.initializer if tensor.name in scales} == {TensorProto.FLOAT16}
    assert error_of(model, {"x": x}, answers(tmp_path / "int8.onnx", x)) < 0.1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["cnn", "transformer"])
def test_rtx_builds_every_family_in_low_precision(transformer, tmp_path, family, precision):
    cast(transformer if family == "transformer" else cnn(tmp_path / "cnn.onnx"), tmp_path / "low.onnx", precision)
    gpu.build(tmp_path / "low.onnx", Options(precision, opt_batch=4, max_batch=16), tmp_path / "plan")
    assert (tmp_path / "plan").stat().st_size > 10_000
    with pytest.raises(UserError, match=f"'fp32' was asked for, but the weights in .* are {precision}"):
        gpu.build(tmp_path / "low.onnx", Options("fp32"), tmp_path / "plan")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["cnn", "transformer"])
def test_rtx_builds_every_family_in_eight_bits_with_fp32_and_with_fp16_between(transformer, tmp_path, family, precision):
    source = transformer if family == "transformer" else cnn(tmp_path / "cnn.onnx")
    quantize(source, tmp_path / "low.onnx", rows(40), Quantize(), precision)
    cast(tmp_path / "low.onnx", tmp_path / "mixed.onnx", "fp16")
    for name in ("low", "mixed"):
        gpu.build(tmp_path / f"{name}.onnx", Options(precision), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000


def test_a_graph_without_weights_is_low_all_the_same(tmp_path):
    graph = Graph()
    path = graph.save(tmp_path / "plain.onnx", graph.op("Mul", graph.op("Relu", "x"), "x"), ["batch", 10])
    cast(path, tmp_path / "low.onnx", "fp16")
    gpu.build(tmp_path / "low.onnx", Options("fp16"), tmp_path / "plan")
    with pytest.raises(UserError, match=r"'fp32' was asked for, but the weights in .* are fp16"):
        gpu.build(tmp_path / "low.onnx", Options("fp32"), tmp_path / "plan")


def test_a_graph_that_cannot_be_evaluated_is_said(tmp_path):
    path = cnn(tmp_path / "cnn.onnx")
    model = onnx.load(path)
    model.graph.node[1].domain = "com.example"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"cannot be evaluated to find what must stay in fp32"):
        with_islands(path, tmp_path / "low.onnx", "fp16", {"x": rows(2)}, 0.01)
