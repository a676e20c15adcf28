"""API keys: every route and method with no key, a wrong one and a right one; scopes; what is kept; ports that nobody guards."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as grpcclient
from test_grpc import tensor_of
from test_http import Running, X, raw, reply, served
from tritonclient.utils import InferenceServerException

from portaisys.cli import main
from portaisys.serve.core import Core, Listen
from portaisys.serve.grpc import message
from portaisys.serve.keys import ForbiddenError, Keys, add_key, read_keys
from portaisys.serve.repository import Repository
from portaisys.spec import UserError

ROUTES = [
    "/v2", "/v2/", "//v2", "/v2/openapi.json", "/v2/models/stats", "/v2/repository/index", "/v2/repository/models/tiny/load", "/v2/repository/models/tiny/unload",
    *(f"/v2/models/{name}{rest}" for name in ("tiny", "t%69ny", "other", "../tiny") for rest in ("", "/ready", "/config", "/stats", "/lineage", "/traffic", "/infer", "/versions/3/infer", "//infer", "/%69nfer")),
    "/v2/health/../models/tiny", "/v2/health/live/../../models/tiny/infer", "/V2/models/tiny",
]  # fmt: skip


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, dict[str, str]]]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    secrets = {"admin": add_key(file, "admin", admin=True), "all": add_key(file, "all"), "other": add_key(file, "other", ("other",))}
    running = Running.__new__(Running)
    running.models = Repository(lambda reference: served("tiny", "3"), lambda reference: [reference])
    running.core = Core(running.models, ("tiny@3",), Listen(host="0.0.0.0", http_port=0, grpc_port=0, keys=str(file))).start()
    running.port = running.core.ports["http"]
    yield running, secrets
    running.core.stop(drain_s=1)


def ask(server: Running, method: str, path: str, key: str = "", header: str = "Authorization: Bearer ") -> tuple[int, Any]:
    lines = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n{f'{header}{key}' + chr(13) + chr(10) if key else ''}\r\n"
    with server.connect() as sock:
        sock.sendall(lines.encode())
        status, _, body = reply(sock.makefile("rb"))
    return status, json.loads(body)


@pytest.mark.parametrize("path", ROUTES)
def test_without_the_right_key_no_route_says_anything(guarded: tuple[Running, dict[str, str]], path: str) -> None:
    server, _ = guarded
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        for key in ("", "wrong", "Bearer", "x" * 5000):
            status, body = ask(server, method, path, key)
            assert status == 401 and set(body) == {"error"} and "tiny" not in body["error"], (method, path, key)


def test_health_needs_no_key(guarded: tuple[Running, dict[str, str]]) -> None:
    assert ask(guarded[0], "GET", "/v2/health/live") == (200, {"live": True}) and ask(guarded[0], "GET", "/v2/health/ready") == (200, {"ready": True})


@pytest.mark.parametrize("headers", ["", "Accept-Encoding: gzip\r\n"], ids=["fast lane", "handled"])
def test_a_key_opens_what_it_is_for_on_either_path(guarded: tuple[Running, dict[str, str]], headers: str) -> None:
    server, secrets = guarded
    for lines, status in (
        (f"Authorization: Bearer {secrets['all']}", 200), (f"X-API-Key: {secrets['all']}", 200), (f"authorization: {secrets['all']}", 200),
        (f"Authorization: Bearer {secrets['other']}", 403), ("Authorization: Bearer wrong", 401), (f"Authorization: Bearer {secrets['all']}x", 401), ("X: y", 401),
    ):  # fmt: skip
        with server.connect() as sock:
            sock.sendall(raw(X, headers=f"{headers}{lines}\r\n") * 2)
            stream = sock.makefile("rb")
            assert [reply(stream)[0] for _ in range(2)] == [status, status], lines


def test_a_key_given_twice_is_refused(guarded: tuple[Running, dict[str, str]]) -> None:
    server, secrets = guarded
    with server.connect() as sock:
        sock.sendall(raw(X, headers=f"Authorization: Bearer wrong\r\nAuthorization: Bearer {secrets['all']}\r\n"))
        assert reply(sock.makefile("rb"))[0] == 400


def test_only_an_admins_key_changes_the_repository(guarded: tuple[Running, dict[str, str]]) -> None:
    server, secrets = guarded
    assert ask(server, "POST", "/v2/repository/index", secrets["all"])[0] == 403
    assert ask(server, "POST", "/v2/repository/index", secrets["admin"])[0] == 200
    assert ask(server, "GET", "/v2/models/stats", secrets["other"])[0] == 403 and ask(server, "GET", "/v2/models/stats", secrets["all"])[0] == 200


# Method -> how the unmodified client calls it, for whom: everybody, whoever has a key for the model, for all models, or an admin's.
GRPC = {
    "ServerLive": (lambda client, headers: client.is_server_live(headers=headers), "everybody"),
    "ServerReady": (lambda client, headers: client.is_server_ready(headers=headers), "everybody"),
    "ServerMetadata": (lambda client, headers: client.get_server_metadata(headers=headers), "anybody known"),
    "ModelReady": (lambda client, headers: client.is_model_ready("tiny", headers=headers), "model"),
    "ModelMetadata": (lambda client, headers: client.get_model_metadata("tiny", headers=headers), "model"),
    "ModelConfig": (lambda client, headers: client.get_model_config("tiny", headers=headers), "model"),
    "ModelStatistics": (lambda client, headers: client.get_inference_statistics("tiny", headers=headers), "model"),
    "ModelStatistics of all": (lambda client, headers: client.get_inference_statistics(headers=headers), "model"),
    "ModelInfer": (lambda client, headers: client.infer("tiny", [tensor_of(X)], headers=headers), "model"),
    "RepositoryIndex": (lambda client, headers: client.get_model_repository_index(headers=headers), "admin"),
    "RepositoryModelLoad": (lambda client, headers: client.load_model("tiny", headers=headers), "admin"),
}


@pytest.mark.parametrize("method", GRPC)
def test_over_grpc_a_key_opens_what_it_is_for_and_nothing_else(guarded: tuple[Running, dict[str, str]], method: str) -> None:
    server, secrets = guarded
    client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.core.ports['grpc']}")
    call, whom = GRPC[method]
    opens = {"everybody": {"", "wrong", "other", "all", "admin"}, "anybody known": {"other", "all", "admin"}, "model": {"all", "admin"}, "admin": {"admin"}}[whom]
    for name in ("", "wrong", "other", "all", "admin"):
        headers = {"authorization": f"Bearer {secrets.get(name, name)}"} if name else {}
        if name in opens:
            call(client, headers)
        else:
            with pytest.raises(InferenceServerException) as refused:
                call(client, headers)
            assert refused.value.status() == ("StatusCode.PERMISSION_DENIED" if name in secrets else "StatusCode.UNAUTHENTICATED"), (name, refused.value)
    client.close()


def test_over_grpc_a_stream_and_a_models_health_are_guarded_too(guarded: tuple[Running, dict[str, str]]) -> None:
    server, secrets = guarded
    address = f"127.0.0.1:{server.core.ports['grpc']}"
    for key, refused in (("wrong", True), (secrets["other"], True), (secrets["all"], False)):
        answers: queue.Queue[Any] = queue.Queue()
        with grpcclient.InferenceServerClient(address) as client:
            client.start_stream(callback=lambda result, error, answers=answers: answers.put(error), headers={"x-api-key": key})
            client.async_stream_infer("tiny", [tensor_of(X)])
            assert (answers.get(timeout=20) is not None) is refused
            client.stop_stream()
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        request = message("grpc.health.v1.HealthCheckRequest")
        assert check(b"") and check(request(service="tiny").SerializeToString(), metadata=(("x-api-key", secrets["all"]),))
        with pytest.raises(grpc.RpcError) as error:
            check(request(service="tiny").SerializeToString())
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_port_that_others_reach_is_not_opened_without_keys() -> None:
    models = Repository(lambda reference: served("tiny", "3"), lambda reference: [reference])
    for host in ("0.0.0.0", "10.0.0.7", "gpu-node-3", "::"):
        with pytest.raises(UserError, match=r"data_host: .* is reached from other machines, and no keys are set"):
            Core(models, ("tiny@3",), Listen(host=host, http_port=0))
    Core(models, ("tiny@3",), Listen(host="0.0.0.0"))  # listens nowhere itself


def test_the_file_holds_hashes_only_and_is_its_owners_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "conf" / "keys.yaml"
    assert main(["key", "team-a", "--file", str(file), "--model", "digits"]) == 0
    secret = capsys.readouterr().out.split()[1]
    assert len(secret) > 40 and secret not in file.read_text() and oct(file.stat().st_mode)[-3:] == "600"
    assert main(["key", "team-a", "--file", str(file)]) == 2 and main(["key", "team-b", "--file", str(file), "--admin"]) == 0
    keys = read_keys(file)
    assert [(key.name, key.models, key.admin) for key in keys.keys] == [("team-a", ("digits",), False), ("team-b", ("*",), True)]
    assert keys.check({"x-api-key": secret}, "digits") == "team-a"
    with pytest.raises(ForbiddenError, match="may not ask this model"):
        keys.check({"x-api-key": secret}, "other")


@pytest.mark.parametrize("text", ["", "a: b", "- name: x", "- {name: x, sha256: zz}", "- [1]", "- {name: x, sha256: " + "0" * 64 + ", admin: 3}", "[unclosed", "&a [*a, *a]"])
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(UserError, match="keys: "):
        read_keys(tmp_path / "keys.yaml")


def test_what_is_remembered_of_wrong_keys_is_bounded() -> None:
    keys = Keys([])
    for number in range(10_050):
        with pytest.raises(ForbiddenError):
            keys.check({"x-api-key": str(number)})
    assert len(keys._owners) < 10_000
