"""Models: what a spec builds, what a factory must give, and widths that survive without pickle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from portaisys import models, spec
from portaisys.compress.prune import prune
from portaisys.spec import UserError

SHAPE = (1, 8, 8)
FAMILIES = [
    spec.ConvNet(channels=(16, 32), blocks=(1, 2)),
    spec.ConvNet(stem=8, stem_stride=2, channels=(16, 32), blocks=(1, 1), strides=(2, 2)),
    spec.Transformer(name="transformer", patch=2, dim=32, depth=2, heads=4),
    spec.ModelFactory(name="factory", factory=f"{__name__}:Plain", options={"width": 32}),
]


class Plain(nn.Module):
    """A user's model."""

    def __init__(self, width=16, classes=10, depthwise=False):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, groups=width if depthwise else 1), nn.ReLU(),
            nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def not_a_module():
    return "a string"


def build(options, mean=(4.9,), std=(6.0,)):
    torch.manual_seed(0)
    return models.build(options, SHAPE, 10, mean, std)


@pytest.mark.parametrize("options", FAMILIES, ids=lambda options: options.name)
def test_every_family_gives_logits_and_counts(options):
    model = build(options)
    assert model(torch.rand(3, *SHAPE)).shape == (3, 10)
    count = models.count(model, SHAPE)
    assert count["parameters"] == sum(p.numel() for p in model.parameters())
    assert count["macs"] > 0


def test_macs_are_those_of_the_layers_on_paper():
    conv = build(spec.ModelFactory(name="factory", factory=f"{__name__}:Plain"))
    assert models.count(conv, SHAPE)["macs"] == 64 * (9 * 16 + 9 * 16 * 16 + 16 * 16) + 160
    tokens, dim = 16, 32
    attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim + 2 * tokens * dim * 4 * dim
    encoder = build(spec.Transformer(name="transformer", patch=2, dim=dim, depth=2, heads=4))
    assert models.count(encoder, SHAPE)["macs"] == 2 * attention + tokens * dim * 4 + dim * 10


def test_normalisation_is_part_of_the_model():
    plain, shifted = build(FAMILIES[0], mean=(0.0,), std=(1.0,)), build(FAMILIES[0], mean=(5.0,), std=(2.0,))
    x = torch.rand(2, *SHAPE)
    torch.testing.assert_close(plain.eval()(x), shifted.eval()(x * 2 + 5))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("not_a_module", {}, "not a torch.nn.Module"),
        ("absent", {}, "does not import"),
        ("Plain", {"wide": 3}, "cannot be called"),
        ("Plain", {"classes": 7}, r"gives \(2, 7\), the data has 10 classes"),
    ],
)
def test_a_wrong_model_factory_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        build(spec.ModelFactory(name="factory", factory=f"{__name__}:{name}", options=options))


def test_rows_that_do_not_fit_the_model_are_refused():
    with pytest.raises(UserError, match="channels, height, width"):
        models.build(spec.ConvNet(), (64,), 10)
    with pytest.raises(UserError, match=r"model\.patch: 3 does not tile"):
        models.build(spec.Transformer(name="transformer", patch=3), SHAPE, 10)


DEPTHWISE = spec.ModelFactory(name="factory", factory=f"{__name__}:Plain", options={"width": 32, "depthwise": True})


@pytest.mark.parametrize("options", [*FAMILIES, DEPTHWISE], ids=lambda options: options.name)
def test_a_pruned_model_is_rebuilt_from_its_weights_alone(options, tmp_path):
    pruned = build(options)
    before = models.count(pruned, SHAPE)
    prune(pruned, SHAPE, spec.Prune(mac_cut=0.2, round_to=4), 10)
    models.save(pruned, tmp_path / "model.safetensors")
    fresh = build(options)
    models.rebuild(fresh, models.load_weights(tmp_path / "model.safetensors"))
    x = torch.rand(2, *SHAPE)
    torch.testing.assert_close(fresh.eval()(x), pruned.eval()(x), rtol=0, atol=0)
    assert models.count(fresh, SHAPE)["macs"] <= 0.8 * before["macs"]


def test_weights_of_another_model_or_a_damaged_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="another model"):
        models.rebuild(build(FAMILIES[0]), build(FAMILIES[2]).state_dict())
    models.save(build(FAMILIES[0]), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(UserError, match="no readable safetensors"):
        models.load_weights(tmp_path / "model.safetensors")
