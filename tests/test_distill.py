"""Distillation: what each loss says and asks for, which layers are compared, students by spec, teachers from elsewhere, and runs that go on."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_launch import quiet
from test_train import Killed, killed_at, same
from test_train_ranks import group
from torch import nn

from portaisys import artifact, data, distributed, launch, models, spec, teachers
from portaisys.compress import distill
from portaisys.compress.distill import Pupil, attention_map, distillation, evenly, inherit, paired, projections
from portaisys.distributed import Place
from portaisys.fits import Fit, carry_out
from portaisys.spec import Ramp, UserError
from portaisys.train import fit
from portaisys.weights import restore

SHAPE = (1, 8, 8)

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return models.build(spec.ConvNet(**{"channels": (16, 32), "blocks": (1, 1), **changes}), SHAPE, 10)


def transformer(seed=0, **changes):
    torch.manual_seed(seed)
    return models.build(spec.Transformer(**{"name": "transformer", "patch": 2, "dim": 16, "depth": 4, "heads": 2, **changes}), SHAPE, 10)


def texts(seed=0, **changes):
    torch.manual_seed(seed)
    return models.build(spec.TextTransformer(**{"name": "text_transformer", "dim": 16, "depth": 2, "heads": 2, **changes}), (12,), 10, vocabulary=50)


def taught(student, teacher, options, x=None):
    """The pupil and the loss of a distillation."""
    pairs = paired(student, teacher, options)
    made = projections(student, teacher, pairs, models.example(student, SHAPE if x is None else x.shape[1:], 2))
    return Pupil(student, {kind: [own for own, _ in found] for kind, found in pairs.items()}, made).train(), distillation(teacher, options, pairs)


def rows(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SHAPE, generator=generator), torch.arange(count) % 10


HIDDEN = {"features": spec.Features(), "attention": spec.AttentionMaps(), "relations": spec.Relations()}


# --- what the loss says -------------------------------------------------------------------------------------------


def test_without_alpha_it_is_cross_entropy_bit_for_bit():
    (x, y), student, other = rows(), build(1), build(1)
    loss = distillation(build(), spec.Distill(alpha=0))(student.train()(x), x, y)
    plain = F.cross_entropy(other.train()(x), y)
    loss.backward()
    plain.backward()
    assert torch.equal(loss, plain) and all(torch.equal(a.grad, b.grad) for a, b in zip(student.parameters(), other.parameters(), strict=True))


def test_the_square_of_the_temperature_keeps_the_size_of_the_gradients():
    """At a high temperature the gradient of T^2 KL nears (student - teacher) / classes for centred logits, whatever T is (Hinton et al., equation 4)."""
    teacher, (x, y) = build().eval(), rows()
    right = teacher(x).detach()
    found = {}
    for T in (50.0, 100.0):
        logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).requires_grad_()
        distillation(teacher, spec.Distill(alpha=1, temperature=T))(logits, x, y).backward()
        found[T] = logits.grad
    centred = [each - each.mean(1, keepdim=True) for each in (logits.detach(), right)]
    torch.testing.assert_close(found[50.0], found[100.0], rtol=0.1, atol=2e-3)
    torch.testing.assert_close(found[100.0], (centred[0] - centred[1]) / 10 / 6, rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("make", [build, transformer], ids=lambda make: make.__name__)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(make):
    options = spec.Distill(alpha=1, **HIDDEN)
    student, teacher = make().eval(), make().eval()
    pupil, loss = taught(student, teacher, options)
    pupil.train()
    for norm in (module for module in pupil.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eval()
    x, y = rows()
    value = loss(pupil(x), x, y)
    assert abs(value.item()) < 1e-6
    value.backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters()) < 1e-3


@pytest.mark.parametrize("kind", HIDDEN)
def test_each_loss_adds_its_weighted_mean_over_the_layers(kind):
    x, y = rows()
    options = spec.Distill(**{kind: HIDDEN[kind].model_copy(update={"weight": 3.0})})
    student, teacher = build(1, channels=(8, 16)), build()
    pupil, loss = taught(student, teacher, options)
    out = pupil(x)
    pupil.eval()
    shown = distill.shown_by(teacher, {kind: [other for _, other in paired(student, teacher, options)[kind]]})(x)[1][kind]
    each = [distill.LOSSES[kind](own, other) for own, other in zip(out[1][kind], shown, strict=True)]
    torch.testing.assert_close(loss(out, x, y), distillation(teacher, spec.Distill())(out[0], x, y) + 3 * torch.stack(each).mean())
    assert all(value > 0 for value in each)


def test_features_are_the_mean_squared_error_of_hidden_states_through_the_projection():
    x, _ = rows()
    student, teacher = build(1, channels=(8, 16)), build()
    pupil, _ = taught(student, teacher, spec.Distill(features=spec.Features(layers={"net.3": "net.3"})))
    torch.manual_seed(0)
    own = student.net[:4](x)  # mean 0 and scale 1: nothing to normalise
    wanted = F.mse_loss(F.conv2d(own, pupil.projections[0].weight, pupil.projections[0].bias), teacher.eval().net[:4](x))
    other = build(1, channels=(8, 16))
    again = Pupil(other, {"features": ["net.3"]}, [copy.deepcopy(pupil.projections[0])]).train()
    torch.testing.assert_close(distill.feature_loss(again(x)[1]["features"][0], teacher.net[:4](x)), wanted)


def test_attention_of_a_cnn_is_where_its_squares_are_of_any_size():
    a, b = torch.rand(3, 5, 8, 8), torch.rand(3, 7, 8, 8)
    maps = [each.square().mean(1).flatten(1) for each in (a, b)]
    wanted = sum(((p / p.norm() - q / q.norm()) ** 2).sum() for p, q in zip(*maps, strict=True)) / 3
    shown = [each.square().mean(1, keepdim=True) for each in (a, b)]
    torch.testing.assert_close(distill.attention_loss(*shown), wanted)
    torch.testing.assert_close(distill.attention_loss(shown[0] * 7, shown[1]), wanted)
    assert distill.attention_loss(shown[0], F.avg_pool2d(shown[0], 2)) < 1e-6


def test_the_map_of_a_transformer_is_what_its_attention_multiplies_by():
    """With values that are the identity and no output projection, the sum over heads of what attention gives is the map."""
    model = transformer(dim=16, heads=2)
    attention, x = model.net.layers[0].attention, torch.randn(2, 8, 16)
    found = attention_map(attention, x)
    heads = [attention._split(layer(x)) for layer in (attention.q, attention.k)]
    eye = torch.eye(8).expand(2, 2, 8, 8)
    wanted = F.scaled_dot_product_attention(*heads, eye).mean(1)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 8))


def test_maps_of_other_numbers_of_heads_and_widths_can_be_compared():
    student, teacher = transformer(1, dim=8, depth=2, heads=1), transformer(dim=16, depth=4, heads=4)
    pupil, loss = taught(student, teacher, spec.Distill(attention=spec.AttentionMaps()))
    x, y = rows()
    loss(pupil(x), x, y).backward()
    assert all(layer.attention.q.weight.grad.abs().sum() > 0 for layer in student.net.layers)


def test_maps_of_torchs_own_attention_are_read_too():
    student, teacher = (models.Classifier(Foreign(), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)) for _ in range(2))
    pupil, loss = taught(student, teacher, spec.Distill(attention=spec.AttentionMaps()))
    x, y = rows()
    out = pupil(x)
    (found,) = out[1]["attention"]
    assert found.shape == (6, 8, 8)
    torch.testing.assert_close(found.sum(-1), torch.ones(6, 8))
    assert torch.isfinite(loss(out, x, y))


class Foreign(nn.Module):
    """A user's: a row of the picture is a token."""

    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Linear(8, width)
        self.look, self.head = nn.MultiheadAttention(width, 2, batch_first=True), nn.Linear(width, 10)

    def forward(self, x):
        y = self.body(x.flatten(1, 2))
        return self.head((y + self.look(y, y, y, need_weights=False)[0]).mean(1))


def test_relations_are_distances_over_their_mean_and_cosines_at_the_second_of_three():
    a, b = torch.rand(5, 3), torch.rand(5, 4)

    def distances(rows):
        found = torch.stack([(rows[i] - rows[j]).norm() for i in range(5) for j in range(5) if i != j])
        return found / found.mean()

    def angle(rows, i, j, k):
        return F.cosine_similarity(rows[i] - rows[j], rows[k] - rows[j], dim=0)

    def angles(rows):
        return torch.stack([angle(rows, i, j, k) for j in range(5) for i in range(5) for k in range(5)])

    wanted = 0.5 * F.smooth_l1_loss(distances(a), distances(b)) + 3 * F.smooth_l1_loss(angles(a), angles(b))
    torch.testing.assert_close(distill.relation_loss(a, b, distance=0.5, angle=3.0), wanted, rtol=1e-4, atol=1e-6)
    assert distill.relation_loss(a * 4 + 1, a) < 1e-9  # neither scale nor place matters
    rotation = torch.linalg.qr(torch.randn(3, 3))[0]
    assert distill.relation_loss(a @ rotation, a) < 1e-6


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_rows_and_rows_that_are_equal_have_finite_relations_and_gradients(count):
    own, other = torch.ones(count, 4, requires_grad=True), torch.ones(count, 6)
    value = distill.relation_loss(own, other)
    value.backward()
    assert value.item() == 0 and bool(torch.isfinite(own.grad).all())


def test_what_texts_are_padded_with_counts_for_nothing():
    student, teacher = texts(1, dim=8, depth=1), texts()
    ids = torch.randint(1, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    ids[0, 5:] = 0
    padded = torch.cat([ids, torch.zeros(4, 4, dtype=torch.int64)], 1)
    for kind, options in HIDDEN.items():
        pupil, loss = taught(student, teacher, spec.Distill(**{kind: options}), ids)
        values = [loss(pupil(x), x, torch.arange(4)).item() for x in (ids, padded)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), kind


def test_a_mean_over_rows_is_the_same_however_micro_batches_are_cut():
    options = spec.Distill(features=spec.Features(), attention=spec.AttentionMaps())
    student, teacher = transformer(1, dim=8, depth=2), transformer()
    pupil, loss = taught(student, teacher, options)
    x, y = rows(9)
    whole = loss(pupil(x), x, y)
    parts = sum(len(part) / 9 * loss(pupil(x[part]), x[part], y[part]) for part in torch.arange(9).split([2, 3, 4]))
    torch.testing.assert_close(whole, parts)


def test_the_projections_learn_and_are_there_only_where_widths_differ():
    student, teacher = build(1, channels=(8, 32)), build()
    pupil, loss = taught(student, teacher, spec.Distill(features=spec.Features()))
    assert [type(each) for each in pupil.projections] == [nn.Conv2d, nn.Identity]
    x, y = rows()
    loss(pupil(x), x, y).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pupil.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(pupil.eval()(x), student.eval()(x))


# --- weights over the steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule,middle", [("linear", 0.6), ("cosine", 0.6)])
def test_a_weight_is_exactly_its_start_in_the_first_step_and_its_end_in_the_last(schedule, middle):
    loss = distillation(build(), spec.Distill(alpha=Ramp(start=0.9, end=0.3, schedule=schedule), features=spec.Features(weight=Ramp(start=0, end=0.7, schedule=schedule))))
    seen = []
    for step in range(101):
        loss.begin(step, 101)
        seen.append((loss.alpha, loss.weights["features"]))
    assert seen[0] == (0.9, 0) and seen[-1] == (0.3, 0.7)
    assert seen[50] == (pytest.approx(middle), pytest.approx(0.35))
    assert seen[25][0] == pytest.approx({"linear": 0.75, "cosine": 0.3 + 0.6 * (1 + math.cos(math.pi / 4)) / 2}[schedule])
    assert all(a >= b for (a, _), (b, _) in itertools.pairwise(seen))
    loss.begin(0, 1)
    assert loss.alpha == 0.9


# --- which layers -------------------------------------------------------------------------------------------------


def test_stages_and_layers_are_taken_by_default_and_evenly_where_depths_differ():
    options = spec.Distill(**HIDDEN)
    found = paired(build(), build(blocks=(2, 3)), options)
    assert found["features"] == found["attention"] == [("net.3", "net.4"), ("net.4", "net.7")] and found["relations"] == [("net.4", "net.7")]
    found = paired(transformer(depth=2), transformer(depth=6), options)
    assert found["features"] == [("net.layers.0", "net.layers.2"), ("net.layers.1", "net.layers.5")]
    assert found["attention"] == [("net.layers.0.attention", "net.layers.2.attention"), ("net.layers.1.attention", "net.layers.5.attention")]
    assert [other for _, other in evenly("abc", "0123")] == ["1", "2", "3"] and [other for _, other in evenly("abcd", "01")] == [*"0011"]


@pytest.mark.parametrize("layers,message", [
    (("net.9",), r"compress\.distill\.features\.layers: no module of the student is called 'net\.9'; there are net\.\d"),
    ({"net.3": "net.stage2"}, r"no module of the teacher is called 'net\.stage2'; there are net"),
    (("",), "no module of the student is called ''"),
])  # fmt: skip
def test_a_layer_that_is_not_there_is_refused_with_the_nearest_names(layers, message):
    with pytest.raises(UserError, match=message):
        paired(build(), build(1), spec.Distill(features=spec.Features(layers=layers)))


class Idle(nn.Module):
    """A user's, with a module that never runs."""

    def __init__(self, width=32):
        super().__init__()
        self.body, self.idle, self.head = nn.Linear(64, width), nn.Linear(3, 3), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).relu())


def users(net):
    return models.Classifier(net, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def test_a_users_model_must_name_its_layers():
    student, teacher = users(Idle(16)), users(Idle())
    with pytest.raises(UserError, match=r"compress\.distill\.features\.layers: the student has no stages to take by default; name modules, for example net\.body, net\.idle, net\.head"):
        paired(student, teacher, spec.Distill(features=spec.Features()))
    pupil, loss = taught(student, teacher, spec.Distill(features=spec.Features(layers=("net.body",)), relations=spec.Relations(layers=("net.body",))))
    x, y = rows()
    loss(pupil(x), x, y).backward()
    assert isinstance(pupil.projections[0], nn.Linear) and pupil.projections[0].weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match=r"'net\.idle' does not run when the model does; name a module that its forward calls"):
        taught(student, teacher, spec.Distill(features=spec.Features(layers=("net.idle",))))
    with pytest.raises(UserError, match=r"compress\.distill\.attention\.layers: 'net\.body' \(Linear\) gives \[2, 16\] and is no attention"):
        taught(student, teacher, spec.Distill(attention=spec.AttentionMaps(layers=("net.body",))))


def test_layers_without_positions_in_common_are_refused():
    with pytest.raises(UserError, match=r"'net\.layers\.0' of the student shows \[2, 4, 16\] and 'net\.layers\.0' of the teacher \[2, 16, 16\], which have no positions in common"):
        taught(transformer(patch=4), transformer(), spec.Distill(features=spec.Features()))


@pytest.mark.parametrize("options,message", [
    ({"alpha": 1.5}, r"compress\.0\.distill\.alpha: 1\.5: it is a share of the loss, 0 to 1"),
    ({"alpha": {"start": 0.5, "end": 2}}, r"compress\.0\.distill\.alpha: it is a share of the loss"),
    ({"features": {"weight": {"start": 1, "ende": 0}}}, r"compress\.0\.distill\.features\.weight\.ende: unknown key; did you mean 'end'"),
    ({"teacher": "digits"}, r"compress\.0\.distill\.teacher: 'digits': write NAME@VERSION"),
    ({"teacher": "digits@1", "attention": {}}, r"compress\.0\.distill\.attention: a teacher from the registry is an ONNX file"),
    ({"student": {"name": "convnet", "channels": [8], "blocks": [1, 1]}}, r"compress\.0\.distill\.student\.blocks: 2 values for 1 stages"),
])  # fmt: skip
def test_a_distillation_that_makes_no_sense_is_refused_by_the_spec(options, message):
    with pytest.raises(UserError, match=message):
        spec.parse({"name": "a", "compress": [{"distill": options}]})


def test_a_student_by_spec_stands_first():
    with pytest.raises(UserError, match=r"compress\.1\.distill\.student: it is another model, so what the steps before it made would be lost; put this step first"):
        spec.parse({"name": "a", "compress": [{"prune": {}}, {"distill": {"student": {"name": "convnet"}}}]})


def test_what_is_not_asked_for_is_no_part_of_a_distillations_key():
    stage = launch.plan(spec.parse({"name": "a", "compress": [{"distill": {"epochs": 3}}]}))[1]
    assert stage.options == {"epochs": 3, "learning_rate": 0.05, "temperature": 4.0, "alpha": 0.7} and stage.parents == {"student": "train", "teacher": "train"}
    _, teacher, taught = launch.plan(spec.parse({"name": "a", "compress": [{"distill": {"epochs": 3, "teacher": "b@1"}}]}))[:3]
    assert teacher.options == {"teacher": "b@1"} and taught.options == stage.options and taught.parents == {"student": "train", "teacher": "teacher-1"}


# --- a student by spec --------------------------------------------------------------------------------------------


def test_a_shallower_student_begins_with_every_kth_block_of_the_teacher():
    teacher, student = build(blocks=(4, 2)), build(1, blocks=(2, 1))
    assert inherit(student, teacher) == (len([*student.parameters()]), len([*student.parameters()]))
    pairs = {"net.0": "net.0", "net.1": "net.1", "net.3": "net.3", "net.4": "net.5", "net.5": "net.7", "net.8": "net.11"}
    for own, other in pairs.items():
        assert same(student.get_submodule(own), teacher.get_submodule(other)), own
    deep, shallow = transformer(depth=6), transformer(1, depth=3)
    inherit(shallow, deep)
    assert all(same(shallow.net.layers[number], deep.net.layers[2 * number]) for number in range(3)) and same(shallow.net.head, deep.net.head)
    assert torch.equal(shallow.net.position, deep.net.position)


def test_of_a_narrower_student_only_what_has_the_same_shape_is_taken():
    teacher, student = build(channels=(16, 32)), build(1, channels=(16, 24))
    before = copy.deepcopy(student.state_dict())
    taken, of = inherit(student, teacher)
    assert 0 < taken < of
    assert same(student.net[3], teacher.net[3]) and torch.equal(student.net[4].conv1.weight, before["net.4.conv1.weight"])
    assert torch.equal(student.net[-1].bias, teacher.net[-1].bias) and torch.equal(student.net[-1].weight, before["net.7.weight"])


def test_models_that_are_not_built_alike_share_what_has_the_same_name():
    student, teacher = users(Idle(16)), users(Idle())
    assert inherit(student, teacher) == (3, 6)  # idle, and the head's bias
    assert inherit(build(), users(Idle()))[0] == 0


# --- runs ---------------------------------------------------------------------------------------------------------


def short(folder, *steps, **changes):
    tree = {
        "name": "d", "model": {"name": "convnet", "channels": [8, 16], "blocks": [2, 1]}, "compress": [*steps], "gate": {"max_accuracy_drop": 0.3},
        "train": {"epochs": 1, "batch_size": 64, "checkpoint_every_steps": 3, **changes}, "storage": {"path": str(folder / "runs"), "cache": str(folder / "cache")},
    }  # fmt: skip
    return spec.parse(tree)


FULL = {
    "epochs": 1, "alpha": {"start": 0.9, "end": 0.1, "schedule": "cosine"}, "features": {"weight": {"start": 1.0, "end": 0.0}},
    "attention": {}, "relations": {"weight": {"start": 0.0, "end": 2.0}},
}  # fmt: skip
STUDENT = {"name": "convnet", "channels": [8, 8], "blocks": [1, 1]}


def weights(made):
    return models.load_weights(made.file("model.safetensors"))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_distillation_that_was_stopped_goes_on_to_the_same_bits(digits, tmp_path, monkeypatch):
    steps, begin = [], distill.Distillation.begin
    monkeypatch.setattr(distill.Distillation, "begin", lambda loss, step, total: (steps.append((step, total)), begin(loss, step, total)))
    options = short(tmp_path, {"distill": {**FULL, "student": STUDENT}})
    dense = launch.produce(options, "train", quiet, digits)
    job = {"spec": spec.dump(options), "kind": "distill", "options": launch.plan(options)[1].options, "parents": {"teacher": str(dense.path)}, "about": {}, "log": str(tmp_path / "l.jsonl")}

    def carried(name, key="k", report=lambda metrics, checkpoint: None):
        carry_out(Fit(**job, key=key, work=str(tmp_path / name)), Place(), report)
        return models.load_weights(tmp_path / name / "model.safetensors")

    whole = carried("whole")
    assert steps == [(0, 1), *((step, 13) for step in range(13))]
    for step in (4, 8):
        with pytest.raises(Killed):
            carried("cut", report=killed_at(step))
    steps.clear()
    assert equal(whole, carried("cut"))
    assert steps == [(0, 1), *((step, 13) for step in range(9, 13))]
    assert not any("projections" in name for name in whole)
    saved = artifact.read(tmp_path / "cut/checkpoint-a")
    kept = models.load_weights(saved.file("state.safetensors"))
    assert {"model/projections.1.weight", "model/projections.1.bias"} <= kept.keys()


def test_of_a_student_by_spec_every_later_step_knows_what_it_is(digits, tmp_path):
    options = short(tmp_path, {"distill": {**FULL, "student": {**STUDENT, "channels": [8, 12]}}}, {"prune": {"mac_cut": 0.2, "round_to": 2}}, {"distill": {"epochs": 1, "features": {}}})
    made = {name: launch.produce(options, name, quiet, digits) for name in ("distill-1", "prune-2", "distill-3", "export-small")}
    for name in ("distill-1", "prune-2", "distill-3"):
        assert json.loads(made[name].file("model.json").read_text())["blocks"] == [1, 1]
    scores = [made[name].scores["parameters"] for name in made]
    assert scores[0] > scores[1] == scores[2] == scores[3]
    assert any(note.startswith("compress.distill.student: 10 of its 20 weight tensors begin as the teacher's") for note in made["distill-1"].notes), made["distill-1"].notes
    assert "compress.distill.features: net.3 as net.4, net.4 as net.5" in made["distill-3"].notes
    assert not (launch.produce(options, "train", quiet, digits).path / "model.json").exists()


def test_distilling_a_pruned_model_without_layers_is_what_it_was(digits, tmp_path):
    """The plain path keeps the student as it is, unwrapped: a loss of logits changes no name and no bit."""
    options = short(tmp_path, {"distill": {"epochs": 1}})
    made = launch.produce(options, "distill-1", quiet, digits)
    parent = launch.produce(options, "train", quiet, digits)
    student, teacher = (restore(options, digits, parent.path) for _ in range(2))
    train = options.train.model_copy(update={"epochs": 1, "learning_rate": 0.05})

    def loss(logits, x, y):
        with torch.inference_mode():
            soft = F.log_softmax(teacher(x).float() / 4, 1)
        kl = F.kl_div(F.log_softmax(logits.float() / 4, 1), soft.clone(), reduction="batchmean", log_target=True)
        return 0.7 * 4.0 * 4.0 * kl + (1 - 0.7) * F.cross_entropy(logits, y)

    by_hand = fit(student, digits.train, train, folder=tmp_path / "by hand", key="k", loss=loss)
    assert equal(weights(made), by_hand.state_dict())


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"micro_batch": 17}, {"ema_decay": 0.9}, {"speed": ["fused", "channels_last"]}, {"speed": "auto"}, {"fp32_modules": ["net.3"], "precision": "bf16"}], ids=str)
def test_layers_are_compared_under_other_ways_to_train(digits, tmp_path, changes):
    options = short(tmp_path, {"distill": FULL}, **changes)
    made = launch.produce(options, "distill-1", quiet, digits)
    assert 0 < made.scores["validation_accuracy"] <= 1
    told = [note for note in made.notes if "between the rows of one worker's micro-batch" in note]
    assert len(told) == ("micro_batch" in changes)


def test_texts_of_a_token_budget_are_distilled_by_layers(tmp_path):
    words = {"good": ["fine", "great", "lovely"], "bad": ["poor", "awful", "dire"]}
    lines = [f"{label}\t{' '.join(words[label][(n + k) % 3] for k in range(1 + n % 7))} number {n}" for n in range(120) for label in words]
    (tmp_path / "t.tsv").write_text("label\ttext\n" + "\n".join(lines) + "\n")
    options = spec.parse({
        "name": "t", "data": {"source": "text", "kind": "file", "path": str(tmp_path / "t.tsv"), "max_tokens": 16, "vocabulary": 300, "validation_rows": 40, "calibration_rows": 20, "test_rows": 40},
        "model": {"name": "text_transformer", "dim": 16, "depth": 2, "heads": 2}, "train": {"epochs": 1, "tokens_per_batch": 128, "optimizer": "adamw", "learning_rate": 0.002},
        "compress": [{"distill": {**FULL, "learning_rate": 0.002, "student": {"name": "text_transformer", "dim": 8, "depth": 1, "heads": 1}}}],
        "gate": {"max_accuracy_drop": 0.3}, "storage": {"path": str(tmp_path / "runs"), "cache": str(tmp_path / "cache")},
    })  # fmt: skip
    splits = data.load(options.data)
    launch.preflight(options, splits, 0)
    made = launch.produce(options, "distill-1", quiet, splits)
    assert "compress.distill.attention: net.layers.0.attention as net.layers.1.attention" in made.notes
    assert launch.produce(options, "export-small", quiet, splits).scores["parameters"] == made.scores["parameters"]


def pupil_and_loss():
    student, teacher = transformer(1, dim=8, depth=2), transformer()
    return taught(student, teacher, spec.Distill.model_validate(FULL))


def test_a_compiled_pupil_shows_the_same_layers():
    pupil, loss = pupil_and_loss()
    x, y = rows()
    compiled = torch.compile(copy.deepcopy(pupil), dynamic=False, backend="eager")
    for _ in range(2):
        losses = [loss(model(x), x, y) for model in (pupil, compiled)]
        torch.testing.assert_close(*losses)
    for value in losses:
        value.backward()
    for a, b in zip(pupil.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_copy_of_a_pupil_shows_its_own_layers():
    pupil, loss = pupil_and_loss()
    x, y = rows()
    loss(pupil(x), x, y).backward()
    copied = copy.deepcopy(pupil)
    with torch.no_grad():
        copied.student.net.patches.weight.zero_()
    before = [tensor.clone() for tensor in pupil(x)[1]["features"]]
    assert not torch.equal(copied(x)[1]["features"][0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(pupil(x)[1]["features"], before, strict=True))


def of_a_rank(rank, world, folder):
    digits = data.load(spec.Digits())
    student, teacher = transformer(1, dim=8, depth=2), transformer()
    options = spec.Distill.model_validate({**FULL, "relations": None})
    pairs = paired(student, teacher, options)
    torch.manual_seed(0)
    made = projections(student, teacher, pairs, models.example(student, SHAPE, 2))
    loss = distillation(teacher, options, pairs)
    names = {kind: [own for own, _ in found] for kind, found in pairs.items()}
    train = spec.Train(epochs=1, batch_size=256, learning_rate=0.02)
    prepare = functools.partial(distributed.ddp, options=train.ddp) if world > 1 else lambda model: model
    place = Place(rank, world, prepare=prepare)
    model = fit(student, digits.train, train, folder=folder / f"{world}", key="k", loss=loss, begin=loss.begin, prepare=lambda model: Pupil(model, names, made), place=place)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_two_ranks_learn_what_one_does_projections_included(tmp_path):
    alone = of_a_rank(0, 1, tmp_path)
    both = group(2, tmp_path / "store", functools.partial(of_a_rank, folder=tmp_path))
    for name in alone:
        assert np.array_equal(both[0][name], both[1][name])
        np.testing.assert_allclose(both[0][name], alone[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert any("projections" in name for name in alone)


def test_a_captured_step_is_not_had_with_hooks_on_layers():
    from portaisys.speed import _why_not

    pupil, _ = pupil_and_loss()
    assert "layers carry forward hooks" in _why_not("cuda_graphs", pupil, spec.Train(), Place(device="cuda"))
    assert not _why_not("cuda_graphs", pupil.student.net.head, spec.Train(), Place(device="cuda"))


# --- teachers from elsewhere --------------------------------------------------------------------------------------


def wise(scale=1.0, classes=10):
    """A user's trained model: it knows a digit by its pixels alone, and takes them as they are."""
    digits = data.load(spec.Digits())
    means = np.stack([digits.train.x[digits.train.y == label].mean(0).ravel() for label in range(10)])[:classes]
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    with torch.no_grad():
        net[1].weight.copy_(torch.from_numpy(means) * scale / 8)
        net[1].bias.copy_(-torch.from_numpy((means**2).sum(1)) * scale / 16)
    return net


FACTORY = {"factory": f"{__name__}:wise"}


def test_a_factorys_teacher_teaches_and_another_one_teaches_again(digits, tmp_path):
    options = short(tmp_path, {"distill": {"epochs": 1, "teacher": FACTORY}})
    made = {name: launch.produce(options, name, quiet, digits) for name in ("teacher-1", "distill-1")}
    assert made["teacher-1"].scores["validation_accuracy"] > 0.85
    assert made["distill-1"].parents == {"student": launch.produce(options, "train", quiet, digits).digest, "teacher": made["teacher-1"].digest}
    before = weights(made["distill-1"])
    assert launch.produce(options, "distill-1", quiet, digits).digest == made["distill-1"].digest
    other = short(tmp_path, {"distill": {"epochs": 1, "teacher": {**FACTORY, "options": {"scale": 2.0}}}})
    again = launch.produce(other, "distill-1", quiet, digits)
    assert again.key != made["distill-1"].key and not equal(weights(again), before)


def test_a_factorys_layers_can_be_compared_when_they_are_named(digits, tmp_path):
    options = short(tmp_path, {"distill": {"epochs": 1, "teacher": FACTORY, "relations": {"layers": {"net.5": "net.1"}}}})
    assert "compress.distill.relations: net.5 as net.1" in launch.produce(options, "distill-1", quiet, digits).notes


@pytest.mark.parametrize("recipe,message", [
    ({"teacher": {**FACTORY, "options": {"classes": 7}}}, r"compress\.distill\.teacher: for 2 rows it gives \(2, 7\), the data has 10 classes"),
    ({"teacher": {"factory": f"{__name__}:nobody"}}, r"compress\.distill\.teacher: .*nobody"),
    ({"teacher": "nobody@production"}, r"compress\.distill\.teacher: "),
    ({"student": {"name": "transformer", "patch": 3}}, r"compress\.distill\.student: model\.patch: 3 does not tile"),
    ({"features": {"layers": ["net.99"]}}, r"compress\.distill\.features\.layers: no module of the student is called 'net\.99'"),
    ({"student": {"name": "transformer", "patch": 2, "depth": 1, "dim": 8, "heads": 1}, "features": {}}, "which have no positions in common"),
])  # fmt: skip
def test_what_cannot_be_taught_is_refused_before_any_work(digits, tmp_path, recipe, message):
    with pytest.raises(UserError, match=message):
        launch.preflight(short(tmp_path, {"distill": recipe}), digits, 0)


def test_fp32_islands_that_the_student_has_not_are_refused_before_any_work(digits, tmp_path):
    options = short(tmp_path, {"distill": {"student": STUDENT}}, fp32_modules=["net.5"])
    launch.preflight(options, digits, 0)
    shallow = short(tmp_path, {"distill": {"student": {"name": "convnet", "channels": [8], "blocks": [1]}}}, fp32_modules=["net.7"])
    with pytest.raises(UserError, match=r"compress\.distill\.student: train\.fp32_modules: no module of the model is called 'net\.7'"):
        launch.preflight(shallow, digits, 0)


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A folder whose registry has d@1."""
    folder = tmp_path_factory.mktemp("registry")
    return folder, launch.run(short(folder), quiet)


def test_a_version_of_the_registry_teaches_by_its_engine(registered, digits):
    folder, outcome = registered
    step = {"distill": {"epochs": 1, "teacher": "d@production"}}
    options = short(folder, step).model_copy(update={"name": "taught"})
    launch.preflight(options, digits, 0)
    made = {name: launch.produce(options, name, quiet, digits) for name in ("teacher-1", "distill-1")}
    assert {path.name for path in made["teacher-1"].path.iterdir()} == {"fp32.onnx", "manifest.json"} and "d@production is d@1" in made["teacher-1"].notes
    assert made["teacher-1"].scores["validation_accuracy"] == pytest.approx(outcome.artifacts["train"].scores["validation_accuracy"], abs=0.01)
    # The same model as a module teaches the same: what the run's own dense model, of the same weights, would have taught.
    own = launch.produce(short(folder, {"distill": {"epochs": 1}}), "distill-1", quiet, digits)
    for name, tensor in weights(own).items():
        torch.testing.assert_close(weights(made["distill-1"])[name], tensor, rtol=1e-2, atol=1e-3)


def test_a_version_of_other_classes_is_refused_before_any_work(registered, digits):
    folder, _ = registered
    other = data.Splits(**{**{name: getattr(digits, name) for name in data.Splits.__dataclass_fields__}, "labels": tuple("9876543210")})
    with pytest.raises(UserError, match=r"compress\.distill\.teacher: teacher and student of different classes: d@1 has 0, 1, 2, 3, 4 and 5 more and the data 9, 8, 7, 6, 5 and 5 more"):
        launch.preflight(short(folder, {"distill": {"teacher": "d@1"}}), other, 0)
    with pytest.raises(UserError, match=r"compress\.distill\.teacher: d: has no version 7; it has 1"):
        launch.preflight(short(folder, {"distill": {"teacher": "d@7"}}), digits, 0)


def test_another_version_is_another_key(registered, monkeypatch):
    folder, _ = registered
    options = short(folder, {"distill": {"teacher": "d@production"}})
    stage = next(stage for stage in launch.plan(options) if stage.kind == "teacher")
    before = launch._sections(options, stage)
    found = teachers.fetch("d@1", options.storage, options.storage.cache_dir)
    moved = type(found)(type(found.version)(**{**found.version.__dict__, "digest": "0" * 64}), found.path, True, "")
    monkeypatch.setattr(teachers, "fetch", lambda *asked: moved)
    assert launch._sections(options, stage) != before
