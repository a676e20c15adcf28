"""An engine is used only when a row gets the same answer in every batch, and a number."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_graphs import cnn, rows

from portaisys import engine
from portaisys.compress.quantize import quantize
from portaisys.engine import Options, Tensor, verify
from portaisys.engine.cache import Cache, get_or_build, load
from portaisys.judge import Row, _sound
from portaisys.spec import Quantize, UserError

BATCHES = (1, 2, 8, 16)


class Wrong:
    """An engine's face with answers as a test wants them: no sound backend gives wrong ones on demand."""

    backend, precision, device = "wrong", "fp32", "cpu"
    inputs, outputs = (Tensor("x", "float32", (-1, 2)),), (Tensor("y", "float32", (-1, 2)),)

    def __init__(self, answer):
        self.answer = answer

    def run(self, feeds):
        return {"y": self.answer(feeds["x"])}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_real_engines_are_sound(tmp_path, backend, precision):
    path = cnn(tmp_path / "fp32.onnx")
    quantize(path, tmp_path / "int8.onnx", rows(100), Quantize())
    opened = load(get_or_build(tmp_path / f"{precision}.onnx", backend, Options(precision), Cache(tmp_path / "cache")), Options(precision))
    assert backend in engine.available() and verify.problem(opened, {"x": rows(24)}, batches=BATCHES) == ""


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda x: x * (1 if len(x) < 8 else 1.1), "at batch 8 y is"),
        (lambda x: x - x.mean(0, keepdims=True) + (x if len(x) == 1 else 0), "at batch 2 y is"),  # depends on its neighbours
        (lambda x: x * (1 if len(x) < 16 else np.nan), "at batch 16 y holds NaN"),
        (lambda x: x / 0.0, "its answers hold NaN or infinity"),
    ],
)
def test_answers_that_depend_on_the_batch_or_are_no_numbers_are_found(answer, says):
    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    with np.errstate(all="ignore"):
        assert verify.problem(Wrong(answer), {"x": x}, batches=BATCHES).startswith(says)


def test_answers_are_held_against_a_reference_where_there_is_one():
    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    assert verify.problem(Wrong(lambda x: x), {"x": x}, batches=BATCHES, expected={"y": x}) == ""
    assert "from the reference" in verify.problem(Wrong(lambda x: x), {"x": x}, batches=BATCHES, expected={"y": x + 1})


def test_answers_of_another_shape_are_far_even_where_numpy_would_broadcast_them():
    x = np.ones((20, 2), np.float32)
    assert "y has shape [1, 2, 1] and not [1, 2]" in verify.problem(Wrong(lambda x: x[..., None]), {"x": x}, batches=BATCHES, expected={"y": x})


def test_an_unsound_candidate_is_not_admitted_and_an_unsound_dense_engine_ends_the_run():
    row = Row("int8", "onnxruntime", "int8", "cpu", "executed", 1, 1, 1, verdicts={}, admissible=True, because="fast")
    assert _sound(row, "") is row
    refused = _sound(row, "at batch 8 an answer is off")
    assert not refused.admissible and refused.verdicts["soundness"]["action"] == "fail" and "soundness fail: at batch 8" in refused.because
    with pytest.raises(UserError, match="the dense fp32 engine of onnxruntime is unsound"):
        _sound(Row("dense fp32", "onnxruntime", "fp32", "cpu", "executed", 1, 1, 1, admissible=True), "at batch 8 an answer is off")
