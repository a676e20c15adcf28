"""Pruning and distillation: model to model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from portaisys import models, spec
from portaisys.compress.distill import distillation
from portaisys.compress.prune import prune
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
