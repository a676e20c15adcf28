"""Pruning and distillation: model to model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from portaisys import models, spec
from portaisys.compress.distill import distillation
from portaisys.compress.prune import prune
from portaisys.compress.sparsify import keep_zeros, mask_of, sparsify
from portaisys.spec import UserError

SHAPE = (1, 8, 8)


def convnet():
    torch.manual_seed(0)
    return models.build(spec.ConvNet(channels=(16, 32), blocks=(1, 1)), SHAPE, 10)


@pytest.mark.parametrize("cut", [0.15, 0.5, 0.8])
def test_pruning_meets_its_target_and_says_so(cut):
    model = convnet()
    before = models.count(model, SHAPE)
    figures = prune(model, SHAPE, spec.Prune(mac_cut=cut, parameter_cut=cut, round_to=4), 10)
    after = models.count(model, SHAPE)
    assert figures["macs"] == after["macs"] <= (1 - cut) * before["macs"]
    assert figures["parameters"] == after["parameters"] <= (1 - cut) * before["parameters"]
    assert model(torch.zeros(2, *SHAPE)).shape == (2, 10)


def test_widths_are_rounded_to_what_was_asked():
    model = convnet()
    prune(model, SHAPE, spec.Prune(mac_cut=0.5, round_to=8), 10)
    assert all(layer.out_channels % 8 == 0 for layer in model.modules() if isinstance(layer, nn.Conv2d))


def test_a_target_out_of_reach_names_the_best_there_is():
    with pytest.raises(UserError, match=r"compress\.prune: mac_cut 0\.999 .* reaches at most mac_cut 0\.\d+"):
        prune(convnet(), SHAPE, spec.Prune(mac_cut=0.999), 10)


class Odd(nn.Module):
    """Its logits are sums of pairs: no layer has as many outputs as there are classes, so none is known as the head."""

    def __init__(self):
        super().__init__()
        self.body, self.pairs = nn.Linear(64, 32), nn.Linear(32, 20)

    def forward(self, x):
        return self.pairs(torch.relu(self.body(x.flatten(1)))).reshape(-1, 10, 2).sum(2)


def test_a_convolution_that_gives_the_logits_is_not_pruned():
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = models.Classifier(net, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    prune(model, SHAPE, spec.Prune(mac_cut=0.4, round_to=2), 10)
    assert model(torch.zeros(2, *SHAPE)).shape == (2, 10)


def test_pruning_that_would_break_the_output_is_refused():
    model = models.Classifier(Odd(), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    with pytest.raises(UserError, match=r"compress\.prune: pruning broke the model's output"):
        prune(model, SHAPE, spec.Prune(mac_cut=0.5, round_to=1), 10)


def test_pruning_the_same_weights_gives_the_same_model():
    first, second = convnet(), convnet()
    for model in (first, second):
        prune(model, SHAPE, spec.Prune(mac_cut=0.5, round_to=4), 10)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_the_distillation_loss_is_the_formula():
    teacher, recipe = convnet().eval(), spec.Distill(temperature=3.0, alpha=0.6)
    x, y, logits = torch.rand(5, *SHAPE), torch.arange(5), torch.randn(5, 10)
    soft = F.softmax(teacher(x) / 3, 1)
    kl = (soft * (soft.log() - F.log_softmax(logits / 3, 1))).sum(1).mean()
    torch.testing.assert_close(distillation(teacher, recipe)(logits, x, y), 0.6 * 9 * kl + 0.4 * F.cross_entropy(logits, y))


def test_the_teacher_is_left_alone():
    teacher, student = convnet(), convnet()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    loss = distillation(teacher, spec.Distill())
    loss(student(torch.rand(4, *SHAPE)), torch.rand(4, *SHAPE), torch.arange(4)).backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())


# --- 2:4 sparsity ---------------------------------------------------------------------------------------------------


def groups(weight):
    """[out, ..., in / 4, 4]: the four that lie beside one another in the input channels."""
    return weight.detach().movedim(1, -1).unflatten(-1, (-1, 4))


@pytest.mark.parametrize("shape", [(6, 8), (5, 12, 3, 3)])
def test_of_every_four_weights_the_two_largest_stay(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    kept = groups(mask_of(weight))
    assert bool((kept.sum(-1) == 2).all())
    size = groups(weight).abs()
    assert bool((torch.where(kept > 0, size, torch.inf).amin(-1) >= torch.where(kept > 0, -torch.inf, size).amax(-1)).all())
    assert mask_of(torch.ones(1, 4)).tolist() == [[1, 1, 0, 0]]


def test_sparsify_leaves_what_it_is_told_and_what_has_no_four_channels():
    model = convnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    figures = sparsify(model, spec.Sparsify(keep=(names[-1],)))
    assert figures["sparse_layers"] == len(names) - 2  # all but the stem, which sees one channel, and the head
    for name in (names[0], names[-1]):
        assert torch.equal(model.state_dict()[f"{name}.weight"], before[f"{name}.weight"])
    with pytest.raises(UserError, match=r"compress\.sparsify\.keep: 'body' is none of the layers that 2:4 applies to: "):
        sparsify(model, spec.Sparsify(keep=("body",)))
    with pytest.raises(UserError, match="no Linear or Conv2d with a multiple of four input channels is left"):
        sparsify(nn.Linear(3, 2), spec.Sparsify())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_holds_the_zeros_and_moves_the_rest(optimizer):
    model = convnet()
    sparsify(model, spec.Sparsify())
    zero = {name: weight == 0 for name, weight in model.named_parameters()}
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert keep_zeros(model) == len([1 for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]) - 1
    chosen = {"sgd": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1), "adamw": torch.optim.AdamW(model.parameters(), 0.01)}[optimizer]
    for step in range(5):
        torch.manual_seed(step)
        F.cross_entropy(model(torch.randn(8, *SHAPE)), torch.arange(8)).backward()
        chosen.step()
        chosen.zero_grad()
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight.shape[1] % 4 == 0:
            weight, held = layer.weight, zero[f"{name}.weight"]
            assert bool((weight[held] == 0).all()) and bool((weight[~held] != before[f"{name}.weight"][~held]).any())


def test_a_dense_model_has_no_zeros_to_hold():
    assert keep_zeros(convnet()) == 0
