"""A real model with real sentences goes all the way: two inputs, two free dimensions, every engine that takes it."""

from __future__ import annotations

import minilm
import numpy as np
import pytest

from portaisys import artifact, cli
from portaisys.compile import Order, compile_onnx
from portaisys.compress.cast import cast, with_islands
from portaisys.compress.quantize import quantize
from portaisys.engine import Options, backend
from portaisys.engine import tensorrt as gpu
from portaisys.engine.onnx_file import face_of, read_onnx
from portaisys.engine.verify import TOLERANCE
from portaisys.spec import Quantize, Storage

SEQ = ("seq", 1, 16, 64)
OPTIONS = {"opt_batch": 4, "max_batch": 8, "dims": (SEQ,)}
# What transformers 5.24 answers: the first four numbers each, and the cosines between them.
SENTENCES = ["A cat sits on the mat.", "A kitten lies on a rug.", "Interest rates rose by a quarter of a point."]
FIRST = [[0.126535, -0.032851, -0.02906, 0.044407], [0.029578, 0.03633, 0.028114, 0.060318], [0.050427, 0.009392, -0.033825, 0.024794]]
COSINES = [[1, 0.559995, -0.009683], [0.559995, 1, -0.046514], [-0.009683, -0.046514, 1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("minilm")


@pytest.fixture(scope="module")
def source(folder):
    assert minilm.export(folder / "minilm.onnx") < 1e-5
    return folder / "minilm.onnx"


@pytest.fixture(scope="module")
def int8(source, folder):
    quantize(source, folder / "int8.onnx", minilm.rows(32, 16, 1), Quantize())
    return folder / "int8.onnx"


@pytest.fixture(scope="module")
def fp8(source, folder):
    quantize(source, folder / "fp8.onnx", minilm.rows(32, 16, 1), Quantize(), "fp8")
    return folder / "fp8.onnx"


def answers(name, path, precision, feeds, folder):
    options, module = Options(precision, **OPTIONS), backend(name)
    module.build(path, options, folder / "built", None)
    return module.load(folder / "built", options, None).run(feeds)[minilm.OUTPUT]


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_it_embeds_as_transformers_does():
    found = minilm.predict(minilm.model(), minilm.tokens(SENTENCES, 16))
    np.testing.assert_allclose(found[:, :4], FIRST, atol=2e-6)
    np.testing.assert_allclose(found @ found.T, COSINES, atol=2e-6)


def test_padding_and_company_change_nothing():
    net = minilm.model()
    alone = minilm.predict(net, minilm.tokens(SENTENCES[:1], 9))
    np.testing.assert_allclose(minilm.predict(net, minilm.tokens(SENTENCES, 64))[:1], alone, atol=1e-6)


def test_the_same_seed_gives_the_same_sentences():
    first, again, other = (minilm.rows(8, 16, seed) for seed in (0, 0, 1))
    assert all((first[name] == again[name]).all() for name in minilm.INPUTS) and (first["ids"] != other["ids"]).any()
    assert first["ids"].shape == (8, 16) and (first["mask"].sum(1) >= 5).all()


def test_its_file_has_a_free_batch_and_a_free_length(source):
    face = face_of(read_onnx(source))
    assert (face.batch, face.free_dims) == (0, {"seq"}) and face.dims == {name: ("batch", "seq") for name in minilm.INPUTS}


def test_it_becomes_a_version_that_answers_sentences_of_another_length(source, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = Storage(path=str(tmp_path / "runs"), cache=str(tmp_path / "cache"))
    np.savez(tmp_path / "calibration.npz", **minilm.rows(40, 8, 1))
    order = Order(source, "minilm", tmp_path / "calibration.npz", ("int8",), opt_batch=2, max_batch=2, dims=(SEQ,), max_error=0.4, storage=storage)
    found = compile_onnx(order)
    lines, judged = {(line.backend, line.precision): line for line in found.table}, {one.precision: one for one in found.judged}
    for name in ("onnxruntime", "openvino"):
        for precision in ("fp32", "int8"):
            assert lines[name, precision].ms, lines[name, precision].because
    # int8 is admitted where it is faster, which is for the machine to say.
    assert judged["fp32"].admitted and judged["fp32"].error < 1e-3 and 0.05 < judged["int8"].error < 0.4
    feeds = minilm.rows(6, 40, 2)
    np.savez(tmp_path / "rows.npz", **feeds)
    assert cli.main(["predict", "minilm@1", str(tmp_path / "rows.npz"), "--out", str(tmp_path / "out.npz"), "--storage", storage.path]) == 0
    answered = artifact.read_arrays(tmp_path / "out.npz")[minilm.OUTPUT]
    assert cosines(answered, minilm.predict(minilm.model(), feeds)).min() > 0.9


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_int8_embeddings_stay_near_those_of_fp32(source, int8, tmp_path, name):
    feeds = minilm.rows(64, 32, 2)
    near = cosines(answers(name, int8, "int8", feeds, tmp_path), answers(name, source, "fp32", feeds, tmp_path))
    assert near.mean() > 0.96 and near.min() > 0.92  # measured 0.975 and 0.95


def test_fp16_needs_no_islands(source, tmp_path):
    report = with_islands(source, tmp_path / "fp16.onnx", "fp16", minilm.rows(2, 8, 3), TOLERANCE["fp16"])
    assert (report.islands, report.trials) == ((), 1) and report.error < 0.005


@pytest.mark.parametrize(
    ("made_of", "low", "precision"),
    [
        pytest.param("source", None, "fp32", id="fp32"),
        pytest.param("source", "fp16", "fp16", id="fp16"),
        pytest.param("source", "bf16", "bf16", id="bf16", marks=pytest.mark.slow),
        pytest.param("int8", None, "int8", id="int8", marks=pytest.mark.slow),
        pytest.param("int8", "fp16", "int8", id="int8+fp16"),
        pytest.param("fp8", None, "fp8", id="fp8", marks=pytest.mark.slow),
    ],
)
def test_rtx_builds_it_in_every_precision(request, tmp_path, made_of, low, precision):
    path = request.getfixturevalue(made_of)
    if low:
        cast(path, tmp_path / "low.onnx", low)
        path = tmp_path / "low.onnx"
    gpu.build(path, Options(precision, **OPTIONS), tmp_path / "plan", None)
    assert (tmp_path / "plan").stat().st_size > 20e6  # the weights are in it
