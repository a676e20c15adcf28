"""Where rows come from: one function a source, each giving a checked Table.

A source refuses what is missing, truncated, of another format or not finite; the messages name the spec path.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys import spec
from portaisys.spec import UserError


@dataclass(frozen=True)
class Tokens:
    """What a text source has beside its ids. `vocabulary`: how many ids; `tokenizer`: its JSON, which turns text into them again."""

    texts: Sequence[str]
    vocabulary: int
    tokenizer: str


@dataclass(frozen=True)
class Table:
    """Every row of a source. `rows(indices)` gives float32 [n, *shape]; `test`: indices of an official test set, if any.

    Where rows vary, they are int64 ids [n, T] padded with 0 to the longest of those taken, `lengths` [rows] says how many are none,
    and `shape` is what none is longer than. `learn(train rows)`: the table with what a source learns from its train split; `notes`: what to tell.
    """

    rows: Callable[[NDArray[np.int64]], NDArray[Any]]
    y: NDArray[np.int64]
    labels: tuple[str, ...]
    shape: tuple[int, ...]
    digest: str
    test: NDArray[np.int64] | None = None
    lengths: NDArray[np.int64] | None = None
    tokens: Tokens | None = None
    learn: Callable[[NDArray[np.int64]], Table] | None = None
    notes: tuple[str, ...] = ()


def _in_memory(x: NDArray[Any], y: NDArray[np.int64], labels: tuple[str, ...], test: NDArray[np.int64] | None = None) -> Table:
    digest = hashlib.sha256(f"{x.dtype}{x.shape}{labels}".encode() + np.ascontiguousarray(x).tobytes()).hexdigest()
    return Table(lambda indices: x[indices].astype(np.float32), y, labels, x.shape[1:], digest, test)


def digits(options: spec.Digits) -> Table:
    """scikit-learn's digits: pixels 0..16, rows of [1, 8, 8]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return _in_memory(bunch.images[:, None].astype(np.uint8), bunch.target.astype(np.int64), tuple("0123456789"))


# --- Fashion-MNIST -----------------------------------------------------------------------------------------------

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def fashion_mnist(options: spec.FashionMnist) -> Table:
    """The four gzip IDX files; pixels 0..255, rows of [1, 28, 28]; the t10k rows are the test split."""
    folder = Path(options.path).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.path: no folder {folder}; install Debian's dataset-fashion-mnist or point data.path at the four gzip IDX files")
    x = [_idx(folder / f"{part}-images-idx3-ubyte.gz", (28, 28)) for part in ("train", "t10k")]
    y = [_idx(folder / f"{part}-labels-idx1-ubyte.gz", ()) for part in ("train", "t10k")]
    for images, labels in zip(x, y, strict=True):
        if len(images) != len(labels):
            raise UserError(f"data.path: {folder} holds {len(images)} images and {len(labels)} labels; fetch the files again")
    test = np.arange(len(x[0]), len(x[0]) + len(x[1]), dtype=np.int64)
    targets = np.concatenate(y).astype(np.int64)
    _check_labels(targets, len(_FASHION), "data.path")
    return _in_memory(np.concatenate(x)[:, None], targets, _FASHION, test)


def _idx(path: Path, item: tuple[int, ...]) -> NDArray[np.uint8]:
    """One IDX file of unsigned bytes (LeCun's format: 0, 0, type 8, rank, then big-endian sizes)."""
    try:
        with gzip.open(path) as stream:
            raw = stream.read()
    except FileNotFoundError:
        raise UserError(f"data.path: {path} is missing") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data.path: {path} is truncated or no gzip file ({error}); fetch it again") from None
    rank = 1 + len(item)
    if len(raw) < 4 + 4 * rank or raw[:4] != bytes([0, 0, 8, rank]):
        raise UserError(f"data.path: {path} starts with {raw[:4].hex() or 'nothing'}, not the IDX magic {bytes([0, 0, 8, rank]).hex()}; it is another file")
    sizes = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if sizes[1:] != item or body.size != int(np.prod(sizes)):
        raise UserError(f"data.path: {path} announces {sizes} and holds {body.size} bytes; it is truncated or another file")
    return body.reshape(sizes)


# --- a user's own ------------------------------------------------------------------------------------------------


def npz(options: spec.Npz) -> Table:
    """Arrays `x` and `y` of an .npz file; `x_test`, `y_test` make an official test split; `labels` names the classes."""
    arrays = _read_npz(Path(options.path).expanduser())
    x, y = _pair(arrays, "x", "y", options.path)
    test = None
    if "x_test" in arrays or "y_test" in arrays:
        x_test, y_test = _pair(arrays, "x_test", "y_test", options.path)
        if x_test.shape[1:] != x.shape[1:]:
            raise UserError(f"data.path: {options.path}: x has rows of {x.shape[1:]} and x_test of {x_test.shape[1:]}")
        test = np.arange(len(x), len(x) + len(x_test), dtype=np.int64)
        x, y = np.concatenate([x, x_test]), np.concatenate([y, y_test])
    labels = tuple(str(label) for label in arrays["labels"]) if "labels" in arrays else tuple(str(k) for k in range(int(y.max()) + 1))
    _check_labels(y, len(labels), "data.path")
    return _in_memory(x, y, labels, test)


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"data.path: no file {path}") from None
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"data.path: {path} is no readable .npz of plain arrays ({error})") from None


def _pair(arrays: dict[str, NDArray[Any]], x_name: str, y_name: str, path: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    if x_name not in arrays or y_name not in arrays:
        raise UserError(f"data.path: {path} must hold arrays {x_name!r} and {y_name!r}; it holds {', '.join(sorted(arrays)) or 'nothing'}")
    x, y = arrays[x_name], arrays[y_name]
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) or len(x) == 0:
        raise UserError(f"data.path: {path}: {x_name} has shape {x.shape} and {y_name} {y.shape}; give [rows, ...] and [rows] of the same length")
    if x.dtype.kind not in "fiub" or y.dtype.kind not in "iu":
        raise UserError(f"data.path: {path}: {x_name} is {x.dtype} and {y_name} {y.dtype}; give numbers and integer class indices")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        bad = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))[0])
        raise UserError(f"data.path: {path}: {x_name} has NaN or Inf, first in row {bad}; clean or drop such rows")
    return x, y.astype(np.int64)


def _check_labels(y: NDArray[np.int64], classes: int, where: str) -> None:
    counts = np.bincount(y, minlength=classes) if y.min() >= 0 else np.array([])
    if y.min() < 0 or len(counts) > classes:
        raise UserError(f"{where}: labels run from {y.min()} to {y.max()} with {classes} classes; they must be 0..{classes - 1}")
    if (counts == 0).any():
        raise UserError(f"{where}: class {int(np.flatnonzero(counts == 0)[0])} of 0..{classes - 1} has no row; number the classes without gaps")


def factory(options: spec.DataFactory) -> Table:
    """A torch-style map Dataset of (x, class index). Read once in full, to check and to digest it."""
    dataset = call_factory(options.factory, options.options, "data.factory")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(f"data.factory: {options.factory} gave a {type(dataset).__name__}; it must give a map-style Dataset (__len__, __getitem__)")
    if len(dataset) == 0:
        raise UserError(f"data.factory: {options.factory} gave an empty Dataset")
    y, shape, digest = _scan(dataset, options.factory)
    labels = tuple(str(label) for label in getattr(dataset, "classes", range(int(y.max()) + 1)))
    _check_labels(y, len(labels), "data.factory")

    alone = threading.Lock()  # a Dataset may hold an open file, and rows be loaded in a thread while others are scored

    def rows(indices: NDArray[np.int64]) -> NDArray[np.float32]:
        with alone:
            return np.stack([_item(dataset, int(index), options.factory)[0] for index in indices]) if len(indices) else np.empty((0, *shape), np.float32)

    return Table(rows, y, labels, shape, hashlib.sha256(f"{digest}{shape}{labels}".encode()).hexdigest())


def _scan(dataset: Any, name: str) -> tuple[NDArray[np.int64], tuple[int, ...], str]:
    first, _ = _item(dataset, 0, name)
    if not np.array_equal(first, _item(dataset, 0, name)[0]):
        raise UserError(f"data.factory: {name} gives another x for the same index; leave random changes to train.augment, so that engines can be compared on the same rows")
    state, y = hashlib.sha256(), np.empty(len(dataset), np.int64)
    for index in range(len(dataset)):
        x, y[index] = _item(dataset, index, name)
        if x.shape != first.shape:
            raise UserError(f"data.factory: {name}: row 0 has shape {first.shape}, row {index} {x.shape}; all rows need one shape")
        if not np.isfinite(x).all():
            raise UserError(f"data.factory: {name}: row {index} has NaN or Inf")
        state.update(x.tobytes())
    return y, first.shape, state.hexdigest()


def _item(dataset: Any, index: int, name: str) -> tuple[NDArray[np.float32], int]:
    try:
        x, y = dataset[index]
        return np.asarray(x, np.float32), int(y)
    except Exception as error:  # a user's code may raise anything
        raise UserError(f"data.factory: {name}: item {index} is not a pair (numbers, class index): {error}") from None


def call_factory(name: str, options: dict[str, Any], where: str) -> Any:
    """Import `module:callable` and call it. Raises UserError naming `where` when it cannot be imported or called."""
    _, made = import_factory(name, where)
    try:
        return made(**options)
    except Exception as error:  # a user's code may raise anything
        raise UserError(f"{where}: {name} cannot be called with options {sorted(options)}: {type(error).__name__}: {error}") from error


def import_factory(name: str, where: str) -> tuple[Any, Callable[..., Any]]:
    """The module and the callable of `module:callable`. Raises UserError naming `where`."""
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"{where}: {name!r}: write it as module:callable")
    try:
        module = importlib.import_module(module_name)
        made = getattr(module, attribute)
    except Exception as error:  # importing runs a user's code
        raise UserError(f"{where}: {name} does not import ({type(error).__name__}: {error}); is its folder on PYTHONPATH?") from error
    if not callable(made):
        raise UserError(f"{where}: {name} is a {type(made).__name__}, not callable")
    return module, made
