"""A model as its server describes it, inputs made for it, requests to it in JSON and binary, and what came back."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest

from conformance.wire import LENGTH, Reply, Target, strict

Feeds = Mapping[str, np.ndarray]
# BF16 is the upper half of a float32 and travels as its 16 bits.
DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BF16": "<u2", "BYTES": "O",
}  # fmt: skip
NO_JSON = ("FP16", "BF16")
ANY_SIZE = 3  # of a dimension that the model leaves open, the batch excepted
BINARY = "binary_tensor_data"


@dataclass(frozen=True)
class Tensor:
    """Shape with -1 for what is open; of a model that batches the first one is the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(DTYPES[self.datatype])

    @property
    def real(self) -> bool:
        return self.datatype in ("FP16", "FP32", "FP64")


@dataclass(frozen=True)
class Answer:
    """A reply to an inference request: its JSON and its outputs by name, in the order in which they came."""

    tree: Mapping[str, Any]
    outputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class Model:
    """A model on a server."""

    target: Target
    name: str
    about: Mapping[str, Any]
    config: Mapping[str, Any]
    extensions: tuple[str, ...]

    @property
    def path(self) -> str:
        return f"/v2/models/{self.name}"

    @property
    def infer_path(self) -> str:
        return f"{self.path}/infer"

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(Tensor(entry["name"], entry["datatype"], tuple(entry["shape"])) for entry in self.about["inputs"])

    @cached_property
    def outputs(self) -> tuple[Tensor, ...]:
        return tuple(Tensor(entry["name"], entry["datatype"], tuple(entry["shape"])) for entry in self.about["outputs"])

    @property
    def binary(self) -> bool:
        return BINARY in self.extensions

    @cached_property
    def largest(self) -> int:
        """Samples of the largest batch worth asking for; 1 where inputs share no batch."""
        if any(tensor.shape[:1] != (-1,) for tensor in self.inputs):
            return 1
        return min(int(self.config.get("max_batch_size", 4)) or 4, 64)

    def rows(self, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Inputs of so many samples, no two alike, of values that any model should take: reals about 0, integers from 0 to 99."""
        rng = np.random.default_rng(seed)
        return {tensor.name: _values(tensor, self._shape(tensor, batch), rng) for tensor in self.inputs}

    def _shape(self, tensor: Tensor, batch: int) -> tuple[int, ...]:
        first, rest = tensor.shape[:1], tensor.shape[1:]
        return (*(batch if size == -1 else size for size in first), *(ANY_SIZE if size == -1 else size for size in rest))

    def need(self, extension: str) -> None:
        if extension not in self.extensions:
            pytest.skip(f"/v2 does not list {extension}")

    def need_batches(self) -> int:
        if self.largest < 2:
            pytest.skip("the model's inputs share no batch")
        return self.largest

    def request(self, feeds: Feeds, *, binary: bool = False, binary_outputs: bool | None = None, **more: Any) -> tuple[dict[str, Any], list[bytes]]:
        """The JSON of a request and the tensors behind it. What has no JSON form goes in binary and is asked for in binary."""
        entries, blobs = [], []
        for tensor in self.inputs:
            values = feeds[tensor.name]
            entry: dict[str, Any] = {"name": tensor.name, "shape": list(values.shape), "datatype": tensor.datatype}
            if binary or tensor.datatype in NO_JSON:
                blobs.append(packed(tensor, values))
                entry["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                entry["data"] = values.ravel().tolist() if tensor.datatype != "BYTES" else [text.decode() for text in values.ravel()]
            entries.append(entry)
        tree: dict[str, Any] = {"inputs": entries}
        wanted = binary if binary_outputs is None else binary_outputs
        if wanted:
            tree["parameters"] = {"binary_data_output": True}
        elif any(tensor.datatype in NO_JSON for tensor in self.outputs):
            tree["outputs"] = [self.wanted(tensor) for tensor in self.outputs]
        return {**tree, **more}, blobs

    def wanted(self, tensor: Tensor, binary: bool = False) -> dict[str, Any]:
        """An entry of a request's outputs; binary where there is no other form."""
        return {"name": tensor.name, "parameters": {"binary_data": True}} if binary or tensor.datatype in NO_JSON else {"name": tensor.name}

    def bytes_of(self, feeds: Feeds, *, headers: Mapping[str, str] | None = None, **options: Any) -> bytes:
        """A whole request as it goes over the wire."""
        body, own = framed(*self.request(feeds, **options))
        return self.target.bytes_of("POST", self.infer_path, body, {**own, **(headers or {})})

    def post(self, tree: Any, blobs: Iterable[bytes] = (), headers: Mapping[str, str] | None = None, path: str | None = None) -> Reply:
        body, own = framed(tree, list(blobs))
        return self.target.ask("POST", path or self.infer_path, body, {**own, **(headers or {})})

    def infer(self, feeds: Feeds, *, path: str | None = None, headers: Mapping[str, str] | None = None, **options: Any) -> Answer:
        return self.answer(self.post(*self.request(feeds, **options), headers, path))

    def answer(self, reply: Reply) -> Answer:
        """Read a reply and hold everything it says of itself against what it is."""
        assert reply.status == 200, f"{reply.status}: {reply.body[:300]!r}"
        body, head = reply.body, len(reply.body)
        if (length := reply.headers.get(LENGTH.lower())) is not None:
            head = int(length)
            assert 0 < head <= len(body), f"{LENGTH} {head} in a body of {len(body)} bytes"
            assert reply.headers["content-type"].startswith("application/octet-stream"), reply.headers["content-type"]
        else:
            assert reply.headers["content-type"].startswith("application/json"), reply.headers["content-type"]
        tree, blob, outputs = strict(body[:head]), body[head:], {}
        assert tree["model_name"] == self.name
        for entry in tree["outputs"]:
            tensor = next((tensor for tensor in self.outputs if tensor.name == entry["name"]), None)
            assert tensor is not None and entry["name"] not in outputs, f"an output {entry['name']!r} that the model has not, or twice"
            assert entry["datatype"] == tensor.datatype and _fits(entry["shape"], tensor.shape), entry
            size = entry.get("parameters", {}).get("binary_data_size")
            if size is None:
                outputs[tensor.name] = _from_json(tensor, entry)
            else:
                assert "data" not in entry and size <= len(blob), f"{tensor.name}: {size} bytes where the body has {len(blob)} left"
                outputs[tensor.name] = unpacked(tensor, entry["shape"], blob[:size])
                blob = blob[size:]
        assert blob == b"", f"{len(blob)} bytes belong to no output"
        return Answer(tree, outputs)


def discovered(target: Target, name: str | None) -> Model:
    """The model of this name, else the first of the repository's index."""
    about = target.get("/v2").json()
    extensions = tuple(about["extensions"])
    if name is None:
        if "model_repository" not in extensions:
            pytest.skip("/v2 does not list model_repository, so the suite must be told: --model NAME")
        name = next(row["name"] for row in target.ask("POST", "/v2/repository/index", b"{}").json() if row["state"] == "READY")
    config = target.get(f"/v2/models/{name}/config")
    return Model(target, name, target.get(f"/v2/models/{name}").json(), config.json() if config.status == 200 else {}, extensions)


def framed(tree: Any, blobs: Sequence[bytes] = ()) -> tuple[bytes, dict[str, str]]:
    """Body and headers. `tree`: bytes go as they are."""
    head = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    if not blobs:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *blobs]), {"Content-Type": "application/octet-stream", LENGTH: str(len(head))}


def packed(tensor: Tensor, values: np.ndarray) -> bytes:
    if tensor.datatype != "BYTES":
        return values.astype(tensor.dtype).tobytes()
    return b"".join(struct.pack("<I", len(text)) + text for text in values.ravel())


def unpacked(tensor: Tensor, shape: Sequence[int], blob: bytes) -> np.ndarray:
    if tensor.datatype != "BYTES":
        assert len(blob) == math.prod(shape) * tensor.dtype.itemsize, f"{tensor.name}: {len(blob)} bytes for {tensor.datatype} {shape}"
        return np.frombuffer(blob, tensor.dtype).reshape(shape)
    texts = []
    while blob:
        (size,) = struct.unpack_from("<I", blob)
        assert 4 + size <= len(blob)
        texts.append(blob[4 : 4 + size])
        blob = blob[4 + size :]
    assert len(texts) == math.prod(shape)
    return np.array(texts, object).reshape(shape)


def same(left: Answer, right: Answer) -> None:
    """To the bit."""
    assert list(left.outputs) == list(right.outputs)
    for name, values in left.outputs.items():
        np.testing.assert_array_equal(values, right.outputs[name], err_msg=name)


def close(left: np.ndarray, right: np.ndarray) -> bool:
    """As equal as a row is to itself when it is computed in a batch of another size."""
    if left.dtype.kind != "f" or left.shape != right.shape:
        return left.shape == right.shape and bool((left == right).all())
    tolerance = 1e-2 if left.dtype.itemsize == 2 else 1e-4
    scale = max(float(np.abs(right.astype(np.float64)).max(initial=0)), 1e-6) if np.isfinite(right).all() else 1.0
    return bool(np.allclose(left.astype(np.float64), right.astype(np.float64), rtol=0, atol=tolerance * scale, equal_nan=True))


def _values(tensor: Tensor, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    match tensor.datatype:
        case "BOOL":
            return rng.integers(0, 2, shape).astype(bool)
        case "BYTES":
            return np.array([b"%d" % number for number in rng.integers(0, 10_000, math.prod(shape))], object).reshape(shape)
        case "BF16":
            return (rng.normal(size=shape).astype("<f4").view("<u4") >> 16).astype("<u2")
        case "FP16" | "FP32" | "FP64":
            return rng.normal(size=shape).astype(tensor.dtype)
    return rng.integers(0, 100, shape).astype(tensor.dtype)


def _from_json(tensor: Tensor, entry: Mapping[str, Any]) -> np.ndarray:
    assert tensor.datatype not in NO_JSON, f"{tensor.name}: {tensor.datatype} has no JSON form"
    flat, kinds = np.array(entry["data"], object).ravel().tolist(), {"BOOL": {bool}, "BYTES": {str}}.get(tensor.datatype, {int, float} if tensor.real else {int})
    assert len(flat) == math.prod(entry["shape"]) and set(map(type, flat)) <= kinds, f"{tensor.name}: data of another size or type than {entry['shape']} {tensor.datatype}"
    values = [text.encode() for text in flat] if tensor.datatype == "BYTES" else flat
    return np.array(values, tensor.dtype).reshape(entry["shape"])


def _fits(shape: Sequence[int], declared: Sequence[int]) -> bool:
    return len(shape) == len(declared) and all(size >= 0 and want in (-1, size) for size, want in zip(shape, declared, strict=True))
