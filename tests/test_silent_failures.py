"""Failures that give no error: each is made to happen by the direct way, and is caught or avoided by the platform's."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx_graphs import cnn, rows
from torch import nn

from portaisys import spec
from portaisys.compress.cast import cast
from portaisys.compress.quantize import quantize
from portaisys.data import Split
from portaisys.data.sources import Table
from portaisys.engine import Options, onnxruntime
from portaisys.engine import tensorrt as gpu
from portaisys.export import export
from portaisys.judge import DENSE, Subject, judge
from portaisys.spec import Quantize, UserError


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(*layers).eval()


def conv_weights(path):
    graph = onnx.load(path).graph
    (name,) = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    return next(tensor.data_type for tensor in graph.initializer if tensor.name == name)


# --- bf16 export of a convolution with BatchNorm --------------------------------------------------------------------


def test_torchs_own_bf16_export_of_conv_and_batchnorm_has_float_weights_which_engines_refuse(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(net().bfloat16(), (torch.rand(2, 1, 12, 12, dtype=torch.bfloat16),), dynamo=True, optimize=True, external_data=False, verbose=False)
    program.save(str(tmp_path / "direct.onnx"))
    assert conv_weights(tmp_path / "direct.onnx") == TensorProto.FLOAT
    with pytest.raises(UserError, match="must be of same type"):
        gpu.build(tmp_path / "direct.onnx", Options("bf16"), tmp_path / "plan")
    with pytest.raises(UserError, match="ONNX Runtime cannot open it"):
        onnxruntime.reference(tmp_path / "direct.onnx", {"input": rows(2)}, 0)


def test_exported_in_fp32_and_cast_the_same_model_is_bf16_throughout_and_builds(tmp_path):
    export(net(), rows(64), spec.Export(max_batch=16), tmp_path / "fp32.onnx")
    cast(tmp_path / "fp32.onnx", tmp_path / "bf16.onnx", "bf16")
    assert conv_weights(tmp_path / "bf16.onnx") == TensorProto.BFLOAT16
    gpu.build(tmp_path / "bf16.onnx", Options("bf16", opt_batch=4, max_batch=16), tmp_path / "plan")
    assert (tmp_path / "plan").stat().st_size > 5_000


# --- fp16 scales on ONNX Runtime's CPU ------------------------------------------------------------------------------


def relative(found, right):
    return float(np.linalg.norm(found - right) / np.linalg.norm(right - right.mean(0)))


def test_fp16_scales_give_wrong_answers_on_a_cpu_session_as_it_comes_and_not_on_the_engine(tmp_path):
    """A bias over the product of two small scales is beyond fp16's range: the optimizer that quantizes biases makes it infinite, and no error."""
    model = onnx.load(cnn(tmp_path / "fp32.onnx"))
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 4:  # small weights, as BatchNorm with a large variance leaves them
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(0.1), tensor.name))
    onnx.save(model, tmp_path / "fp32.onnx")
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", rows(100), Quantize())
    cast(tmp_path / "int8.onnx", tmp_path / "mixed.onnx", "fp16")
    x = rows(64, seed=7)
    right = onnxruntime.reference(tmp_path / "fp32.onnx", {"x": x}, 0)
    (right,) = right.values()
    session = onnxruntime.onnxruntime.InferenceSession(str(tmp_path / "mixed.onnx"), providers=["CPUExecutionProvider"])
    assert relative(session.run(None, {"x": x})[0], right) > 1
    onnxruntime.build(tmp_path / "mixed.onnx", Options("int8"), tmp_path / "built")
    (found,) = onnxruntime.load(tmp_path / "built", Options("int8")).run({"x": x}).values()
    assert relative(found, right) < 0.2


# --- INT8 that is slower than fp32 ----------------------------------------------------------------------------------


def test_an_int8_engine_that_is_slower_than_fp32_is_not_admitted_however_accurate(tmp_path, one_thread):
    """Convolutions quantized and residual sums not, the placement that TensorRT's guides give: on ONNX Runtime's CPU 1.5 x the time of fp32."""
    fp32, int8 = cnn(tmp_path / "fp32.onnx"), tmp_path / "int8.onnx"
    quantize(fp32, int8, rows(100), Quantize(quantize_add=False, reduce_range=False))
    x = rows(300, seed=7)

    def dense(batch):
        return next(iter(onnxruntime.reference(fp32, {"x": batch}, 0).values()))

    y = dense(x).argmax(1)
    options = spec.parse({"name": "slow", "gate": {"max_accuracy_drop": 0.2, "latency_pairs": 60}, "export": {"max_batch": 32}, "storage": {"cache": str(tmp_path / "cache")}})
    made = {name: SimpleNamespace(file=lambda _, path=path: path, scores={"parameters": 1, "macs": 1}) for name, path in (("fp32", fp32), ("int8", int8))}
    subjects = [Subject(DENSE, "fp32", made["fp32"], None, "onnxruntime"), Subject("int8", "int8", made["int8"], DENSE, "onnxruntime")]
    table = Table(lambda indices: x[indices], y, tuple(map(str, range(10))), x.shape[1:], "")
    judgement = judge(options, subjects, dense, {"parameters": 1, "macs": 1, "size_bytes": 1}, Split(table, np.arange(len(y))), looks=2)
    row = next(row for row in judgement.rows if row.engine == "int8")
    assert row.verdicts["accuracy"]["action"] == "pass"
    assert row.verdicts["latency"]["action"] != "pass"
    assert not row.admissible and judgement.admitted == (DENSE,)
