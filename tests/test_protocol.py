"""The protocol, spoken to `handle` directly: a small numpy engine behind the real batcher, no HTTP and no Ray."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from portaisys.engine import Tensor
from portaisys.serve import codec, protocol
from portaisys.serve.batcher import Batcher
from portaisys.serve.model import ServedModel
from portaisys.serve.repository import of_models

WEIGHTS = np.arange(24, dtype=np.float32).reshape(6, 4) / 10
INFER = "/v2/models/tiny/infer"
HEADER = "Inference-Header-Content-Length"


class Linear:
    """x [-1, 2, 3] float32 -> logits [-1, 4] float32."""

    backend, precision, device = "numpy", "fp32", "cpu"
    inputs = (Tensor("x", "float32", (-1, 2, 3)),)
    outputs = (Tensor("logits", "float32", (-1, 4)),)

    def run(self, feeds: Any) -> dict[str, Any]:
        if (feeds["x"] == 13).all():
            raise OSError("/secret/model.onnx at 10.0.0.7: broken")
        with np.errstate(over="ignore", invalid="ignore"):
            return {"logits": feeds["x"].reshape(-1, 6) @ WEIGHTS}

    def close(self) -> None: ...


class Every(Linear):
    """Gives every input back as an output."""

    TYPES = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
    inputs = tuple(Tensor(name, name, (-1, -1)) for name in TYPES)
    outputs = inputs

    def run(self, feeds: Any) -> dict[str, Any]:
        return dict(feeds)


class Server:
    """`handle` on a loop of its own, called as a function."""

    def __init__(self, engine: Any = None, **limits: Any) -> None:
        self.runner = asyncio.Runner()
        engine = engine or Linear()
        self.batcher = Batcher(engine.run, **{"max_batch": 4, "max_queue": 16, **limits})
        lineage = {"digest": "d" * 64, "serving": {"precision": "fp32"}}
        self.model = ServedModel("tiny", "3", engine, self.batcher, ("cat", "dog", "eel", "fox"), lineage)
        self.models = of_models(self.model)

    def __call__(self, path: str, body: bytes = b"", headers: dict[str, str] | None = None, method: str | None = None) -> protocol.Response:
        method = method or ("POST" if path.endswith("infer") else "GET")
        return self.runner.run(protocol.handle(method, path, headers or {}, body, self.models))

    def close(self) -> None:
        self.runner.run(self.model.close())
        self.runner.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def valid(batch: int = 1, **changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [batch, 2, 3], "datatype": "FP32", "data": [1.0] * 6 * batch, **changes}]}


def post(server: Server, tree: Any, blob: bytes = b"", **headers: str) -> protocol.Response:
    head = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return server(INFER, head + blob, {HEADER: str(len(head)), **headers} if blob else headers)


def says(response: protocol.Response, status: int) -> str:
    """The error of a reply that must be exactly an error reply."""
    tree = json.loads(response.body)
    assert (response.status, list(tree)) == (status, ["error"]), (response.status, tree)
    return str(tree["error"])


# --- the routes ---------------------------------------------------------------------------------------------------


def test_health_and_server_metadata_are_what_the_clients_read(server: Server) -> None:
    assert json.loads(server("/v2/health/live").body) == {"live": True}
    assert json.loads(server("/v2/health/ready").body) == {"ready": True}
    about = json.loads(server("/v2").body)
    assert set(about) == {"name", "version", "extensions", "ports"} and "binary_tensor_data" in about["extensions"]
    assert "statistics" in about["extensions"]  # which perf_analyzer then asks for


@pytest.mark.parametrize("prefix", ["/v2/models/tiny", "/v2/models/tiny/versions/3"])
def test_a_model_describes_itself_with_and_without_version(server: Server, prefix: str) -> None:
    about = json.loads(server(prefix).body)
    assert about["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2, 3]}] and about["versions"] == ["3"]
    assert about["outputs"][0]["parameters"]["labels"] == ["cat", "dog", "eel", "fox"]
    config = json.loads(server(f"{prefix}/config").body)
    assert config["max_batch_size"] == 4 and config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [2, 3]}]
    assert json.loads(server(f"{prefix}/ready").body) == {"ready": True}
    assert json.loads(server(f"{prefix}/lineage").body)["digest"] == "d" * 64


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/v1", "/v2/", "//v2", "/v2/models", "/v2/models/", "/v2/models/other", "/v2/models/tiny/", "/v2/models/tiny/statistics",
        "/v2/models/tiny/versions/4", "/v2/models/tiny/versions/3/infer/x", "/v2/models/../tiny", "/v2/models/%2e%2e/infer",
        "/v2/models/t\u0131ny", "/v2/models/tiny\x00", "/v2/models/" + "a" * 10_000, "/v2/models//etc/passwd", "/v2/health/" + "/" * 1000,
    ],
)  # fmt: skip
def test_whatever_does_not_exist_is_404_and_is_not_repeated(server: Server, path: str) -> None:
    message = says(server(path), 404)
    assert "/" not in message and len(message) < 200


def test_a_wrong_method_is_405_and_names_the_right_one(server: Server) -> None:
    assert server("/v2/models/tiny", method="DELETE").headers["Allow"] == "GET"
    assert server(INFER, method="GET").headers["Allow"] == "POST"
    assert "POST" in says(server(INFER, method="PATCH"), 405)


# --- good requests ------------------------------------------------------------------------------------------------


def test_flat_and_nested_data_mean_the_same_and_the_id_comes_back(server: Server) -> None:
    flat = post(server, {**valid(data=[1, 2, 3, 4, 5, 6.5]), "id": ""})
    nested = post(server, {**valid(data=[[[1, 2, 3], [4, 5, 6.5]]]), "id": ""})
    assert flat.body == nested.body and flat.status == 200
    tree = json.loads(flat.body)
    assert (tree["model_name"], tree["model_version"], tree["id"]) == ("tiny", "3", "")
    expected = np.array([[1, 2, 3, 4, 5, 6.5]], np.float32) @ WEIGHTS
    assert tree["outputs"][0] | {"data": 0} == {"name": "logits", "datatype": "FP32", "shape": [1, 4], "data": 0}
    np.testing.assert_allclose(tree["outputs"][0]["data"], expected[0], rtol=1e-6)
    assert "id" not in json.loads(post(server, valid()).body)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclients_own_bytes_are_understood_and_understand_ours(server: Server, binary_in: bool, binary_out: bool, compression: str | None) -> None:
    x = np.random.default_rng(0).normal(size=(16, 2, 3)).astype(np.float32)
    tensor = InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary_in)
    body, head = InferenceServerClient.generate_request_body([tensor], outputs=[InferRequestedOutput("logits", binary_data=binary_out)], request_id="r")
    headers = {HEADER: str(head)} if head else {}
    if compression:
        body = gzip.compress(body) if compression == "gzip" else zlib.compress(body)
        headers |= {"Content-Encoding": compression, "Accept-Encoding": compression}
    reply = server(INFER, body, headers)
    assert reply.status == 200 and (HEADER in reply.headers) == binary_out
    length = int(reply.headers[HEADER]) if binary_out else None
    result = InferenceServerClient.parse_response_body(reply.body, header_length=length, content_encoding=reply.headers.get("Content-Encoding"))
    np.testing.assert_allclose(result.as_numpy("logits"), x.reshape(-1, 6) @ WEIGHTS, rtol=1e-5)
    assert result.get_response()["id"] == "r"


def test_a_long_reply_is_compressed_only_for_those_who_ask() -> None:
    server = Server(max_batch=64, max_queue=64)
    plain = post(server, valid(64))
    packed = post(server, valid(64), **{"accept-encoding": "br, gzip"})
    assert "Content-Encoding" not in plain.headers and packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    server.close()


def test_a_raw_body_is_one_sample_and_answered_in_binary(server: Server) -> None:
    x = np.arange(6, dtype="<f4")
    reply = server(INFER, x.tobytes(), {HEADER: "0"})
    head = int(reply.headers[HEADER])
    assert json.loads(reply.body[:head])["outputs"][0]["parameters"] == {"binary_data_size": 16}
    np.testing.assert_allclose(np.frombuffer(reply.body[head:], "<f4"), x @ WEIGHTS, rtol=1e-6)
    assert "24" in says(server(INFER, x.tobytes() + b"1", {HEADER: "0"}), 400)
    says(server(INFER, b"", {HEADER: "0"}), 400)


def test_classification_gives_the_best_labels_as_triton_writes_them(server: Server) -> None:
    for binary in (True, False):
        tensor = InferInput("x", [2, 2, 3], "FP32")
        tensor.set_data_from_numpy(np.ones((2, 2, 3), np.float32))
        body, head = InferenceServerClient.generate_request_body([tensor], outputs=[InferRequestedOutput("logits", binary, class_count=2)])
        reply = server(INFER, body, {HEADER: str(head)})
        length = int(reply.headers[HEADER]) if binary else None
        texts = InferenceServerClient.parse_response_body(reply.body, header_length=length).as_numpy("logits").astype(str)
        assert texts.shape == (2, 2) and [text.split(":")[1:] for text in texts[0]] == [["3", "fox"], ["2", "eel"]]
        assert float(texts[0][0].split(":")[0]) == pytest.approx(WEIGHTS[:, 3].sum())


@pytest.mark.parametrize("binary", [True, False])
def test_every_datatype_survives_both_ways(binary: bool) -> None:
    server = Server(Every())
    inputs, blobs = [], b""
    for tensor in Every.inputs:
        values = np.array([[0, 1, 1]]).astype(tensor.dtype) if tensor.dtype == "bool" else np.array([[0, 1, 100]]).astype(tensor.dtype)
        entry: dict[str, Any] = {"name": tensor.name, "shape": [1, 3], "datatype": codec.DATATYPES[tensor.dtype].name}
        if binary or tensor.dtype == "float16":
            entry["parameters"] = {"binary_data_size": values.nbytes}
            blobs += values.tobytes()
        else:
            entry["data"] = values.tolist()
        inputs.append(entry)
    outputs = [{"name": name, "parameters": {"binary_data": binary or name == "float16"}} for name in Every.TYPES]
    reply = post(server, {"inputs": inputs, "outputs": outputs}, blobs)
    assert reply.status == 200, reply.body
    result = InferenceServerClient.parse_response_body(reply.body, header_length=int(reply.headers[HEADER]))
    for tensor in Every.inputs:
        assert result.as_numpy(tensor.name).tolist() == [[0, 1, 1 if tensor.dtype == "bool" else 100]]
        assert result.as_numpy(tensor.name).dtype == tensor.dtype
    server.close()


def test_fp16_has_no_json_form_either_way() -> None:
    server = Server(Every())
    half = {"name": "float16", "shape": [1, 1], "datatype": "FP16", "data": [1.0]}
    assert "binary" in says(post(server, {"inputs": [half]}), 400)
    server.close()


# --- bad requests -------------------------------------------------------------------------------------------------

BAD_TREES: dict[str, Any] = {
    "not json": b"{",
    "empty": b"",
    "not utf-8": b'{"id": "\xff"}',
    "null bytes": b"\x00" * 100,
    "a list": [],
    "a number": 7,
    "depth 100,000": b"[" * 100_000,
    "closed depth 100,000": b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "integer of 5,000 digits": b'{"inputs": [{"name": "x", "shape": [' + b"9" * 5000 + b', 2, 3], "datatype": "FP32", "data": []}]}',
    "no inputs": {},
    "inputs not a list": {"inputs": {"name": "x"}},
    "an input not an object": {"inputs": [["x"]]},
    "unknown input": valid(name="y"),
    "name not a string": valid(name=["x"]),
    "input twice": {"inputs": valid()["inputs"] * 2},
    "one input too many": {"inputs": [*valid()["inputs"], {**valid()["inputs"][0], "name": "y"}]},
    "wrong datatype": valid(datatype="FP64"),
    "unknown datatype": valid(datatype="FP33"),
    "BYTES": valid(datatype="BYTES", data=["a"] * 6),
    "rank too low": valid(shape=[1, 6]),
    "rank too high": valid(shape=[1, 1, 2, 3]),
    "wrong dim": valid(shape=[1, 3, 2]),
    "negative dim": valid(shape=[-1, 2, 3]),
    "two negative dims": valid(shape=[1, -2, -3]),
    "zero dim": valid(shape=[0, 2, 3], data=[]),
    "huge dim": valid(shape=[10**30, 2, 3]),
    "dim not an integer": valid(shape=[1.0, 2, 3]),
    "dim a bool": valid(shape=[True, 2, 3]),
    "shape missing": valid(shape=None),
    "too few elements": valid(data=[1.0] * 5),
    "too many elements": valid(data=[1.0] * 7),
    "no data": valid(data=None),
    "data a string": valid(data="123456"),
    "data an object": valid(data={"0": 1}),
    "an element a string": valid(data=["1", 1, 1, 1, 1, 1]),
    "an element null": valid(data=[None, 1, 1, 1, 1, 1]),
    "an element a bool": valid(data=[True, 1, 1, 1, 1, 1]),
    "an element a list": valid(data=[1, 1, 1, 1, 1, [1]]),
    "ragged": valid(data=[[[1, 1, 1, 1], [1, 1]]]),
    "NaN": b'{"inputs":[{"name":"x","shape":[1,2,3],"datatype":"FP32","data":[NaN,1,1,1,1,1]}]}',
    "infinity by overflow": b'{"inputs":[{"name":"x","shape":[1,2,3],"datatype":"FP32","data":[1e999,1,1,1,1,1]}]}',
    "beyond FP32": valid(data=[1e39, 1, 1, 1, 1, 1]),
    "huge integer": valid(data=[10**400, 1, 1, 1, 1, 1]),
    "id not a string": {**valid(), "id": 7},
    "parameters not an object": {**valid(), "parameters": []},
    "binary_data_output not a bool": {**valid(), "parameters": {"binary_data_output": 1}},
    "timeout negative": {**valid(), "parameters": {"timeout": -1}},
    "unknown output": {**valid(), "outputs": [{"name": "probabilities"}]},
    "output twice": {**valid(), "outputs": [{"name": "logits"}] * 2},
    "negative classes": {**valid(), "outputs": [{"name": "logits", "parameters": {"classification": -1}}]},
    "shared memory": {**valid(), "outputs": [{"name": "logits", "parameters": {"shared_memory_region": "r"}}]},
    "binary size without blob": valid(parameters={"binary_data_size": 24}),
    "more samples than the queue": valid(17),
}


@pytest.mark.parametrize("what", BAD_TREES)
def test_a_bad_request_is_400_with_a_reason_and_the_next_one_is_answered(server: Server, what: str) -> None:
    message = says(post(server, BAD_TREES[what]), 400)
    assert "/" not in message and "Traceback" not in message and len(message) < 200
    assert post(server, valid()).status == 200


@pytest.mark.parametrize(
    ("what", "size", "blob", "header"),
    [
        ("blob short of the shape", 20, b"\0" * 20, None), ("blob beyond the shape", 28, b"\0" * 28, None), ("bytes left over", 24, b"\0" * 25, None),
        ("size beyond the body", 24, b"\0" * 23, None), ("negative size", -1, b"\0" * 24, None), ("size not an integer", 24.0, b"\0" * 24, None),
        ("header beyond the body", 24, b"\0" * 24, "100000"), ("header inside the JSON", 24, b"\0" * 24, "10"), ("negative header", 24, b"\0" * 24, "-1"),
        ("header not a number", 24, b"\0" * 24, "0x10"), ("header of other digits", 24, b"\0" * 24, "\u0661"), ("header of 5,000 digits", 24, b"\0" * 24, "9" * 5000),
        ("binary NaN", 24, np.full(6, np.nan, "<f4").tobytes(), None),
    ],
)  # fmt: skip
def test_binary_framing_that_does_not_add_up_is_400(server: Server, what: str, size: Any, blob: bytes, header: str | None) -> None:
    tree = valid(parameters={"binary_data_size": size})
    del tree["inputs"][0]["data"]
    says(post(server, tree, blob, **({HEADER: header} if header else {})), 400)
    assert post(server, valid()).status == 200


def test_inputs_of_different_batch_are_400() -> None:
    server = Server(Every())
    inputs = [{"name": t.name, "shape": [1 + (t.name == "int8"), 1], "datatype": codec.DATATYPES[t.dtype].name} for t in Every.inputs]
    sizes = [np.dtype(t.dtype).itemsize * (1 + (t.name == "int8")) for t in Every.inputs]
    entries = [{**entry, "parameters": {"binary_data_size": size}} for entry, size in zip(inputs, sizes, strict=True)]
    assert "batch" in says(post(server, {"inputs": entries}, b"\0" * sum(sizes)), 400)
    assert "missing" in says(post(server, {"inputs": entries[:2]}, b"\0" * sum(sizes[:2])), 400)
    server.close()


def test_a_bool_byte_of_two_is_400() -> None:
    tensor = (Tensor("b", "bool", (-1, 1)),)
    with pytest.raises(codec.RefusedError, match="0 or 1"):
        codec.decode({HEADER.lower(): "0"}, b"\x02", tensor, tensor)


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_compressed_bodies_that_lie_are_4xx_and_cheap(server: Server, name: str) -> None:
    pack = gzip.compress if name == "gzip" else zlib.compress
    good = pack(json.dumps(valid()).encode())
    encoding = {"Content-Encoding": name}
    assert server(INFER, good, encoding).status == 200
    bomb = pack(b" " * (codec.MAX_BODY_BYTES * 4))
    started = time.monotonic()
    assert "uncompressed" in says(server(INFER, bomb, encoding), 413)
    assert time.monotonic() - started < 5 and len(bomb) < 2 << 20
    for body in (good[:-4], good + b"x", b"", b"not it", good[:10]):
        says(server(INFER, body, encoding), 400)
    says(server(INFER, good, {"Content-Encoding": "br"}), 400)


def test_a_body_or_json_above_the_limit_is_413(server: Server) -> None:
    says(server(INFER, bytes(codec.MAX_BODY_BYTES + 1)), 413)
    assert "binary" in says(server(INFER, b" " * (codec.MAX_JSON_BYTES + 1)), 413)


def test_an_answer_json_cannot_carry_is_refused_with_the_way_out(server: Server) -> None:
    big = valid(data=[3e38] * 6)
    assert "binary_data" in says(post(server, big), 400)
    assert post(server, {**big, "parameters": {"binary_data_output": True}}).status == 200


# --- when the server is the problem -------------------------------------------------------------------------------


def test_an_engine_failure_is_a_500_that_leaks_nothing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    message = says(post(server, valid(data=[13] * 6)), 500)
    assert "secret" not in message and "/" not in message and "10.0.0.7" not in message
    assert "secret" in caplog.text  # the log has the cause
    assert post(server, valid()).status == 200


class Held(Linear):
    """Runs only when it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def run(self, feeds: Any) -> dict[str, Any]:
        assert self.go.wait(20)
        return super().run(feeds)


def test_a_full_queue_is_503_and_says_when_to_come_back() -> None:
    engine = Held()
    server = Server(engine, max_batch=4, max_queue=4)

    async def scene() -> protocol.Response:
        body = json.dumps(valid(3)).encode()
        waiting = []
        for _ in range(2):  # one in the engine, one in the queue
            waiting.append(asyncio.create_task(protocol.handle("POST", INFER, {}, body, server.models)))
            while not server.batcher.busy_s() or len(waiting) == 2 > server.batcher.queued:
                await asyncio.sleep(0)
        refused = await protocol.handle("POST", INFER, {}, body, server.models)
        engine.go.set()
        assert [reply.status for reply in await asyncio.gather(*waiting)] == [200, 200]
        return refused

    refused = server.runner.run(scene())
    says(refused, 503)
    assert int(refused.headers["Retry-After"]) >= 1 and server.model.stats.rejected == {"queue_full": 1}
    server.close()


def test_the_requests_own_timeout_fires_while_it_waits_and_while_it_runs() -> None:
    engine = Held()
    server = Server(engine)
    for _ in range(2):  # the first is in the engine, the second behind it
        assert "timeout" in says(post(server, {**valid(), "parameters": {"timeout": 1000}}), 503)
    assert server.batcher.queued == 0 and server.model.stats.rejected == {"timeout": 2}
    engine.go.set()
    server.close()


def test_a_closed_model_is_not_ready_and_503() -> None:
    server = Server()
    server.runner.run(server.model.close())
    for path in ("/v2/health/ready", "/v2/models/tiny/ready", INFER):
        says(server(path), 503)
    assert server("/v2/health/live").status == 200
    server.close()


# --- fuzz: whatever comes in, the reply is well formed and below 500 ----------------------------------------------

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["x", "logits", "FP32", -1, 0, 1, 2, 3])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=12)
lengths = st.integers(-2, 400).map(str) | st.text(max_size=6)


def well_formed(response: protocol.Response) -> None:
    assert response.status < 500, response.body
    if response.status >= 400:
        assert isinstance(json.loads(response.body)["error"], str)


@FUZZ
@given(
    method=st.sampled_from(["GET", "POST", "PUT"]),
    parts=st.lists(st.sampled_from(["v2", "models", "tiny", "versions", "3", "infer", "ready", "..", ""]) | st.text(max_size=5), max_size=7),
    headers=st.dictionaries(st.sampled_from([HEADER, "Content-Encoding", "Accept-Encoding"]) | st.text(max_size=5), lengths, max_size=3),
    body=st.binary(max_size=60),
)
def test_any_method_path_headers_and_bytes(server: Server, method: str, parts: list[str], headers: dict[str, str], body: bytes) -> None:
    well_formed(server("/" + "/".join(parts), body, headers, method))
    well_formed(server(INFER, body, headers, method))


@FUZZ
@given(st.data())
def test_any_json_in_place_of_any_field(server: Server, data: st.DataObject) -> None:
    tree = {**valid(), "id": "i", "parameters": {"binary_data_output": False, "timeout": 0}, "outputs": [{"name": "logits", "parameters": {"classification": 2}}]}
    holders: list[Any] = [tree, tree["inputs"][0], tree["parameters"], tree["outputs"][0], tree["outputs"][0]["parameters"], tree["inputs"][0]["data"]]
    for _ in range(data.draw(st.integers(1, 3))):
        holder = data.draw(st.sampled_from(holders))
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))))
        if key != "timeout":  # a short one is rightly 503
            holder[key] = data.draw(values)
    well_formed(post(server, tree))
    assert post(server, valid()).status == 200


@FUZZ
@given(shape=st.lists(st.integers(-2, 7), max_size=4), size=st.integers(-5, 100), blob=st.binary(max_size=60), header=lengths | st.none())
def test_any_binary_framing(server: Server, shape: list[int], size: int, blob: bytes, header: str | None) -> None:
    head = json.dumps({"inputs": [{"name": "x", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": size}}]}).encode()
    response = server(INFER, head + blob, {HEADER: str(len(head)) if header is None else header})
    well_formed(response)
    if response.status == 200:
        assert math.prod(shape) * 4 == size == len(blob)
