"""Random requests to a real data port, and what the two ways through it have to say to each of them.

The conformance suite cuts, damages and invents bytes of HTTP, and test_protocol.py fuzzes `handle`. Here requests are whole HTTP whose
headers, JSON and tensors are wrong in some way, sent over one connection that stays open: none is answered with a 5xx, none hangs, and the
good request behind each has its answer. The fast lane remembers the JSON it met, so every request is sent twice, and once more on the
slow way: all three have the same answer.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_http import Running, reply
from test_protocol import WEIGHTS, Every

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
LENGTH = "Inference-Header-Content-Length"
SLOW = {"Accept-Encoding": "gzip"}  # which the fast lane does not know; answers this short stay as they are

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["x", "logits", "FP32", "INT64", -1, 0, 1, 2, 3, 24, 1 << 63, 1e308])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=10
)
headers = st.dictionaries(
    st.sampled_from([LENGTH, "Content-Type", "Content-Encoding", "Accept-Encoding", "X-Request-ID", "Accept", "Authorization", "X-API-Key", "Expect", "TE", "Trailer", "Range", "If-Match", "Upgrade-Insecure-Requests"]),
    st.integers(-2, 400).map(str) | st.sampled_from(["", "gzip", "deflate", "identity", "*", "gzip;q=0", "GZIP", "br", "application/json", "100-continue", "x" * 500, "\xff\xfe", "0x10", "1e2", "\u00b2", " 24 "]) | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
    max_size=4,
)  # fmt: skip
numbers = st.lists(st.floats(width=32), min_size=6, max_size=6)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running("tiny@3", "other@1", max_batch=4) as running:
        yield running


@pytest.fixture(scope="module")
def every() -> Iterator[Running]:
    with Running("tiny@3", engine=Every()) as running:
        yield running


class Talk:
    """One connection, opened again where the server ended it."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.sock: socket.socket | None = None

    def ask(self, method: str, path: str, lines: Mapping[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.sock is None:
            self.sock = self.server.connect()
            self.stream = self.sock.makefile("rb")
        named = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("latin-1")
        self.sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n".encode() + named + b"\r\n" + body)
        if self.stream.peek(12).startswith(b"HTTP/1.1 100"):  # which has no length
            self.stream.readline(), self.stream.readline()
        status, fields, said = reply(self.stream)
        if fields.get("connection") == "close":
            self.close()
        return status, fields, said

    def close(self) -> None:
        if self.sock is not None:
            self.stream.close()
            self.sock.close()
            self.sock = None


@pytest.fixture
def talk(server: Running) -> Iterator[Talk]:
    talk = Talk(server)
    yield talk
    talk.close()


X = np.arange(6, dtype=np.float32).reshape(1, 2, 3)


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 2, 3], "datatype": "FP32", "parameters": {"binary_data_size": 24}, **changes}


def framed(tree: Any, blob: bytes = b"") -> tuple[bytes, dict[str, str]]:
    head = json.dumps(tree).encode()
    return head + blob, {LENGTH: str(len(head))}


def below_500(status: int, body: bytes) -> None:
    assert status < 500, body
    if status >= 400:
        assert isinstance(json.loads(body)["error"], str) and set(json.loads(body)) == {"error"}


def goes_on(talk: Talk) -> None:
    """The next good request has its answer."""
    body, lines = framed({"inputs": [entry()], "parameters": {"binary_data_output": True}}, X.tobytes())
    status, fields, said = talk.ask("POST", "/v2/models/tiny/infer", lines, body)
    assert status == 200
    np.testing.assert_allclose(np.frombuffer(said[int(fields[LENGTH.lower()]) :], np.float32), X.reshape(6) @ WEIGHTS, rtol=1e-5)


def alike(talk: Talk, body: bytes, lines: Mapping[str, str], path: str = "/v2/models/tiny/infer") -> tuple[int, bytes]:
    """Status and body of a request that is answered the same when it comes again, and on the slow way."""
    first, again, slowly = (talk.ask("POST", path, more, body) for more in (lines, lines, {**lines, **SLOW}))
    below_500(first[0], first[2])
    assert (first[0], first[2]) == (again[0], again[2]) == (slowly[0], slowly[2])
    goes_on(talk)
    return first[0], first[2]


@FUZZ
@given(
    lines=headers,
    method=st.sampled_from(["POST", "GET", "PUT", "PATCH", "OPTIONS", "DELETE"]),
    action=st.sampled_from(["/infer", "", "/ready", "/stats", "/nothing"]),
    right=st.booleans(),
)
def test_no_headers_are_answered_with_a_5xx_and_the_next_request_is_answered(
    talk: Talk, lines: dict[str, str], method: str, action: str, right: bool
) -> None:
    body, length = framed({"inputs": [entry()]}, X.tobytes())
    status, _, said = talk.ask(method, f"/v2/models/tiny{action}", {**lines, **(length if right else {})}, body)
    below_500(status, said)
    goes_on(talk)


@FUZZ
@given(data=st.data())
def test_whatever_stands_in_the_json_of_a_binary_request_both_ways_say_the_same(talk: Talk, data: st.DataObject) -> None:
    tree = {
        "inputs": [entry()],
        "id": "i",
        "parameters": {"binary_data_output": True, "priority": 0},
        "outputs": [{"name": "logits", "parameters": {"binary_data": True, "classification": 0}}],
    }
    holders: list[Any] = [
        tree,
        tree["inputs"],
        tree["inputs"][0],
        tree["inputs"][0]["parameters"],
        tree["inputs"][0]["shape"],
        tree["parameters"],
        tree["outputs"],
        tree["outputs"][0],
        tree["outputs"][0]["parameters"],
    ]
    for _ in range(data.draw(st.integers(1, 3))):
        holder = data.draw(st.sampled_from(holders))
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))))
        if data.draw(st.booleans()):
            holder[key] = data.draw(values)
        elif isinstance(holder, dict):
            holder[
                data.draw(
                    st.sampled_from(["data", "datatype", "shape", "parameters", "binary_data_size", "classification", "timeout_", "raw"])
                )
            ] = data.draw(values)
    alike(talk, *framed(tree, X.tobytes()))


@FUZZ
@given(
    shape=st.lists(st.integers(-2, 5) | st.sampled_from([1 << 31, 1 << 62]), max_size=4),
    size=st.integers(-5, 130),
    blob=st.binary(max_size=130),
    shift=st.integers(-3, 3),
    copies=st.integers(1, 2),
)
def test_sizes_shapes_and_lengths_that_do_not_fit_are_refused_alike_on_both_ways(
    talk: Talk, shape: list[int], size: int, blob: bytes, shift: int, copies: int
) -> None:
    body, lines = framed({"inputs": [entry(shape=shape, parameters={"binary_data_size": size})] * copies}, blob)
    status, _ = alike(talk, body, lines)
    if status == 200:
        assert size == len(blob) == int(np.prod(shape)) * 4 and copies == 1
    alike(talk, body, {LENGTH: str(int(lines[LENGTH]) + shift)})


@FUZZ
@given(number=numbers, json_number=numbers, model=st.sampled_from(["tiny", "other", "tiny/versions/3", "tiny/versions/4", "none"]))
def test_numbers_of_every_kind_are_answered_or_refused_alike_on_both_ways(
    talk: Talk, number: list[float], json_number: list[float], model: str
) -> None:
    x = np.array(number, np.float32)
    body, lines = framed({"inputs": [entry()], "parameters": {"binary_data_output": True}}, x.tobytes())
    status, _ = alike(talk, body, lines, f"/v2/models/{model}/infer")
    here = model not in ("none", "tiny/versions/4")
    assert status == (200 if here and np.isfinite(x).all() else 400 if here else 404)
    status, _, said = talk.ask(
        "POST", f"/v2/models/{model}/infer", {}, json.dumps({"inputs": [entry(data=json_number, parameters={})]}).encode()
    )
    below_500(status, said)
    goes_on(talk)


@FUZZ
@given(
    sizes=st.lists(st.integers(0, 12), min_size=12, max_size=12),
    order=st.permutations(range(12)),
    blob=st.binary(min_size=60, max_size=400),
    least=st.booleans(),
)
def test_twelve_tensors_of_any_sizes_in_any_order_are_answered_or_refused_alike_on_both_ways(
    every: Running, sizes: list[int], order: list[int], blob: bytes, least: bool
) -> None:
    tensors = [every.models.pick("tiny").inputs[index] for index in order]
    names = {"bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64"}
    inputs, total = [], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        elements = max(1, size) if least else size
        nbytes = elements * np.dtype(tensor.dtype).itemsize
        inputs.append(
            {
                "name": tensor.name,
                "shape": [1, elements],
                "datatype": names.get(tensor.dtype, tensor.dtype.upper()),
                "parameters": {"binary_data_size": nbytes},
            }
        )
        total += nbytes
    talk = Talk(every)
    try:
        body, lines = framed({"inputs": inputs, "parameters": {"binary_data_output": True}}, (blob * 20)[:total])
        first, again, slowly = (
            talk.ask("POST", "/v2/models/tiny/infer", more, body) for more in (lines, lines, {**lines, "Accept-Encoding": "identity;q=1"})
        )
        below_500(first[0], first[2])
        assert (first[0], first[2]) == (again[0], again[2]) == (slowly[0], slowly[2])
    finally:
        talk.close()
