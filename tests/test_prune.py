"""Structured pruning: what leaves, how important it is, when it stops, and that weights alone give the pruned model back."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import minilm
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from portaisys import models, spec, stages
from portaisys.artifact import Draft
from portaisys.compress.prune import Evidence, latency_cut, losses_on, prune, prune_module, sensitivity
from portaisys.distributed import Place
from portaisys.export import export
from portaisys.fits import Fit, carry_out
from portaisys.spec import SpecError, UserError
from portaisys.weights import WEIGHTS, fresh, restore

SHAPE, LONGEST = (1, 8, 8), (24,)
EVERYTHING = ("channels", "neurons", "heads", "blocks")
CONVNET = spec.ConvNet(channels=(16, 32), blocks=(3, 2))
ENCODER = spec.Transformer(name="transformer", patch=2, dim=32, depth=4, heads=4)
TEXT = spec.TextTransformer(name="text_transformer", dim=32, depth=3, heads=4)


def build(options, seed=0):
    torch.manual_seed(seed)
    if isinstance(options, spec.TextTransformer):
        return models.build(options, LONGEST, 10, vocabulary=50).eval()
    return models.build(options, SHAPE, 10).eval()


def shape_of(options):
    return LONGEST if isinstance(options, spec.TextTransformer) else SHAPE


def rows_for(options):
    torch.manual_seed(1)
    return torch.randint(1, 50, (3, 9)) if isinstance(options, spec.TextTransformer) else torch.rand(3, *SHAPE)


def again(pruned, fresh, folder):
    """`fresh` with the weights of `pruned`, out of a file."""
    models.save(pruned, folder / "model.safetensors")
    models.rebuild(fresh, models.load_weights(folder / "model.safetensors"))
    return fresh.eval()


def same_answers(a, b, *inputs):
    with torch.no_grad():
        return torch.equal(a.eval()(*inputs), b.eval()(*inputs))


class Wrapped(nn.Module):
    """A user's layer between two that can be pruned, and a head."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.middle, self.last, self.head = nn.Linear(8, 32), LAYERS[kind](), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x):
        y = self.middle(torch.relu(self.first(x.squeeze(1))))  # [B, 8, 32]
        return self.head(torch.relu(self.last(y[0] if isinstance(y, tuple) else y)).mean(1))


class Ties(nn.Module):
    """A grouped convolution that reads two tensors side by side: what leaves of one leaves its groups uneven."""

    def __init__(self):
        super().__init__()
        self.even, self.uneven = nn.Conv1d(32, 32, 1, groups=2), nn.Conv1d(64, 32, 1, groups=4)

    def forward(self, x):
        y = x.transpose(1, 2)
        return self.uneven(torch.cat([y, self.even(y)], 1)).transpose(1, 2)


class Packed(nn.Module):
    """Attention of a user's own, which pruning cannot know: one layer gives q, k and v, and the number of heads is fixed."""

    def __init__(self):
        super().__init__()
        self.packed, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.packed(x).reshape(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Derived(nn.Module):
    """Attention whose heads are as wide as the layers allow, so that it would run on with channels in the wrong head."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x).reshape(*x.shape[:2], 4, -1).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return (torch.softmax(q @ k.transpose(2, 3), 3) @ v).transpose(1, 2).flatten(2)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Reshape(nn.Module):
    """Takes its channels for a table of a fixed size."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(16, 32)

    def forward(self, x):
        return self.narrow(self.wide(x).reshape(*x.shape[:2], 4, 16).sum(2))


class Buffer(nn.Module):
    """Multiplies with a tensor that is no parameter, so that nothing says it would have to be cut too."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("scale", torch.ones(64))

    def forward(self, x):
        return self.narrow(self.wide(x) * self.scale)


UNKNOWN = "its channels are those of an attention whose heads are not known"
LAYERS = {"reshape": Reshape, "buffer": Buffer, "lstm": lambda: nn.LSTM(32, 32, batch_first=True), "ties": Ties, "packed": Packed, "derived": Derived, "torch": Own}
FACTORY = spec.ModelFactory(name="factory", factory=f"{__name__}:Wrapped", options={"kind": "packed"})


# --- rebuilt from weights alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [CONVNET, ENCODER, TEXT, FACTORY], ids=lambda options: options.name)
@pytest.mark.parametrize("what", [EVERYTHING, ("heads",), ("blocks",), ("channels", "neurons")], ids=" ".join)
def test_what_is_pruned_is_given_back_by_its_weights_alone(options, what, tmp_path):
    pruned, target = build(options), 0.04 if what == ("heads",) else 0.2
    prunable = {("heads",): (ENCODER, TEXT), ("blocks",): (CONVNET, ENCODER, TEXT)}.get(what, (options,))
    if options not in prunable:
        with pytest.raises(UserError, match=r"reaches at most mac_cut 0\.000"):
            prune(pruned, shape_of(options), spec.Prune(what=what, mac_cut=target, round_to=4), 10)
        return
    figures = prune(pruned, shape_of(options), spec.Prune(what=what, mac_cut=target, round_to=4), 10)
    assert figures["mac_cut"] >= target and figures["removed"].keys() == {*what}
    assert sum(figures["removed"].values()) > 0
    rebuilt = again(pruned, build(options, seed=5), tmp_path)
    assert same_answers(pruned, rebuilt, rows_for(options))
    assert models.count(rebuilt, shape_of(options)) == {name: figures[name] for name in ("parameters", "macs")}
    # And once more, as after a distillation of it.
    assert same_answers(pruned, again(rebuilt, build(options, seed=6), tmp_path), rows_for(options))


def test_heads_leave_whole_and_their_number_follows_from_the_weights(tmp_path):
    pruned = build(ENCODER)
    prune(pruned, SHAPE, spec.Prune(what=("heads",), mac_cut=0.1), 10)
    for layer in again(pruned, build(ENCODER), tmp_path).net.layers:
        attention = layer.attention
        assert attention.head_dim == 8 and 1 <= attention.heads < 4
        assert attention.q.out_features == attention.k.out_features == attention.v.out_features == attention.out.in_features == 8 * attention.heads


def test_a_pruned_student_is_restored_after_its_distillation(tmp_path, digits):
    options = spec.parse({
        "name": "p", "model": {"name": "transformer", "patch": 2, "dim": 32, "depth": 4, "heads": 4}, "train": {"epochs": 1, "batch_size": 256, "learning_rate": 0.01, "ema_decay": 0.9},
    })  # fmt: skip
    dense, small, done = (tmp_path / name for name in ("dense", "small", "done"))
    for folder in (dense, small, done):
        folder.mkdir()
    models.save(fresh(options, digits), dense / WEIGHTS)
    step = {"what": EVERYTHING, "mac_cut": 0.4, "round_to": 4, "importance": "taylor", "scope": "global"}
    job = stages.Job(options, step, {"student": SimpleNamespace(path=dense, files={})}, replace(digits, test=None), lambda: dense, lambda names: 0, lambda text: None)
    draft = Draft(small)
    stages.pruned(job, draft)
    assert draft.scores["mac_cut"] >= 0.4 and draft.scores["removed"]["blocks"] == 1
    fit = Fit(spec.dump(options), "distill", spec.Distill(epochs=1, learning_rate=0.01).model_dump(), {"student": str(small), "teacher": str(dense)}, "k", {}, str(done), str(tmp_path / "log.jsonl"))
    carry_out(fit, Place(), lambda metrics, checkpoint: None)
    trained = restore(options, digits, done)
    assert models.count(trained, SHAPE)["macs"] == draft.scores["macs"]
    before, after = models.load_weights(small / WEIGHTS), models.load_weights(done / WEIGHTS)
    assert before.keys() == after.keys() and not torch.equal(before["net.head.weight"], after["net.head.weight"])


def test_a_model_without_some_of_its_blocks_is_exported(tmp_path):
    pruned = build(ENCODER)
    prune(pruned, SHAPE, spec.Prune(what=("heads", "blocks"), mac_cut=0.3), 10)
    assert any(isinstance(layer, models.Skip) for layer in pruned.net.layers)
    export(pruned, torch.rand(64, *SHAPE).numpy(), spec.Export(opt_batch=2, max_batch=4), tmp_path / "model.onnx")


def test_weights_without_a_block_are_refused_unless_they_say_that_it_left():
    tensors = {name: tensor for name, tensor in build(ENCODER).state_dict().items() if not name.startswith("net.layers.1.")}
    with pytest.raises(UserError, match="another model"):
        models.rebuild(build(ENCODER), tensors)
    models.rebuild(model := build(ENCODER), tensors | {"net.layers.1.skipped": torch.zeros(0)})
    assert isinstance(model.net.layers[1], models.Skip)


# --- MiniLM -------------------------------------------------------------------------------------------------------


def test_minilm_loses_heads_neurons_and_blocks_and_is_given_back_by_its_weights(tmp_path):
    net = minilm.model()
    feeds = [torch.from_numpy(minilm.rows(4, 16, 0)[name]) for name in minilm.INPUTS]
    with torch.no_grad():
        wanted = net(*feeds)
    evidence = Evidence(held_out=lambda model: [1 - (model(*feeds) * wanted).sum(1).mean()])
    figures = prune_module(net, feeds, spec.Prune(what=("heads", "neurons", "blocks"), mac_cut=0.4, steps=4), evidence)
    assert all(figures["removed"][kind] > 0 for kind in ("heads", "neurons", "blocks")) and figures["mac_cut"] >= 0.4
    assert figures["skipped"] == []
    fresh = minilm.MiniLM(minilm.json.loads((minilm.MODEL_DIR / "config.json").read_text()))
    assert same_answers(net, again(net, fresh, tmp_path), *feeds)
    with torch.no_grad():
        assert net(*feeds).shape == wanted.shape


# --- what is important --------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """Half of its neurons have large weights that nothing reads."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 16), nn.Linear(16, 10)
        with torch.no_grad():
            self.up.weight[:8] *= 10
            self.down.weight[:, :8] = 0

    def forward(self, x):
        return self.down(torch.relu(self.up(x.flatten(1))))


def perceptron():
    torch.manual_seed(0)
    return models.Classifier(Perceptron(), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


@pytest.mark.parametrize(("importance", "unread_leave"), [("norm", False), ("taylor", True), ("activation", True)])
@pytest.mark.parametrize("steps", [1, 10])
def test_rows_tell_that_a_neuron_is_read_by_nothing_and_norms_do_not(importance, unread_leave, steps, digits):
    model = perceptron()
    x = torch.from_numpy(digits.train.take(np.arange(64))[0])
    before = model.eval()(x)
    prune(model, SHAPE, spec.Prune(importance=importance, mac_cut=0.4, round_to=8, steps=steps), 10, splits=replace(digits, test=None))
    assert model.net.up.out_features == 8
    assert torch.allclose(model.eval()(x), before, atol=1e-5) == unread_leave


@pytest.mark.parametrize("importance", ["norm", "taylor", "activation"])
def test_the_head_that_does_nothing_leaves_first(importance, digits):
    model = build(ENCODER)
    with torch.no_grad():
        for layer in model.net.layers:
            layer.attention.out.weight[:, 16:24] = 0
            layer.attention.v.weight[16:24] = 0
            layer.attention.v.bias[16:24] = 0
    dense, x = copy.deepcopy(model), rows_for(ENCODER)
    # A quarter of the heads: of 4 heads of 8 in each layer one.
    figures = prune(model, SHAPE, spec.Prune(what=("heads",), importance=importance, mac_cut=0.001), 10, splits=digits)
    assert figures["removed"] == {"heads": 4}
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [True, False])
def test_the_block_that_does_nothing_leaves_first(rows):
    model = build(CONVNET)
    with torch.no_grad():
        # Without rows it is the block of the least weights, with rows the one that the loss does not miss.
        block = model.net[5]
        block.norm2.weight.zero_()
        block.norm2.bias.zero_()
        for convolution in (block.conv1, block.conv2):
            convolution.weight.mul_(10 if rows else 0.1)
        dense, x = copy.deepcopy(model), rows_for(CONVNET)
        wanted = dense(x)
    prune_module(model, (x,), spec.Prune(what=("blocks",), mac_cut=0.01), Evidence(held_out=lambda net: [(net(x) - wanted).pow(2).mean()]) if rows else Evidence())
    assert [name for name, module in model.named_modules() if isinstance(module, models.Skip)] == ["net.5"]
    with torch.no_grad():
        assert torch.equal(model(x), dense(x))


def test_what_is_no_residual_block_never_leaves_as_one():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3))
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            y = x.flatten(1)
            for layer in self.layers:
                y = layer(y)
            return self.head(y)

    model = models.Classifier(Plain(), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    with pytest.raises(UserError, match=r"mac_cut 0\.000 with round_to 8 and what \[blocks\]; ask for less"):
        prune(model, SHAPE, spec.Prune(what=("blocks",), mac_cut=0.1), 10)


def test_importance_by_rows_needs_rows():
    with pytest.raises(UserError, match=r"compress\.prune\.importance: taylor is measured on rows and there are none"):
        prune(build(CONVNET), SHAPE, spec.Prune(importance="taylor"), 10)


def test_rows_are_drawn_from_the_seed(digits):
    model = build(CONVNET)
    first, second, other = ([loss.item() for loss in losses_on(digits.train, seed)(model)] for seed in (0, 0, 1))
    assert first == second != other and len(first) == 16


# --- where it leaves ----------------------------------------------------------------------------------------------


def test_of_all_layers_the_least_important_leave_when_the_scope_is_global():
    def widths(scope):
        model = build(ENCODER)
        with torch.no_grad():
            # Layer 0 has a few neurons that matter and many that do not; in the others all matter alike.
            model.net.layers[0].up.weight[8:] *= 0.01
            model.net.layers[0].up.bias[8:] *= 0.01
            model.net.layers[0].down.weight[:, 8:] *= 0.01
        prune(model, SHAPE, spec.Prune(scope=scope, mac_cut=0.1, round_to=8), 10)
        return [layer.up.out_features for layer in model.net.layers]

    assert len({*widths("layer")}) == 1
    first, *others = widths("global")
    assert first < min(others)


def test_ratios_by_stage_also_take_heads():
    model = build(ENCODER)
    prune(model, SHAPE, spec.Prune(what=("neurons", "heads"), ratios=(0.5, 0.0, 0.25, 0.0), round_to=8), 10)
    assert [layer.attention.heads for layer in model.net.layers] == [2, 4, 3, 4]
    assert [layer.up.out_features for layer in model.net.layers] == [64, 128, 96, 128]


@pytest.mark.parametrize("importance", ["norm", "taylor"])
def test_one_shot_takes_the_least_that_meets_the_target(importance, digits):
    model = build(ENCODER)
    figures = prune(model, SHAPE, spec.Prune(importance=importance, steps=1, mac_cut=0.3, round_to=1), 10, splits=digits)
    assert 0.3 <= figures["mac_cut"] < 0.33


def test_the_step_that_meets_the_target_is_the_last():
    few, many = (prune(build(ENCODER), SHAPE, spec.Prune(mac_cut=0.3, round_to=1, steps=steps), 10)["mac_cut"] for steps in (3, 40))
    assert few > many >= 0.3


@pytest.mark.parametrize("keep", ["net.layers.1.up", "net.layers.1", "net.layers.1.down"])
def test_layers_that_are_kept_are_not_touched(keep):
    model = build(ENCODER)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune(model, SHAPE, spec.Prune(what=EVERYTHING, mac_cut=0.3, keep=(keep,)), 10)
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items() if name.startswith(keep))
    if keep != "net.layers.1":  # what gives neurons and what reads them keep each other
        assert model.net.layers[1].up.out_features == 128
    assert min(layer.up.out_features for layer in model.net.layers if not isinstance(layer, models.Skip)) < 128


def test_a_kept_layer_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"compress\.prune\.keep: 'layers\.2\.up' is no layer of this model; the nearest are net\.layers\.2\.up"):
        prune(build(ENCODER), SHAPE, spec.Prune(keep=("layers.2.up",)), 10)


# --- what cannot be pruned ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "skipped"),
    [
        ("lstm", {"net.middle": "a LSTM cannot be pruned", "net.first": "tied to net.middle, a LSTM"}),
        ("ties", {"net.first": "tied to a Conv1d of 4 groups", "net.middle.even": "tied to a Conv1d of 4 groups"}),
        ("packed", {"net.middle.packed": UNKNOWN}),
        ("derived", {"net.middle.value": UNKNOWN}),
        ("reshape", {"net.middle.wide": "tied to a Linear in a way that cannot be followed"}),
        ("buffer", {"net.middle.wide": "without a part of it the model no longer runs"}),
        ("torch", {"net.first": "tied to net.middle.attention, a MultiheadAttention"}),
    ],
)
def test_a_layer_that_cannot_be_pruned_is_left_and_listed(kind, skipped, tmp_path):
    options = FACTORY.model_copy(update={"options": {"kind": kind}})
    model = build(options)
    wide = {name: tensor.shape for name, tensor in model.state_dict().items()}
    figures = prune(model, SHAPE, spec.Prune(mac_cut=0.05, round_to=4), 10)
    for name, reason in skipped.items():
        assert any(line.startswith(f"{name}: {reason}") for line in figures["skipped"]), figures["skipped"]
        assert all(tensor.shape[0] == wide[other][0] for other, tensor in model.state_dict().items() if other.startswith(f"{name}."))
    assert model.net.last.out_features < 32
    assert same_answers(model, again(model, build(options), tmp_path), rows_for(options))


def test_the_notes_of_the_stage_list_what_was_left(tmp_path, digits):
    options = spec.parse({"name": "p", "model": {"name": "factory", "factory": f"{__name__}:Wrapped", "options": {"kind": "lstm"}}})
    models.save(fresh(options, digits), tmp_path / WEIGHTS)
    job = stages.Job(options, {"mac_cut": 0.05, "round_to": 4}, {"student": SimpleNamespace(path=tmp_path, files={})}, digits, lambda: tmp_path, lambda names: 0, lambda text: None)
    (tmp_path / "small").mkdir()
    draft = Draft(tmp_path / "small")
    stages.pruned(job, draft)
    assert "compress.prune left as it was net.middle: a LSTM cannot be pruned" in draft.notes


# --- targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("target", ["mac_cut", "parameter_cut", "latency_cut"])
def test_a_target_out_of_reach_names_the_best_there_is(target, steps):
    options = spec.Prune(**{"mac_cut": 0.0, target: 0.99}, steps=steps)
    model = build(CONVNET)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=rf"compress\.prune: .*{target} 0\.99.* cannot be met; this model reaches at most .*{target} 0\.\d+"):
        prune_module(model, (torch.zeros(2, *SHAPE),), options, Evidence(latency_cut=saved(models.count(model, SHAPE)["macs"])))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("steps", [1, 4])
def test_a_target_out_of_reach_names_what_was_asked_and_what_stands_in_the_way(steps):
    model = build(FACTORY.model_copy(update={"options": {"kind": "lstm"}}))
    with pytest.raises(UserError) as error:
        prune(model, SHAPE, spec.Prune(mac_cut=0.9, round_to=4, steps=steps, keep=("net.last",)), 10)
    said = str(error.value)
    assert said.startswith("compress.prune: mac_cut 0.9 cannot be met; this model reaches at most mac_cut 0.") and "parameter_cut" not in said
    assert "with round_to 4, what [channels, neurons] and keep [net.last]; it left as it was net.first: tied to net.middle, a LSTM" in said
    assert "; net.middle: a LSTM cannot be pruned; ask for less, or let more leave" in said


def saved(macs):
    """A latency that follows the multiply-accumulates."""
    return lambda model: 1 - models.count(model, SHAPE)["macs"] / macs


def test_latency_is_measured_once_the_other_targets_are_met_and_ends_the_pruning_when_it_is():
    model, asked = build(CONVNET), []
    cut = saved(models.count(model, SHAPE)["macs"])

    def measure(small):
        asked.append(cut(small))
        return asked[-1]

    figures = prune_module(model, (torch.zeros(2, *SHAPE),), spec.Prune(mac_cut=0.3, latency_cut=0.6, round_to=4), Evidence(latency_cut=measure))
    assert figures["latency_cut"] == asked[-1] >= 0.6
    assert len(asked) > 1 and all(0.3 <= value < 0.6 for value in asked[:-1])


def test_latency_is_that_of_the_files_in_onnx_runtime():
    model, rows = build(CONVNET), torch.rand(64, *SHAPE).numpy()
    assert latency_cut(model, rows)(model) < 1
    with pytest.raises(UserError, match=r"compress\.prune\.latency_cut: there are no rows"):
        prune(model, SHAPE, spec.Prune(mac_cut=0, latency_cut=0.1), 10)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mac_cut": 0}, r"compress\.0\.prune\.mac_cut: there is no target"),
        ({"ratios": [0.5], "what": ["channels", "blocks"]}, r"compress\.0\.prune\.ratios: they are of widths"),
        ({"ratios": [0.5], "scope": "global"}, r"compress\.0\.prune\.ratios: .*leave scope and steps out"),
        ({"ratios": [0.5], "latency_cut": 0.2}, r"compress\.0\.prune\.ratios: .*leave those out"),
        ({"what": []}, r"compress\.0\.prune\.what"),
        ({"what": ["layers"]}, r"compress\.0\.prune\.what"),
    ],
)
def test_options_that_contradict_are_refused(options, says):
    with pytest.raises(SpecError, match=says):
        spec.parse({"name": "p", "compress": [{"prune": options}]})


# --- sensitivity --------------------------------------------------------------------------------------------------


def test_sensitivity_tells_what_each_layer_costs_and_saves_alone(digits):
    model = perceptron()
    with torch.no_grad():
        model.net.up.weight[:8] *= 1e-3  # now the unread ones are of little norm too
    before = copy.deepcopy(model.state_dict())
    assert sensitivity(model, SHAPE, digits.validation, 10) == [{"layer": "net.up", "action": "pruned", "drop": 0.0, "macs_saved": pytest.approx(0.5)}]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    table = sensitivity(build(ENCODER), SHAPE, digits.validation, 10, keep=("net.layers.3",))
    assert {row["layer"] for row in table} == {f"net.layers.{index}.{part}" for index in range(3) for part in ("up", "attention")}
    assert all(0 < row["macs_saved"] < 0.2 and -1 < row["drop"] < 1 for row in table)
