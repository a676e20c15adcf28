"""Data: four splits that never overlap, and sources that refuse what is wrong with the spec path."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from portaisys import data, spec
from portaisys.spec import UserError

FASHION = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")


class Blobs:
    """A user's map-style Dataset."""

    classes = ("a", "b", "c")

    def __init__(self, rows=300, noisy=False, hole=False, gap=False):
        rng = np.random.default_rng(0)
        self.y = np.arange(rows) % 3
        if gap:
            self.y[self.y == 1] = 0
        self.x = rng.normal(size=(rows, 2)).astype(np.float32) + self.y[:, None]
        self.noisy = noisy
        if hole:
            self.x[17] = np.nan

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index] + (np.random.normal() if self.noisy else 0), self.y[index]


def not_a_dataset():
    return 3


def factory(name, **options):
    return spec.DataFactory(source="factory", factory=f"{__name__}:{name}", options=options, test_rows=60, validation_rows=30, calibration_rows=30)


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "rows.npz", **arrays)
    return spec.Npz(source="npz", path=str(tmp_path / "rows.npz"), test_rows=60, validation_rows=30, calibration_rows=30)


def good(rows=300):
    rng = np.random.default_rng(1)
    return {"x": rng.normal(size=(rows, 1, 4, 4)), "y": np.arange(rows) % 3}


def options_of_every_source(tmp_path):
    yield spec.Digits()
    yield npz(tmp_path, **good())
    yield npz(tmp_path, **good(), x_test=np.ones((9, 1, 4, 4)), y_test=np.arange(9) % 3, labels=np.array(["u", "v", "w"]))
    yield factory("Blobs")
    if FASHION.is_dir():
        yield spec.FashionMnist(source="fashion_mnist")


def test_splits_of_every_source_cover_the_rows_once(tmp_path):
    for options in options_of_every_source(tmp_path):
        splits = data.load(options)
        parts = [splits.train, splits.validation, splits.calibration, splits.test]
        together = np.concatenate([part.indices for part in parts])
        assert sorted(together) == list(range(len(splits.train.table.y)))
        for part in parts:
            assert set(part.y) == set(range(len(splits.labels)))


def test_digits_hold_at_least_500_test_rows():
    assert len(data.load(spec.Digits()).test) >= 500


def test_the_same_seed_splits_the_same_way_and_another_does_not():
    first, again, other = (data.load(spec.Digits(split_seed=seed)) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    assert first.test_digest == again.test_digest != other.test_digest


def test_rows_come_as_raw_float32_with_the_moments_of_the_train_split():
    splits = data.load(spec.Digits())
    x, y = splits.train.take(np.arange(5))
    assert (x.dtype, x.shape, y.dtype) == (np.float32, (5, 1, 8, 8), np.int64)
    assert x.max() > 1
    np.testing.assert_allclose(splits.mean, splits.train.x.mean(), rtol=1e-5)
    np.testing.assert_allclose(splits.std, splits.train.x.std(), rtol=1e-5)


def test_an_official_test_set_is_the_test_split(tmp_path):
    x_test = np.full((9, 1, 4, 4), 7.0)
    splits = data.load(npz(tmp_path, **good(), x_test=x_test, y_test=np.arange(9) % 3))
    np.testing.assert_array_equal(splits.test.x, x_test)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros(9, int)}, "same length"),
        ({"x": np.full((300, 2), np.nan)}, "NaN or Inf, first in row 0"),
        ({"y": np.linspace(0, 1, 300)}, "integer class indices"),
        ({"y": np.arange(300) % 3 - 1}, "labels run from -1"),
        ({"y": (np.arange(300) % 3) * 2}, "class 1 of 0..4 has no row"),
        ({"x_test": np.ones((9, 5)), "y_test": np.arange(9) % 3}, "x_test of"),
        ({"x_test": np.ones((9, 1, 4, 4))}, "must hold arrays 'x_test' and 'y_test'"),
        ({"x": np.array(["a"] * 300)[:, None]}, "give numbers"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=r"data\.path") as error:
        data.load(npz(tmp_path, **{**good(), **change}))
    assert message in str(error.value)


def test_rows_of_one_class_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data: all 300 rows are of one class, '0'"):
        data.load(npz(tmp_path, **{**good(), "y": np.zeros(300, int)}))


def test_an_npz_with_pickled_objects_is_not_unpickled(tmp_path):
    with pytest.raises(UserError, match="plain arrays"):
        data.load(npz(tmp_path, x=np.array([object()] * 300), y=np.arange(300) % 3))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"])
def test_a_damaged_npz_is_refused(tmp_path, content):
    (tmp_path / "rows.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.path"):
        data.load(spec.Npz(source="npz", path=str(tmp_path / "rows.npz")))
    with pytest.raises(UserError, match="no file"):
        data.load(spec.Npz(source="npz", path=str(tmp_path / "absent.npz")))


def test_splits_larger_than_the_data_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.test_rows"):
        data.load(npz(tmp_path, **good(61)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (factory("Blobs", noisy=True), "another x for the same index"),
        (factory("Blobs", hole=True), "row 17 has NaN"),
        (factory("Blobs", gap=True), "class 1 of 0..2 has no row"),
        (factory("Blobs", rows=0), "empty"),
        (factory("Blobs", colour=1), "cannot be called"),
        (factory("not_a_dataset"), "map-style Dataset"),
        (factory("absent"), "does not import"),
        (factory("__doc__"), "not callable"),
        (spec.DataFactory(source="factory", factory="no_such_module:f"), "does not import"),
        (spec.DataFactory(source="factory", factory="no colon"), "module:callable"),
    ],
)
def test_a_wrong_data_factory_is_refused(options, message):
    with pytest.raises(UserError, match=r"data\.factory") as error:
        data.load(options)
    assert message in str(error.value)


# --- Fashion-MNIST's files --------------------------------------------------------------------------------------


def idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, rows in (("train", 400), ("t10k", 100)):
        idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 255, (rows, 28, 28)))
        idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(rows) % 10)
    return tmp_path


def fashion(folder):
    return data.load(spec.FashionMnist(source="fashion_mnist", path=str(folder), validation_rows=50, calibration_rows=50))


def test_idx_files_are_read(folder):
    splits = fashion(folder)
    assert (len(splits.train), len(splits.test), splits.shape) == (300, 100, (1, 28, 28))


IMAGES = "train-images-idx3-ubyte.gz"
DAMAGE = {
    "missing": lambda folder: (folder / IMAGES).unlink(),
    "truncated": lambda folder: (folder / IMAGES).write_bytes((folder / IMAGES).read_bytes()[:-100]),
    "no gzip": lambda folder: (folder / IMAGES).write_bytes(b"plain"),
    "bad magic": lambda folder: (folder / IMAGES).write_bytes(gzip.compress(b"\x00\x00\x0d\x03" + bytes(100))),
    "short body": lambda folder: (folder / IMAGES).write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 400, 28, 28) + bytes(100))),
    "lengths differ": lambda folder: idx(folder / "train-labels-idx1-ubyte.gz", np.arange(9) % 10),
    "label 10": lambda folder: idx(folder / "train-labels-idx1-ubyte.gz", np.arange(400) % 11),
    "folder gone": lambda folder: shutil.rmtree(folder),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_idx_files_are_refused(folder, kind):
    DAMAGE[kind](folder)
    with pytest.raises(UserError, match=r"data\.path"):
        fashion(folder)


@needs_fashion
def test_fashion_mnist_is_the_published_set():
    splits = data.load(spec.FashionMnist(source="fashion_mnist"))
    assert (len(splits.train.table.y), len(splits.test)) == (70_000, 10_000)
    assert abs(splits.mean[0] / 255 - 0.2860) < 1e-3
    assert abs(splits.std[0] / 255 - 0.3530) < 1e-3
