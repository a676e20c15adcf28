"""Models: what a spec builds, what a factory must give, and widths that survive without pickle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from portaisys import models, spec
from portaisys.compress.prune import prune
from portaisys.engine import Options, backend
from portaisys.export import export
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


# --- token ids ----------------------------------------------------------------------------------------------------

TEXT = spec.TextTransformer(name="text_transformer", dim=32, depth=2, heads=4)
LONGEST = (24,)


def text_model(options=TEXT):
    torch.manual_seed(0)
    return models.build(options, LONGEST, 5, vocabulary=50).eval()


def ids(*lengths, width):
    torch.manual_seed(1)
    return torch.stack([torch.nn.functional.pad(torch.randint(1, 50, (length,)), (0, width - length)) for length in lengths])


def test_more_padding_and_longer_neighbours_change_no_answer():
    model = text_model()
    short = ids(7, 3, width=7)
    alone, wide = model(short), model(torch.nn.functional.pad(short, (0, 17)))
    torch.testing.assert_close(wide, alone, rtol=0, atol=1e-5)
    beside = model(torch.cat([torch.nn.functional.pad(short, (0, 17)), ids(24, width=24)]))
    torch.testing.assert_close(beside[:2], alone, rtol=0, atol=1e-5)


def test_the_order_of_tokens_matters():
    model = text_model()
    x = ids(7, width=7)
    assert (model(x) - model(x.flip(1))).abs().max() > 1e-3


def test_a_row_of_padding_alone_gets_a_number():
    assert text_model()(torch.zeros(2, 5, dtype=torch.int64)).isfinite().all()


class Bag(nn.Module):
    """A user's model of token ids."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 5, padding_idx=0)

    def forward(self, ids):
        return self.bag(ids)


def test_a_users_model_takes_ids_as_they_are():
    model = text_model(spec.ModelFactory(name="factory", factory=f"{__name__}:Bag"))
    assert model(ids(4, 2, width=4)).shape == (2, 5)


def test_a_model_of_the_other_kind_of_rows_is_refused_with_one_that_fits():
    with pytest.raises(UserError, match=r"model\.name: convnet takes numbers and the rows are token ids; take text_transformer or factory"):
        models.build(spec.ConvNet(), LONGEST, 5, vocabulary=50)
    with pytest.raises(UserError, match=r"text_transformer takes token ids and the rows are numbers; take convnet or transformer or factory"):
        models.build(TEXT, SHAPE, 10)


def test_a_pruned_text_model_is_rebuilt_from_its_weights_alone(tmp_path):
    pruned = text_model()
    before = models.count(pruned, LONGEST)
    prune(pruned, LONGEST, spec.Prune(mac_cut=0.2, round_to=4), 5)
    models.save(pruned, tmp_path / "model.safetensors")
    fresh = text_model()
    models.rebuild(fresh, models.load_weights(tmp_path / "model.safetensors"))
    torch.testing.assert_close(fresh(ids(9, 2, width=9)), pruned.eval()(ids(9, 2, width=9)), rtol=0, atol=0)
    assert models.count(fresh, LONGEST)["macs"] <= 0.8 * before["macs"]


def test_an_exported_text_model_is_free_in_batch_and_tokens(tmp_path):
    x = ids(*[3 + index % 22 for index in range(40)], width=24).numpy()
    export(text_model(), x, spec.Export(max_batch=16), tmp_path / "model.onnx", most_tokens=24)
    engine = backend("onnxruntime").load(tmp_path / "model.onnx", Options(max_batch=16))
    assert engine.inputs[0].dtype == "int64" and engine.inputs[0].shape == (-1, -1)
    for rows, width in ((1, 3), (5, 9), (16, 24)):
        some = ids(*[min(3 + row, width) for row in range(rows)], width=width)
        torch.testing.assert_close(torch.from_numpy(engine.run({"x": some.numpy()})["logits"]), text_model()(some), rtol=0, atol=1e-4)
    engine.close()
