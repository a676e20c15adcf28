"""Any ONNX file becomes a verified, measured, published version; what cannot says why, and nothing is made up."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import cnn, rows

from portaisys import artifact, cli
from portaisys import compile as compiling
from portaisys.compile import Order, compile_onnx, name_of
from portaisys.engine import Options, tensorrt
from portaisys.engine.verify import AS_IS
from portaisys.serve.model import Limits, open_engine, open_reference
from portaisys.spec import Storage, UserError

rng = np.random.default_rng(0)


def save(path, nodes, inputs, outputs, constants=(), opset=17, ir=8):
    """A file of `nodes`; inputs and outputs: name -> (type, shape)."""
    values = [[helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in table.items()] for table in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", *values, [numpy_helper.from_array(value, name) for name, value in dict(constants).items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir), path)
    return path


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs, outputs, **attributes)


F, I = TensorProto.FLOAT, TensorProto.INT64  # noqa: E741


def mlp(path, batch="batch", opset=17, **extra):
    nodes = [node("MatMul", ["x", "w1"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "w2"], ["y"])]
    weights = {"w1": rng.normal(size=(16, 64)).astype(np.float32) / 4, "w2": rng.normal(size=(64, 5)).astype(np.float32) / 8}
    return save(path, nodes, {"x": (F, [batch, 16])}, {"y": (F, [batch, 5])}, weights, opset, **extra)


def two_inputs(path):
    """Word ids and a mask, both dimensions free; two outputs, one of them integers."""
    nodes = [
        node("Gather", ["table", "ids"], ["e"]), node("Cast", ["mask"], ["m"], to=F), node("Unsqueeze", ["m", "last"], ["mm"]), node("Mul", ["e", "mm"], ["em"]),
        node("ReduceSum", ["em", "one"], ["s"], keepdims=0), node("MatMul", ["s", "w"], ["scores"]), node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
    ]  # fmt: skip
    weights = {
        "table": rng.normal(size=(50, 32)).astype(np.float32), "w": rng.normal(size=(32, 7)).astype(np.float32),
        "last": np.array([2]), "one": np.array([1]),
    }  # fmt: skip
    shape = ["batch", "seq"]
    return save(path, nodes, {"ids": (I, shape), "mask": (I, shape)}, {"scores": (F, ["batch", 7]), "best": (I, ["batch"])}, weights)


def with_state(path):
    """A recurrent step: the state has its batch in dimension 1, so rows of different calls cannot share one."""
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Squeeze", ["h", "zero"], ["hs"]), node("Add", ["a", "hs"], ["s"]), node("Tanh", ["s"], ["y"]), node("Unsqueeze", ["y", "zero"], ["hn"])]
    weights = {"w": rng.normal(size=(4, 8)).astype(np.float32), "zero": np.array([0])}
    return save(path, nodes, {"x": (F, ["n", 4]), "h": (F, [1, "n", 8])}, {"y": (F, ["n", 8]), "hn": (F, [1, "n", 8])}, weights)


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Storage(path=str(tmp_path / "runs"), cache=str(tmp_path / "cache"))


def made(path, storage, **options):
    return compile_onnx(Order(path, name_of(path), storage=storage, **options))


def plain(path, feeds):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def lines(found):
    return {(line.backend, line.precision): line for line in found.table}


def test_a_file_becomes_a_version_that_answers_as_it_does(tmp_path, storage):
    path = mlp(tmp_path / "My Model.onnx")
    found = made(path, storage)
    assert str(found.version) == "my-model@1" and found.version.aliases and found.version.verdict == "pass"
    assert found.judged[0].precision == "fp32" and "made-up rows" in found.notes[0]
    opened = open_engine("my-model@production", storage, Limits())
    x = rng.normal(size=(9, 16)).astype(np.float32)
    np.testing.assert_allclose(opened.engine.run({"x": x})["y"], plain(path, {"x": x})["y"], rtol=1e-4, atol=1e-5)
    assert opened.about["max_batch"] == 32 and opened.about["lineage"]["onnx"] == artifact.hash_file(path)


def test_the_version_can_be_served(tmp_path, storage):
    made(mlp(tmp_path / "m.onnx"), storage)
    model = open_reference("m@production", storage, Limits())
    assert model.engine.precision == "fp32" and [tensor.name for tensor in model.inputs] == ["x"]
    model.engine.close()


def test_several_inputs_of_integers_and_free_dimensions_are_timed_on_every_backend(tmp_path, storage):
    path = two_inputs(tmp_path / "words.onnx")
    np.savez(tmp_path / "rows.npz", ids=rng.integers(0, 50, (40, 12)), mask=np.ones((40, 12), np.int64))
    found = made(path, storage, calibration=tmp_path / "rows.npz")
    assert lines(found)["onnxruntime", "fp32"].ms and lines(found)["openvino", "fp32"].ms
    opened = open_engine("words@1", storage, Limits())
    feeds = {"ids": rng.integers(0, 50, (3, 5)), "mask": np.ones((3, 5), np.int64)}
    answers, expected = opened.engine.run(feeds), plain(path, feeds)
    np.testing.assert_allclose(answers["scores"], expected["scores"], rtol=1e-4, atol=1e-4)
    assert (answers["best"] == expected["best"]).all()


def test_a_free_dimension_without_sizes_or_rows_is_asked_for(tmp_path, storage):
    path = two_inputs(tmp_path / "words.onnx")
    with pytest.raises(UserError, match=r"input ids has the free dimension 'seq'; give its sizes \(--dim seq=LEAST:USUAL:MOST\)"):
        made(path, storage)
    assert made(path, storage, dims=(("seq", 1, 6, 12),)).judged[0].admitted
    with pytest.raises(UserError, match=r"--dim length: .* it has seq"):
        made(path, storage, dims=(("length", 1, 6, 12),))
    with pytest.raises(UserError, match="seq goes from 9 by 6 to 12"):
        made(path, storage, dims=(("seq", 9, 6, 12),))


def test_a_model_with_state_is_compiled_and_asked_whole_calls_but_not_batched(tmp_path, storage):
    path = with_state(tmp_path / "step.onnx")
    calibration = {"x": rng.normal(size=(3, 4)).astype(np.float32), "h": rng.normal(size=(1, 3, 8)).astype(np.float32)}
    np.savez(tmp_path / "call.npz", **calibration)
    found = made(path, storage, calibration=tmp_path / "call.npz")
    assert set(lines(found)["onnxruntime", "fp32"].ms) == {AS_IS}
    assert cli.main(["predict", "step@1", str(tmp_path / "call.npz"), "--out", str(tmp_path / "out.npz"), "--storage", storage.path]) == 0
    answers = artifact.read_arrays(tmp_path / "out.npz")
    for name, expected in plain(path, calibration).items():
        np.testing.assert_allclose(answers[name], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="its inputs share no batch in dimension 0"):
        open_reference("step@1", storage, Limits())


def test_int8_is_calibrated_on_one_half_and_judged_on_the_other(tmp_path, storage):
    path = cnn(tmp_path / "cnn.onnx")
    np.savez(tmp_path / "rows.npz", x=rows(200))
    found = made(path, storage, calibration=tmp_path / "rows.npz", precisions=("int8",), max_error=0.2)
    int8 = next(one for one in found.judged if one.precision == "int8")
    assert 0 < int8.error < 0.1 and int8.agreement > 0.8 and "on rows it was not calibrated with" in int8.because
    assert (found.folder / "int8.onnx").exists() == int8.admitted
    about = json.loads((found.folder / "version.json").read_text())
    assert about["precisions"] == [one.precision for one in found.judged if one.admitted] and set(about["backends"]) == set(about["precisions"])


def test_int8_whose_answers_are_too_far_off_is_not_admitted(tmp_path, storage):
    np.savez(tmp_path / "rows.npz", x=rows(40))
    found = made(cnn(tmp_path / "cnn.onnx"), storage, calibration=tmp_path / "rows.npz", precisions=("int8",), max_error=1e-6)
    assert [one.precision for one in found.judged if one.admitted] == ["fp32"] and not (found.folder / "int8.onnx").exists()


def test_labels_decide_where_there_are_any(tmp_path, storage):
    path, x = cnn(tmp_path / "cnn.onnx"), rows(400)
    np.savez(tmp_path / "rows.npz", x=x, y=next(iter(plain(path, {"x": x}).values())).argmax(1))
    found = made(path, storage, calibration=tmp_path / "rows.npz", precisions=("int8",), max_accuracy_drop=0.4)
    assert "accuracy drop" in next(one for one in found.judged if one.precision == "int8").because


def test_a_fixed_batch_is_kept_and_no_other_can_be_asked_for(tmp_path, storage):
    path = mlp(tmp_path / "fixed.onnx", batch=4)
    found = made(path, storage)
    assert set(lines(found)["onnxruntime", "fp32"].ms) == {4}
    with pytest.raises(UserError, match=r"its batch is fixed at 4, so --max-batch 8 cannot be"):
        made(path, storage, max_batch=8)
    with pytest.raises(UserError, match="fixed at 1, so --max-batch 8"):
        made(mlp(tmp_path / "one.onnx", batch=1), storage, max_batch=8)
    x = rng.normal(size=(6, 16)).astype(np.float32)
    np.savez(tmp_path / "six.npz", x=x)
    assert cli.main(["predict", "fixed@1", str(tmp_path / "six.npz"), "--out", str(tmp_path / "out.npz"), "--storage", storage.path]) == 0
    expected = np.concatenate([plain(path, {"x": x[:4]})["y"], plain(path, {"x": x[2:]})["y"][2:]])
    np.testing.assert_allclose(artifact.read_arrays(tmp_path / "out.npz")["y"], expected, rtol=1e-4, atol=1e-5)


def test_a_quantized_file_is_taken_as_it_is(tmp_path, storage):
    from portaisys.compress.quantize import quantize
    from portaisys.spec import Quantize

    quantize(cnn(tmp_path / "cnn.onnx"), tmp_path / "q.onnx", rows(50), Quantize())
    np.savez(tmp_path / "rows.npz", x=rows(40))
    found = made(tmp_path / "q.onnx", storage, calibration=tmp_path / "rows.npz")
    assert [one.precision for one in found.judged] == ["int8"]
    with pytest.raises(UserError, match="is quantized already, so --precision bf16 cannot be made of it"):
        made(tmp_path / "q.onnx", storage, precisions=("bf16",))


@pytest.mark.parametrize("opset", [11, 12, 13, 17])
def test_old_opsets_are_taken_and_quantized(tmp_path, storage, opset):
    np.savez(tmp_path / "rows.npz", x=rng.normal(size=(40, 16)).astype(np.float32))
    found = made(mlp(tmp_path / "old.onnx", opset=opset, ir=6), storage, calibration=tmp_path / "rows.npz", precisions=("int8",), max_error=0.5)
    assert {one.precision for one in found.judged} == {"fp32", "int8"}


def test_external_data_is_taken_inside(tmp_path, storage):
    path = mlp(tmp_path / "whole.onnx")
    model = onnx.load(path)
    (tmp_path / "parts").mkdir()
    onnx.save(model, tmp_path / "parts" / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    found = made(tmp_path / "parts" / "m.onnx", storage)
    x = rng.normal(size=(3, 16)).astype(np.float32)
    np.testing.assert_allclose(plain(found.folder / "fp32.onnx", {"x": x})["y"], plain(path, {"x": x})["y"])


def test_compiling_again_makes_the_same_version(tmp_path, storage):
    path = mlp(tmp_path / "m.onnx")
    first = made(path, storage, backend="onnxruntime")
    assert made(path, storage, backend="onnxruntime").version.version == first.version.version


def test_an_operator_that_no_backend_here_knows_is_named(tmp_path, storage):
    path = save(tmp_path / "odd.onnx", [node("Unheard", ["x"], ["y"], domain="test.odd")], {"x": (F, ["batch", 4])}, {"y": (F, ["batch", 4])})
    model = onnx.load(path)
    model.opset_import.extend([helper.make_opsetid("test.odd", 1)])
    onnx.save(model, path)
    with pytest.raises(UserError, match="Unheard"):
        made(path, storage)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"z": np.zeros((40, 16), np.float32)}, "holds z; the model takes x"),
        ({"x": np.zeros((40, 15), np.float32)}, r"x is float32 \[40, 15\]; the model takes float32 \[-1, 16\]"),
        ({"x": np.zeros((40, 16))}, "x is float64"),
        ({"x": np.full((40, 16), np.nan, np.float32)}, "x holds NaN"),
        ({"x": np.zeros((0, 16), np.float32)}, "the same number of rows, at least 1"),
        ({"x": np.ones((40, 16), np.float32)}, "every calibration value is the same"),
        ({"x": rng.normal(size=(10, 16)).astype(np.float32)}, "10 rows; quantizing takes at least 20"),
        ({"x": np.array([object()])}, "not an .npz of plain arrays"),
    ],
)
def test_rows_that_cannot_calibrate_are_refused(tmp_path, storage, arrays, says):
    np.savez(tmp_path / "rows.npz", **arrays)
    with pytest.raises(UserError, match=says):
        made(mlp(tmp_path / "m.onnx"), storage, calibration=tmp_path / "rows.npz", precisions=("int8",))


def test_int8_without_rows_is_refused(tmp_path, storage):
    with pytest.raises(UserError, match="--precision int8: needs --calibration"):
        made(mlp(tmp_path / "m.onnx"), storage, precisions=("int8",))


def test_the_verbs_say_what_they_made_and_refuse_in_one_line(tmp_path, storage, capsys):
    path = mlp(tmp_path / "m.onnx")
    assert cli.main(["compile", str(path), "--storage", storage.path, "--max-batch", "8"]) == 0
    assert "m@1" in capsys.readouterr().out
    assert cli.main(["benchmark", "m@1", "--batches", "1,8", "--rounds", "5", "--storage", storage.path]) == 0
    said = capsys.readouterr().out
    assert "onnxruntime" in said and "p90 ms" in said
    assert cli.main(["benchmark", "m@1", "--batches", "9", "--storage", storage.path]) == 2
    assert "--batches 9: m@1 was verified from 1 to 8" in capsys.readouterr().err
    np.savez(tmp_path / "odd.npz", z=np.zeros((1, 16), np.float32))
    assert cli.main(["predict", "m@1", str(tmp_path / "odd.npz"), "--out", str(tmp_path / "out.npz"), "--storage", storage.path]) == 2
    assert "holds z; m@1 takes x" in capsys.readouterr().err and not (tmp_path / "out.npz").exists()
    assert cli.main(["compile", str(tmp_path / "none.onnx"), "--storage", storage.path]) == 2
    with pytest.raises(SystemExit):
        cli.main(["compile", str(path), "--dim", "seq=1:2"])


def test_a_precision_that_the_named_backend_lacks_is_refused(tmp_path, storage):
    with pytest.raises(UserError, match=r"--precision fp16: backend 'onnxruntime' has fp32, int8; take one of these"):
        made(cnn(tmp_path / "cnn.onnx"), storage, precisions=("fp16",), backend="onnxruntime")


def test_files_are_typed_where_types_are_what_the_backend_goes_by(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "available", lambda: {"tensorrt": "as if a GPU were here"})
    source = cnn(tmp_path / "cnn.onnx")
    order = compiling.Order(source, "cnn", precisions=("fp32", "fp16", "bf16", "int8", "fp8"))
    with artifact.writing(tmp_path / "draft", kind="version", key="k", parents={}, spec={}) as draft:
        files = compiling._files(draft, order, source, tmp_path, {"x": rows(40)}, {"x": rows(4)}, print)
        assert any("kept in fp32" in note for note in draft.notes)
    assert files["openvino", "bf16"] == files["onnxruntime", "fp32"] == source and files["openvino", "int8"].name == "int8.onnx"
    for precision in order.precisions:
        assert (files["tensorrt", precision] == source) is (precision == "fp32")
        tensorrt.build(files["tensorrt", precision], Options(precision), tmp_path / "plan")
