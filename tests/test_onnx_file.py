"""Reading a stranger's ONNX file: nothing outside its folder, nothing that is not the tensor's, never another exception than ours."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import cnn

from portaisys.engine.onnx_file import face_of, read_onnx
from portaisys.spec import UserError

CANARY = b"PORTAISYS-CANARY" * 4


def external(location, offset=None, length=None):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_with(tensor, where="initializer"):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    nodes, constants = [helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor]
    if where == "constant":
        nodes, constants = [helper.make_node("Constant", [], ["w"], value=tensor), *nodes], []
    if where == "branch":
        inner = helper.make_graph([helper.make_node("Identity", ["w"], ["b"])], "b", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, [4, 4])], [tensor])
        nodes = [helper.make_node("If", ["yes"], ["v"], then_branch=inner, else_branch=inner), helper.make_node("MatMul", ["x", "v"], ["y"])]
        constants = [numpy_helper.from_array(np.array(True), "yes")]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write(folder: Path, tensor, where="initializer") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "m.onnx").write_bytes(model_with(tensor, where).SerializeToString())
    return folder / "m.onnx"


@pytest.fixture
def place(tmp_path):
    """A model's folder with honest data in it, and a secret beside the folder."""
    (tmp_path / "secret").write_bytes(CANARY)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w.data").write_bytes(b"\0" * 8 + np.eye(4, dtype=np.float32).tobytes())
    return tmp_path


@pytest.mark.parametrize("where", ["initializer", "constant", "branch"])
def test_honest_data_beside_the_model_is_taken_inside(place, where, monkeypatch):
    path = write(place / "m", external("w.data", 8, 64), where)
    monkeypatch.chdir(place / "m")
    for given_as in (path, Path("m.onnx")):  # from its own folder, where the base is empty
        model = read_onnx(given_as)
        assert np.eye(4, dtype=np.float32).tobytes() in model.SerializeToString() and b"w.data" not in model.SerializeToString()
    assert face_of(model).batch == 0


@pytest.mark.parametrize("where", ["initializer", "constant", "branch"])
@pytest.mark.parametrize("location", ["../secret", "{}/secret", "", ".", "..", "sub/../../secret", "..\\secret", "w.data\0", "link", "linked/secret", "hard", "missing", "folder"])
def test_data_outside_the_models_folder_is_never_read(place, location, where):
    folder = place / "m"
    (folder / "link").symlink_to(place / "secret")
    (folder / "linked").symlink_to(place)
    (folder / "hard").hardlink_to(place / "secret")
    (folder / "folder").mkdir()
    path = write(folder, external(location.format(place), 0, 64), where)
    with pytest.raises(UserError) as refused:
        read_onnx(path)
    assert str(refused.value).startswith(str(path)) and "CANARY" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_pipe_is_refused_and_not_waited_for(place):
    os.mkfifo(place / "m" / "pipe")
    with pytest.raises(UserError, match="is no plain file of its own"):
        read_onnx(write(place / "m", external("pipe", 0, 64)))


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 2**62), (2**62, 64), (-8, 64), (8, 63), (8, 65), (9, 64), (8, "0x40"), ("", 64), (8, " 64"), (0, "٦٤")],
)
def test_a_length_or_offset_that_is_not_the_tensors_is_refused(place, offset, length):
    with pytest.raises(UserError, match="tensor 'w'"):
        read_onnx(write(place / "m", external("w.data", offset, length)))


@pytest.mark.parametrize("dims", [[-4, -4], [2**40, 2**40]])
def test_dims_that_no_tensor_has_are_refused(place, dims):
    tensor = external("w.data", 8)
    tensor.dims[:] = dims
    with pytest.raises(UserError, match=r"cannot have external data|GiB"):
        read_onnx(write(place / "m", tensor))


@pytest.mark.parametrize(("opset", "says"), [(10, "is of opset 10; 11 to"), (99, "is of opset 99; 11 to")])
def test_an_opset_that_is_not_known_is_said(tmp_path, opset, says):
    model = onnx.load(cnn(tmp_path / "m.onnx"))
    model.opset_import[0].version = opset
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=says):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"\0", b"hello", b"\x80" * 100, b'{"a": 1}'])
def test_what_is_no_onnx_file_is_said(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(UserError, match="not an ONNX file, or a damaged one"):
        read_onnx(tmp_path / "m.onnx")


def test_a_missing_file_a_folder_and_an_operator_nobody_defined_are_said(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_onnx(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="cannot be read"):
        read_onnx(tmp_path)
    model = onnx.load(cnn(tmp_path / "m.onnx"))
    model.graph.node[0].op_type = "Unheard"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="Unheard"):
        read_onnx(tmp_path / "m.onnx")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_a_cut_or_changed_file_is_a_model_or_refused_never_worse(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    whole = (folder / "good.onnx").read_bytes() if (folder / "good.onnx").exists() else cnn(folder / "good.onnx").read_bytes()
    if data.draw(st.booleans()):
        odd = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        odd = bytearray(whole)
        for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=8)):
            odd[at] = data.draw(st.integers(0, 255))
    (folder / "odd.onnx").write_bytes(bytes(odd))
    try:
        model = read_onnx(folder / "odd.onnx")
        face_of(model)
    except UserError as error:
        assert re.match(r"[^\n]+$", str(error))
