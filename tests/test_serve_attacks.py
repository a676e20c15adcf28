"""Attacks on a replica over its own ports: what is refused, that nothing leaks or is written, and that memory stays flat.

The server is a process of its own, so that its memory is its own. How many ways to write a wrong request there are is the matter of
conformance/ and test_serve_fuzz.py; here each kind of attack is repeated and its memory is held against a bound.
"""

from __future__ import annotations

import gzip
import json
import pickle
import re
import socket
import subprocess
import sys
import textwrap
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from conformance.test_connections import SECOND, SMUGGLED
from onnx import TensorProto
from published import FEATURES, Shelf, descriptors, linear, reset_peak, rss_kib, weights_of
from test_http import Running, raw, reply
from test_keys import ROUTES
from tritonclient.grpc import InferenceServerClient, service_pb2
from tritonclient.utils import InferenceServerException

from portaisys.serve.core import Core
from portaisys.serve.grpc import SERVICE
from portaisys.serve.http import Bounds, Connection
from portaisys.serve.keys import add_key

# MLflow's own, of sqlalchemy's and others' ways that will go.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

HERE = Path(__file__).parent
INFER = "/v2/models/linear/infer"
X = np.random.default_rng(0).normal(size=(1, 2, 3)).astype(np.float32)

_SERVER = """
    import json, sys
    from conformance import own
    from portaisys.serve.core import Core, Listen
    from portaisys.serve.repository import Repository

    core = Core(Repository(own.opened, own.expanded), ("linear@7,3", "every@1"), Listen(http_port=0, grpc_port=0, keys=sys.argv[1])).start()
    print(json.dumps(core.ports), flush=True)
    sys.stdin.read()
    core.stop(drain_s=1)
"""


class Victim:
    """The server as its attackers see it, and its memory."""

    def __init__(self, pid: int, ports: dict[str, int], key: str = "") -> None:
        self.pid, self.ports, self.key = pid, ports, key
        self.keyed = f"Authorization: Bearer {key}\r\n" if key else ""

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.ports["http"]), timeout=30)

    def refuses(self, *pieces: bytes, repeat: int = 1) -> int:
        """The status of the answer to these bytes, which is a refusal with an error; 0 where the connection was ended instead."""
        with self.connect() as sock:
            try:
                for _ in range(repeat):
                    for piece in pieces:
                        sock.sendall(piece)
                status, _, body = reply(sock.makefile("rb"))
            except (ConnectionError, IndexError):
                return 0  # a refusal may be lost where the server closes before everything was sent
        assert 400 <= status < 500 and set(json.loads(body)) == {"error"}, (status, body[:200])
        return status

    def is_well(self) -> None:
        with self.connect() as sock:
            sock.sendall(raw(X, path=INFER, headers=self.keyed))
            status, headers, _ = reply(sock.makefile("rb"))
        assert status == 200 and headers["x-portaisys-lineage"].startswith("linear/7 ")


def victim(*arguments: str, key: str = "") -> Iterator[Victim]:
    command = [sys.executable, "-c", textwrap.dedent(_SERVER), *arguments]
    process = subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdin is not None and process.stdout is not None
    said = process.stdout.readline()
    assert said, "the server did not start"
    yield Victim(process.pid, json.loads(said), key)
    process.stdin.close()
    assert process.wait(30) == 0
    process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Victim]:
    yield from victim("")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    key = add_key(file, "all")
    yield from victim(str(file), key=key)


def stays_flat(server: Victim, attack: Callable[[], object], *, times: int, peak_mib: float, left_mib: float = 4.0) -> None:
    """After two attacks that warm the allocator, `times` more take at most `peak_mib` while they last and leave at most `left_mib`."""
    for _ in range(2):
        attack()
    server.is_well()
    before, open_before = rss_kib(server.pid), len(descriptors(server.pid))
    reset_peak(server.pid)
    for _ in range(times):
        attack()
        server.is_well()
    peak, left = (rss_kib(server.pid, peak=True) - before) / 1024, (rss_kib(server.pid) - before) / 1024
    print(f"peak {peak:.1f} MiB, left {left:.1f} MiB")
    assert peak <= peak_mib and left <= left_mib, f"peak {peak:.1f} MiB, left {left:.1f} MiB"
    assert len(descriptors(server.pid)) <= open_before + 1  # a connection of the attack's may just be going


# --- oversized and malformed ------------------------------------------------------------------------------------------

POST = f"POST {INFER} HTTP/1.1\r\nHost: a\r\n".encode()
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
MEGABYTE = b"a" * (1 << 20)


def posted(body: bytes, headers: bytes = b"") -> bytes:
    return POST + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def tree(data: object = (1.0,) * 6, **changes: object) -> bytes:
    return json.dumps({"inputs": [{"name": "x", "shape": [1, 2, 3], "datatype": "FP32", "data": data, **changes}]}).encode()


def bomb(encoding: str, megabytes: int = 2048) -> bytes:
    """So many zeros, made of one megabyte's."""
    packer = zlib.compressobj(9, wbits=-15)
    once = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    start, end = (b"\x1f\x8b\x08\0\0\0\0\0\0\xff", bytes(8)) if encoding == "gzip" else (b"\x78\xda", bytes(4))
    return start + once * megabytes + b"\3\0" + end


# What is sent (once, then so many times), the status, and MiB that the server may take meanwhile. A body may be 64 MiB, JSON 16 MiB of it.
OVERSIZED: dict[str, tuple[bytes, bytes, int, set[int], float]] = {
    "a million chunks of one byte": (CHUNKED, b"1\r\n \r\n" * 10_000, 100, {400}, 12),
    "over a million chunks of two bytes": (CHUNKED, b"2\r\n  \r\n" * 10_000, 130, {400}, 24),
    "a Content-Length of 4 GB": (POST + b"Content-Length: 4294967296\r\n\r\n", b"", 0, {413}, 2),
    "a chunk of 4 GB": (CHUNKED + b"100000000\r\n", MEGABYTE, 80, {413, 0}, 80),
    "a header without an end": (b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: ", MEGABYTE, 80, {431, 0}, 4),
    "a header's name without an end": (b"GET /v2 HTTP/1.1\r\nHost: a\r\nX", MEGABYTE, 80, {431, 0}, 4),
    "a trailer without an end": (CHUNKED + b"1\r\n \r\n0\r\nX: ", MEGABYTE, 80, {431, 0}, 4),
    "a URL without an end": (b"GET /", MEGABYTE, 80, {414, 431, 0}, 4),
    "a chunk's extension without an end": (CHUNKED + b"1;", MEGABYTE, 80, {400, 0}, 4),
    "empty lines without an end": (b"", b"\r\n" * (1 << 19), 20, {400, 431, 0}, 4),
    "a gzip bomb of 2 GB": (posted(bomb("gzip"), b"Content-Encoding: gzip\r\n"), b"", 0, {413}, 140),
    "a deflate bomb of 2 GB": (posted(bomb("deflate"), b"Content-Encoding: deflate\r\n"), b"", 0, {413}, 140),
    "gzip of gzip": (posted(gzip.compress(bomb("gzip", 64)), b"Content-Encoding: gzip, gzip\r\n"), b"", 0, {400}, 4),
    "lists 10^5 deep": (posted(b"[" * 100_000), b"", 0, {400}, 8),
    "objects 10^5 deep": (posted(b'{"a":' * 100_000), b"", 0, {400}, 8),
    "a number of 10^5 digits": (posted(tree(shape="HERE").replace(b'"HERE"', b"[" + b"9" * 100_000 + b",2,3]")), b"", 0, {400}, 4),
    "huge dims": (posted(tree(shape=[1 << 62, 1 << 62, 1 << 62])), b"", 0, {400}, 2),
    "huge dims that the model allows": (posted(tree(shape=[1 << 62, 2, 3])), b"", 0, {400}, 2),
    "negative dims": (posted(tree(shape=[-1, 2, 3])), b"", 0, {400}, 2),
    "zero dims": (posted(tree([], shape=[0, 2, 3])), b"", 0, {400}, 2),
    "NaN": (posted(tree([float("nan")] * 6)), b"", 0, {400}, 2),
    "null bytes": (posted(bytes(100_000)), b"", 0, {400}, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERSIZED)
def test_what_is_oversized_or_malformed_is_refused_in_bounded_memory(server: Victim, name: str) -> None:
    once, again, times, statuses, peak_mib = OVERSIZED[name]

    def attack() -> None:
        with server.connect() as sock:
            try:
                sock.sendall(once)
                for _ in range(times):
                    sock.sendall(again)
                if statuses == {400} and times:
                    sock.sendall(b"0\r\n\r\n")
                elif times:
                    sock.shutdown(socket.SHUT_WR)
                status, _, body = reply(sock.makefile("rb"))
            except (OSError, IndexError):  # a refusal may be lost where the server closes before everything was sent
                status, body = 0, b'{"error":""}'
        assert status in statuses and set(json.loads(body)) == {"error"}, (status, body[:200])

    stays_flat(server, attack, times=3, peak_mib=peak_mib)


def test_pipelined_bodies_wait_within_the_bound_of_one_body() -> None:
    """Of a client that reads no answers: more than one body's bytes are not taken off the socket."""
    paused: list[bool] = []
    transport = SimpleNamespace(
        write=lambda data: None, pause_reading=lambda: paused.append(True), resume_reading=lambda: paused.append(False), close=lambda: None
    )
    with Running(bounds=Bounds(body_bytes=1000)) as running:

        async def scene() -> list[list[bool]]:
            connection, seen = Connection(running.core._port), []
            connection.connection_made(transport)  # type: ignore[arg-type]
            connection.pause_writing()
            for _ in range(3):
                connection.data_received(posted(b" " * 400))
                seen.append(list(paused))
            connection.connection_lost(None)
            return seen

        assert running.core.run(scene()) == [[], [], [True]]


# --- smuggling --------------------------------------------------------------------------------------------------------


def test_requests_of_two_readings_leave_memory_flat(server: Victim) -> None:
    data = [
        one.replace(b"{infer}", INFER.encode()).replace(b"{second}", SECOND).replace(b"{n}", b"%d" % len(SECOND))
        for one in SMUGGLED.values()
    ]

    def attack() -> None:
        for one in data:
            with server.connect() as sock:
                sock.sendall(one)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass

    stays_flat(server, attack, times=20, peak_mib=2)


# --- another way past the keys ----------------------------------------------------------------------------------------


def test_no_way_past_the_keys_costs_memory(guarded: Victim) -> None:
    ways = [
        f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n{{}}\r\n"
        for path in ROUTES
        for method in ("GET", "POST", "PUT", "DELETE")
    ]

    def attack() -> None:
        with guarded.connect() as sock:
            stream = sock.makefile("rb")
            for number, way in enumerate(ways):
                sock.sendall(way.replace("{}", f"X-API-Key: wrong{number}\r\n" if number % 2 else "").encode())
                status, _, body = reply(stream)
                assert status == 401 and set(json.loads(body)) == {"error"}

    stays_flat(guarded, attack, times=5, peak_mib=2)


def test_guesses_at_keys_are_not_kept(guarded: Victim) -> None:
    guesses = iter(range(10**9))

    def attack() -> None:
        with guarded.connect() as sock:
            stream = sock.makefile("rb")
            for _ in range(300):
                sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %s%d\r\n\r\n" % (b"x" * 30_000, next(guesses)))
                assert reply(stream)[0] == 401

    stays_flat(guarded, attack, times=5, peak_mib=4)


def test_guesses_over_grpc_leave_memory_flat(guarded: Victim) -> None:
    with InferenceServerClient(f"127.0.0.1:{guarded.ports['grpc']}") as client:

        def attack() -> None:
            for number in range(50):
                with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                    client.get_model_metadata("linear", headers={"authorization": f"Bearer {number}"})

        stays_flat(guarded, attack, times=5, peak_mib=4)


# --- pickles ----------------------------------------------------------------------------------------------------------


class Canary:
    """Whoever unpickles it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


KINDS = [
    "application/json", "application/octet-stream", "application/vnd.bentoml+pickle", "application/x-pickle", "application/python-pickle", "application/x-python-serialize", "application/cloudpickle",
    "application/vnd.ray.pickle", "multipart/form-data; boundary=x", "text/plain", "application/x-msgpack", "application/vnd.apache.arrow.stream", "image/png", "*/*", "",
]  # fmt: skip


def test_no_pickle_is_loaded_whatever_it_is_called(server: Victim, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickled = [pickle.dumps(Canary(canary), protocol) for protocol in range(6)]

    def attack() -> None:
        for kind in KINDS:
            for body in pickled:
                kinds = f"Content-Type: {kind}\r\n".encode()
                assert server.refuses(posted(body, kinds)) == 400
                assert server.refuses(posted(body, kinds + b"Inference-Header-Content-Length: 0\r\n")) == 400
                assert server.refuses(posted(body, kinds + b"Content-Encoding: pickle\r\n")) == 400
                assert server.refuses(posted(gzip.compress(body), kinds + b"Content-Encoding: gzip\r\n")) == 400

    stays_flat(server, attack, times=2, peak_mib=3)
    assert not canary.exists()
    pickle.loads(pickled[-1])  # the canary does sing
    assert canary.exists()


def test_no_pickle_is_loaded_over_grpc(server: Victim, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    body = pickle.dumps(Canary(canary))
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2, 3]}
    asked = service_pb2.ModelInferRequest(model_name="linear", inputs=[tensor], raw_input_contents=[body]).SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{server.ports['grpc']}") as channel:
        for method, data in (("ModelInfer", body), ("ModelInfer", asked), ("ModelMetadata", body), ("RepositoryModelLoad", body)):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/{SERVICE}/{method}")(data, timeout=20)
    server.is_well()
    assert not canary.exists()


# --- names as paths ---------------------------------------------------------------------------------------------------

NAMES = [
    "../x", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/x", "%252e%252e", "....//x", "/etc/passwd", "%00", "x%00.onnx", "a" * 10_000, "%ff%fe", "lin%D0%B5ar", "linear%20", "linear%E2%80%8B", "LINEAR",
    "%EF%BC%8E%EF%BC%8E", "x\\..\\y", "file:x", "linear@7", "linear%407", "~", "%7e", "-rf", "%0d%0aX-Injected:1", "CON", ".", "..;", "linear%2f..%2flinear",
]  # fmt: skip


def test_no_name_is_a_path_and_none_is_remembered(server: Victim) -> None:
    def attack() -> None:
        for name in NAMES:
            for what in (
                f"GET /v2/models/{name}",
                f"POST /v2/models/{name}/infer",
                f"GET /v2/models/linear/versions/{name}",
                f"POST /v2/models/linear/versions/{name}/infer",
            ):
                assert server.refuses(f"{what} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".encode()) in (400, 404, 405)
            for action in ("load", "unload"):
                assert server.refuses(
                    f"POST /v2/repository/models/{name}/{action} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".encode()
                ) in (400, 404)

    stays_flat(server, attack, times=5, peak_mib=3)


def test_thousands_of_models_that_do_not_exist_leave_nothing_behind(server: Victim) -> None:
    numbers = iter(range(10**9))

    def attack() -> None:
        with server.connect() as sock:
            stream = sock.makefile("rb")
            for _ in range(300):
                name = f"unknown-{next(numbers)}"
                sock.sendall(
                    f"POST /v2/repository/models/{name}/load HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\nGET /v2/models/{name} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
                )
                assert (reply(stream)[0], reply(stream)[0]) == (400, 404)

    stays_flat(server, attack, times=5, peak_mib=2)


# --- a real registry --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        shelf = Shelf(tmp_path_factory.mktemp("shelf"))
        shelf.registry.promote("good", shelf.publish("good", 1).version, "test")
        yield shelf


@pytest.fixture(scope="module")
def replica(shelf: Shelf) -> Iterator[Core]:
    with shelf.served("good@production") as core:
        yield core


ROWS = np.random.default_rng(3).normal(size=(3, FEATURES)).astype(np.float32)


def ask(core: Core, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    with socket.create_connection(("127.0.0.1", core.ports["http"]), timeout=60) as sock:
        sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        status, _, said = reply(sock.makefile("rb"))
    return status, said


def load(core: Core, name: str, reference: object = "1") -> tuple[int, str]:
    status, said = ask(core, "POST", f"/v2/repository/models/{name}/load", json.dumps({"parameters": {"reference": reference}}).encode())
    return status, json.loads(said).get("error", "")


def answers_right(core: Core, name: str, seed: int) -> None:
    with socket.create_connection(("127.0.0.1", core.ports["http"]), timeout=60) as sock:
        sock.sendall(raw(ROWS, path=f"/v2/models/{name}/infer"))
        status, headers, body = reply(sock.makefile("rb"))
    assert status == 200, body
    found = np.frombuffer(body[int(headers["inference-header-content-length"]) :], np.float32).reshape(len(ROWS), -1)
    np.testing.assert_allclose(found, ROWS @ weights_of(seed), atol=1e-5)


def external(location: str) -> Callable[[Path], None]:
    """A version whose weights lie elsewhere."""

    def change(folder: Path) -> None:
        model = linear(weights_of(0))
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        onnx.save(model, folder / "fp32.onnx") if location == "" else (folder / "fp32.onnx").write_bytes(model.SerializeToString())

    return change


def test_a_version_whose_weights_lie_outside_its_folder_is_not_loaded_and_the_others_go_on(shelf: Shelf, replica: Core) -> None:
    secret = shelf.folder / "secret"
    secret.write_bytes(weights_of(0).tobytes())
    for number, location in enumerate((str(secret), "../" * 12 + str(secret)[1:], "../../secret", "../secret")):
        shelf.publish("outside", 100 + number, change=external(location))
        status, said = load(replica, "outside", str(number + 1))
        assert status == 400 and "could not be loaded" in said and "secret" not in said
        answers_right(replica, "good", 1)
    assert ask(replica, "GET", "/v2/models/outside")[0] == 404


def test_a_version_with_a_pickle_among_its_samples_is_not_loaded(shelf: Shelf, replica: Core, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    def change(folder: Path) -> None:
        np.savez(folder / "golden.npz", x=np.array([Canary(canary)], object), logits_fp32=np.zeros(1))

    shelf.publish("pickled", 200, change=change)
    status, said = load(replica, "pickled")
    assert status == 400 and "could not be loaded" in said and not canary.exists()
    answers_right(replica, "good", 1)


def test_an_engine_that_somebody_put_into_the_cache_is_not_run(shelf: Shelf, replica: Core) -> None:
    """Native code in the general case; here a graph that answers otherwise, in the place of the one that was built."""
    shelf.publish("swapped", 300)
    assert load(replica, "swapped") == (200, "")
    answers_right(replica, "swapped", 300)
    engines = [path for path in (shelf.folder / "cache" / "engines").rglob("engine") if path.is_file()]
    for path in engines:
        path.write_bytes(linear(weights_of(999)).SerializeToString())
    assert ask(replica, "POST", "/v2/repository/models/swapped/unload")[0] == 200
    assert load(replica, "swapped") == (200, "")
    answers_right(replica, "swapped", 300)
    answers_right(replica, "good", 1)


def test_no_name_reference_or_version_reaches_a_file(shelf: Shelf, replica: Core) -> None:
    (shelf.folder / "x").mkdir(exist_ok=True)
    names = ["..", "../x", "%2e%2e%2fx", "good/../../x", "%2fetc%2fpasswd", "good%00"]
    references = [
        "../x",
        "../../etc/passwd",
        "/etc/passwd",
        "1/../../x",
        "1\0",
        "a" * 10_000,
        "\u0661",
        "1\u200b",
        "%2e%2e",
        "$(id)",
        "",
        " ",
        "-1",
        "1;2",
        {"a": 1},
        7,
    ]
    before = sorted(path for path in shelf.folder.rglob("*") if "mlflow.db" not in path.name)
    for name in names:
        assert load(replica, name)[0] in (400, 404)
    for reference in references:
        status, said = load(replica, "good", reference)
        assert status == 400 and says_nothing_of_us(said, shelf), (reference, said)
    for version in ("../1", "%31", "\u0661", "1/../1", "01", "-1"):
        status, said = ask(replica, "POST", "/v2/repository/models/good/unload", json.dumps({"parameters": {"version": version}}).encode())
        assert status == 404 and says_nothing_of_us(said.decode(), shelf), (version, said)
    assert sorted(path for path in shelf.folder.rglob("*") if "mlflow.db" not in path.name) == before
    answers_right(replica, "good", 1)


# --- errors that say too much -----------------------------------------------------------------------------------------

TELLING = re.compile(
    r"Traceback|\.py\b|\bline \d+|0x[0-9a-f]{6,}|sqlite|mlflow|127\.0\.0\.1|localhost|site-packages|/(home|tmp|usr|work|root|var|etc)\b",
    re.IGNORECASE,
)


def says_nothing_of_us(said: str, shelf: Shelf) -> bool:
    return not TELLING.search(said) and str(shelf.folder) not in said


def test_no_error_says_where_files_and_servers_are(shelf: Shelf, replica: Core) -> None:
    shelf.damage(shelf.publish("damaged", 400))
    shelf.publish("failed", 401, verdict="fail")
    found = [
        load(replica, *asked)
        for asked in (
            ("damaged", "1"),
            ("failed", "1"),
            ("failed", "latest"),
            ("failed", "2"),
            ("nobody", "1"),
            ("nobody", "production"),
            ("good", "9"),
            ("good", "nothing"),
            ("good", "1,9"),
        )
    ]
    assert {status for status, _ in found} == {200, 400, 409}
    for _, said in found:
        assert says_nothing_of_us(said, shelf), said
    assert load(replica, "good", "production") == (200, "")
    index = ask(replica, "POST", "/v2/repository/index")[1].decode()
    assert says_nothing_of_us(index, shelf), index


@pytest.mark.parametrize("how", ["gone", "unreachable"])
def test_a_registry_that_is_down_is_not_described_to_clients(
    shelf: Shelf, replica: Core, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "gone":
        monkeypatch.setattr("portaisys.registry._open_local", lambda root, create: (_ for _ in ()).throw(_gone(root)))
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for reference in ("latest", "all", "production", "nothing"):
        status, said = load(replica, "good", reference)
        assert status in (200, 400, 503) and says_nothing_of_us(said, shelf), said
    for path in ("/v2/models/good/lineage", "/v2/models/good/traffic", "/v2/models/good/config", "/v2/models/good/stats"):
        said = urllib.request.urlopen(f"http://127.0.0.1:{replica.ports['http']}{path}", timeout=30).read().decode()
        assert says_nothing_of_us(said, shelf), said
    answers_right(replica, "good", 1)


def _gone(root: Path) -> Exception:
    from portaisys.registry import UnreachableError

    return UnreachableError(f"storage.path: no registry at {root / 'mlflow.db'}; publish a version first, or set MLFLOW_TRACKING_URI")
