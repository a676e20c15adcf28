"""Training with the rounding of INT8: through the one loop, resumed bit by bit, and written as the one canonical file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from portaisys import launch, models, spec
from portaisys.compress import qat
from portaisys.compress.quantize import LEARNT, learnt, quantize
from portaisys.compress.sensitivity import error
from portaisys.engine import Options, onnxruntime
from portaisys.engine import tensorrt as gpu
from portaisys.export import export
from portaisys.spec import Quantize, UserError
from portaisys.stages import FURTHEST
from portaisys.train import fit

FAMILIES = {"cnn": spec.ConvNet(channels=(8, 16)), "transformer": spec.Transformer(name="transformer", dim=16, depth=1, heads=2)}
RECIPE = Quantize(method="qat", epochs=1)
OPTIONS = spec.Train(epochs=1, learning_rate=0.01, checkpoint_every_steps=5)


def dense_weights(family, digits, folder):
    """A trained model of the family: one epoch is enough to have weights of its own."""
    torch.manual_seed(0)
    model = models.build(FAMILIES[family], digits.shape, 10, digits.mean, digits.std)
    return fit(model, digits.train, OPTIONS.model_copy(update={"learning_rate": 0.05}), folder=folder, key="dense")


@pytest.fixture(scope="module", params=[*FAMILIES])
def trained(request, digits, tmp_path_factory):
    """The folder of a model trained so: model.onnx, int8.onnx, what was learnt; and the model."""
    folder = tmp_path_factory.mktemp(request.param)
    model = dense_weights(request.param, digits, folder / "dense")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare, finish = qat.around(model, digits.calibration.x, RECIPE)
    made = finish(fit(model, digits.train, OPTIONS, folder=folder / "qat", key="k", prepare=prepare), folder)
    export(made.eval(), digits.calibration.x, spec.Export(), folder / "model.onnx")
    figures = quantize(folder / "model.onnx", folder / "int8.onnx", digits.calibration.x, RECIPE, scales=learnt(folder / LEARNT)[0])
    return folder, made, before, figures


def graph_of(folder):
    return onnx.load(folder / "int8.onnx").graph


def test_the_weights_are_trained_and_keep_the_models_own_names_and_statistics(trained):
    _, made, before, _ = trained
    after = made.state_dict()
    assert after.keys() == before.keys()
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert any(name.endswith("weight") for name in moved) and not any("running" in name for name in moved)


def test_every_quantized_layer_has_a_scale_that_was_learnt(trained):
    folder, _, _, figures = trained
    assert len(learnt(folder / LEARNT)[0]) == figures["quantized_nodes"]
    assert not any("as calibrated" in note for note in figures["notes"])


def test_the_file_is_signed_around_zero_with_a_scale_a_channel_and_no_quantized_bias(trained):
    graph = graph_of(trained[0])
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    steps = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    points = [tensors[node.input[2]] for node in steps]
    assert all(point.data_type == TensorProto.INT8 and not numpy_helper.to_array(point).any() for point in points)
    weights = {node.output[0]: node for node in steps if node.op_type == "DequantizeLinear" and node.input[0] in tensors}
    readers = [(node, index) for node in graph.node for index, name in enumerate(node.input) if name in weights]
    assert readers and {index for _, index in readers} == {1}  # never input 2, the bias
    for node, index in readers:
        values, scale = (numpy_helper.to_array(tensors[name]) for name in weights[node.input[index]].input[:2])
        assert scale.shape == (values.shape[0 if node.op_type == "Conv" else -1],) and np.abs(values.astype(int)).max() <= 64
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_the_file_says_what_the_converted_torch_model_says_and_the_engine_nearly(trained, digits):
    folder = trained[0]
    answers = learnt(folder / LEARNT)[1]
    x = digits.calibration.x[: len(answers)]
    off = error(answers, onnxruntime.reference(folder / "int8.onnx", {"x": x}, 0)["logits"])
    print("file", off)
    assert off < 0.02
    onnxruntime.build(folder / "int8.onnx", Options(precision="int8"), folder / "built")
    # Unsigned, it does not clip where training did, up to twice the range.
    assert error(answers, onnxruntime.load(folder / "built", Options(precision="int8")).run({"x": x})["logits"]) < 0.05


def test_scales_of_other_layers_would_be_noticed(trained, digits):
    folder = trained[0]
    scales, answers = learnt(folder / LEARNT)
    wrong = {name: [8 * value for value in values] for name, values in scales.items()}
    quantize(folder / "model.onnx", folder / "wrong.onnx", digits.calibration.x, RECIPE, scales=wrong)
    assert error(answers, onnxruntime.reference(folder / "wrong.onnx", {"x": digits.calibration.x[: len(answers)]}, 0)["logits"]) > FURTHEST


def test_tensorrt_builds_it(trained):
    folder = trained[0]
    gpu.build(folder / "int8.onnx", Options("int8", opt_batch=4, max_batch=16), folder / "plan")
    assert (folder / "plan").stat().st_size > 10_000


class Killed(Exception):
    pass


def test_a_run_that_died_goes_on_to_the_same_bits(digits, tmp_path):
    def run(folder, audit=lambda step, rows: None):
        model = dense_weights("cnn", digits, tmp_path / "dense")
        prepare, finish = qat.around(model, digits.calibration.x, RECIPE)
        return finish(fit(model, digits.train, OPTIONS, folder=folder, key="k", prepare=prepare, validation=digits.validation, audit=audit), folder)

    def dies(step, rows):
        if step == 8:
            raise Killed

    whole = run(tmp_path / "whole").state_dict()
    with pytest.raises(Killed):
        run(tmp_path / "cut", dies)
    steps = []
    again = run(tmp_path / "cut", lambda step, rows: steps.append(step)).state_dict()
    assert steps[0] == 5
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    assert (tmp_path / "whole" / LEARNT).read_bytes() == (tmp_path / "cut" / LEARNT).read_bytes()


def test_rows_that_are_only_judged_teach_no_range(digits):
    torch.manual_seed(0)
    made = qat.prepared(models.build(FAMILIES["cnn"], digits.shape, 10, digits.mean, digits.std), digits.calibration.x, RECIPE)
    before = made.eval().scales()
    made(torch.from_numpy(5 * digits.validation.x))
    assert made.scales() == before
    made.train()(torch.from_numpy(5 * digits.validation.x))
    assert made.scales() != before


def test_layers_kept_by_name_are_trained_without_rounding(digits):
    torch.manual_seed(0)
    model = models.build(FAMILIES["cnn"], digits.shape, 10, digits.mean, digits.std)
    made = qat.prepared(model, digits.calibration.x, RECIPE.model_copy(update={"keep": ("net.3",)}))
    assert made.scales() and not any(name.startswith("net.3") for name in made.scales())
    with pytest.raises(UserError, match=r"compress\.quantize\.keep: 'net\.9' is no layer"):
        qat.prepared(model, digits.calibration.x, RECIPE.model_copy(update={"keep": ("net.9",)}))


def test_a_model_that_torch_cannot_export_is_refused(digits):
    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 10)

        def forward(self, x):
            return self.layer(x.flatten(1)) if x.sum() > 0 else self.layer(-x.flatten(1))

    with pytest.raises(UserError, match=r"compress\.quantize\.method: qat trains what torch\.export makes of a model, and it cannot export this one.*take method: ptq"):
        qat.prepared(Branches(), digits.calibration.x, RECIPE)


def short(folder, *overrides):
    tree = {"name": "qat", "model": {"channels": [8, 16]}, "train": {"epochs": 2}, "compress": [{"quantize": {"method": "qat", "epochs": 1, "distill": True}}], "storage": {"path": str(folder)}}
    for override in overrides:
        spec._apply(tree, override)
    return spec.parse(tree)


def test_the_plan_trains_then_exports_then_quantizes():
    stages = {stage.name: stage for stage in launch.plan(short("runs"))}
    assert [*stages] == ["train", "export-dense", "qat", "export-qat", "quantize", "judge", "version"]
    assert stages["quantize"].parents == {"model": "export-qat", "learnt": "qat"}
    assert "export-qat" not in stages["judge"].parents.values()  # an fp32 file of weights that were trained for int8 is no candidate


def test_stages_leave_the_file_and_say_how_near_it_is_to_what_was_trained(digits, tmp_path):
    told = []
    made = launch.produce(short(tmp_path, "train.num_workers=0"), "quantize", lambda stage, text="", fraction=None, state="running": told.append((stage, state)), digits)
    assert 0 < made.scores["error_to_trained"] < FURTHEST
    again = launch.produce(short(tmp_path, "compress=[{quantize: {method: qat, epochs: 1, distill: true, sensitivity: true, rows: 40}}]"), "quantize", lambda *told, **more: None, digits)
    assert len(again.scores["sensitivity"]) == again.scores["quantized_nodes"]
    assert again.parents["learnt"] == made.parents["learnt"]  # a report does not train again
