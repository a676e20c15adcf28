"""What a server says of itself and of its models, and how it refuses what is not there."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest

from conformance.models import DTYPES, Model, framed
from conformance.wire import Target, error_of, refused

UNKNOWN = "no-such-model-anywhere"


# --- the server ---------------------------------------------------------------------------------------------------


def test_the_server_gives_its_name_version_and_extensions(target: Target) -> None:
    about = target.get("/v2").json()
    assert isinstance(about["name"], str) and isinstance(about["version"], str)
    assert isinstance(about["extensions"], list) and all(isinstance(extension, str) for extension in about["extensions"])


@pytest.mark.parametrize("state", ["live", "ready"])
def test_health_is_said_in_a_body_since_kserves_client_reads_one(target: Target, state: str) -> None:
    assert target.get(f"/v2/health/{state}").json() == {state: True}


# --- a model ------------------------------------------------------------------------------------------------------


def prefixes(model: Model) -> list[str]:
    return [model.path, *(f"{model.path}/versions/{version}" for version in model.about.get("versions") or [])]


def test_a_model_describes_its_tensors_with_and_without_version(model: Model) -> None:
    for prefix in prefixes(model):
        about = model.target.get(prefix).json()
        assert about["name"] == model.name and isinstance(about["platform"], str)
        assert all(isinstance(version, str) for version in about["versions"])
        for kind in ("inputs", "outputs"):
            assert about[kind], f"a model without {kind}"
            for tensor in about[kind]:
                assert isinstance(tensor["name"], str) and tensor["datatype"] in DTYPES
                assert all(type(size) is int and size >= -1 for size in tensor["shape"])


def test_a_model_is_ready_with_and_without_version(model: Model) -> None:
    for prefix in prefixes(model):
        reply = model.target.get(f"{prefix}/ready")
        assert reply.status == 200 and reply.json()["ready"] is True


def test_the_configuration_holds_what_perf_analyzer_reads(model: Model) -> None:
    model.need("model_configuration")
    for prefix in prefixes(model):
        config = model.target.get(f"{prefix}/config").json()
        assert config["name"] == model.name and type(config["max_batch_size"]) is int
        assert isinstance(config.get("platform"), str) and isinstance(config.get("backend"), str)
        for kind, tensors in (("input", model.inputs), ("output", model.outputs)):
            assert [entry["name"] for entry in config[kind]] == [tensor.name for tensor in tensors]
            for entry, tensor in zip(config[kind], tensors, strict=True):
                assert entry["data_type"] == ("TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}")
                assert list(entry["dims"]) == list(tensor.shape[1:] if config["max_batch_size"] else tensor.shape)


# --- statistics ---------------------------------------------------------------------------------------------------

PARTS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")


def test_statistics_are_there_if_and_only_if_they_are_listed(model: Model) -> None:
    reply = model.target.get(f"{model.path}/stats")
    if "statistics" not in model.extensions:
        refused(reply, 404)  # perf_analyzer asks for them if they are listed, and takes them for true
        return
    rows = reply.json()["model_stats"]
    assert rows and {row["name"] for row in rows} == {model.name}
    for row in rows:
        assert isinstance(row["version"], str) and all(type(row[field]) is int for field in ("last_inference", "inference_count", "execution_count"))
        for part in PARTS:
            assert all(type(row["inference_stats"][part][field]) is int for field in ("count", "ns"))
        assert isinstance(row["batch_stats"], list)
    assert model.name in {row["name"] for row in model.target.get("/v2/models/stats").json()["model_stats"]}


def test_statistics_count_samples_requests_and_nanoseconds(model: Model) -> None:
    model.need("statistics")
    batch = min(model.largest, 3)

    def counted(connection: Any) -> tuple[int, int, int, int]:
        connection.send(model.target.bytes_of("GET", f"{model.path}/stats"))
        rows = connection.reply().json()["model_stats"]
        return tuple(sum(row[field] for row in rows) for field in ("inference_count", "execution_count")) + tuple(  # type: ignore[return-value]
            sum(row["inference_stats"]["success"][field] for row in rows) for field in ("count", "ns")
        )

    with model.target.connect() as connection:
        before = counted(connection)
        for seed in range(4):
            connection.send(model.bytes_of(model.rows(batch, seed), binary=model.binary))
            model.answer(connection.reply())
        samples, batches, requests, ns = (now - then for now, then in zip(counted(connection), before, strict=True))
    assert (samples, requests) == (4 * batch, 4) and 1 <= batches <= 4 and ns > 0


# --- repository ---------------------------------------------------------------------------------------------------


def test_the_repository_lists_every_version_and_its_state(model: Model) -> None:
    model.need("model_repository")
    for body in (b"{}", b'{"ready": true}', b""):
        rows = model.target.ask("POST", "/v2/repository/index", body).json()
        assert all(isinstance(row[field], str) for row in rows for field in ("name", "version", "state"))
        versions = {row["version"] for row in rows if (row["name"], row["state"]) == (model.name, "READY")}
        assert versions and versions <= set(model.about["versions"])
        if b"true" in body:
            assert {row["state"] for row in rows} == {"READY"}


@pytest.mark.parametrize("action", ["load", "unload"])
@pytest.mark.parametrize("name", [UNKNOWN, "..%2F..%2Fetc", "%00", "a" * 10_000])
def test_no_model_that_is_not_there_is_loaded_or_unloaded(target: Target, action: str, name: str) -> None:
    if "model_repository" not in target.extensions():
        pytest.skip("/v2 does not list model_repository")
    refused(target.ask("POST", f"/v2/repository/models/{name}/{action}", b"{}"))


# --- what is not there --------------------------------------------------------------------------------------------

ACTIONS = ("", "/ready", "/infer")


@pytest.mark.parametrize("action", ACTIONS)
def test_an_unknown_model_is_404(first: Model, action: str) -> None:
    body, headers = framed(*first.request(first.rows(1)))
    method = "POST" if action == "/infer" else "GET"
    for path in (f"/v2/models/{UNKNOWN}{action}", f"/v2/models/{UNKNOWN}/versions/1{action}"):
        refused(first.target.ask(method, path, body if method == "POST" else b"", headers), 404)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("version", ["987654321", "0", "-1", "x", "1.0", "9" * 400])
def test_an_unknown_version_is_404(model: Model, action: str, version: str) -> None:
    if version in model.about["versions"]:
        pytest.skip(f"the model has a version {version}")
    body, headers = framed(*model.request(model.rows(1)))
    method = "POST" if action == "/infer" else "GET"
    refused(model.target.ask(method, f"{model.path}/versions/{version}{action}", body if method == "POST" else b"", headers), 404)


@pytest.mark.parametrize("path", ["/v2/nothing", "/v2/models", "/v2/health", "/v2/health/dead", "/v2/models/{model}/nothing", "/v2/models/{model}/infer/x", "/v1/models", "/"])
def test_a_route_that_is_none_is_404_with_an_error(first: Model, path: str) -> None:
    refused(first.target.get(path.replace("{model}", first.name)), 404)


@pytest.mark.parametrize(("method", "path"), [("POST", "/v2"), ("DELETE", "/v2/health/live"), ("PUT", "/v2/models/{model}"), ("GET", "/v2/models/{model}/infer"), ("PATCH", "/v2/models/{model}/infer"), ("OPTIONS", "/v2/models/{model}/ready")])
def test_a_wrong_method_is_405_with_an_error_and_the_right_one(first: Model, method: str, path: str) -> None:
    reply = first.target.ask(method, path.replace("{model}", first.name))
    refused(reply, 405)
    assert ("POST" if "infer" in path else "GET") in reply.headers["allow"]


NAMES = {
    "dots": "..", "encoded dots": "%2e%2e", "a path": "..%2F..%2F..%2Fetc%2Fpasswd", "a double slash": "/etc/passwd", "a null byte": "%00", "a line break": "%0d%0aX-Injected:%201",
    "ten thousand characters": "a" * 10_000, "a look-alike": quote("l\u0456near"), "bad percent signs": "%zz", "bytes that are no UTF-8": "%ff%fe", "a template": "{{7*7}}", "quotes": "%22%27",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize("action", ["", "/infer"])
def test_a_name_is_never_a_path(first: Model, name: str, action: str) -> None:
    reply = first.target.ask("POST" if action else "GET", f"/v2/models/{name}{action}", b"{}" if action else b"")
    message = refused(reply)
    assert "x-injected" not in reply.headers and "/etc" not in message and "49" not in message
    first.target.is_well()


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/octet-stream", "application/vnd.bentoml+pickle", "application/x-pickle", ""])
def test_whatever_a_body_is_called_it_is_answered_or_refused_with_an_error_and_never_unpickled(first: Model, kind: str, tmp_path: Any) -> None:
    canary = tmp_path / "canary"
    pickled = b"cbuiltins\nopen\n(S'%b'\nS'w'\ntR." % str(canary).encode()
    refused(first.target.ask("POST", first.infer_path, pickled, {"Content-Type": kind}))
    assert not canary.exists()
    body, _ = framed(*first.request(first.rows(1)))
    reply = first.target.ask("POST", first.infer_path, body, {"Content-Type": kind} if len(first.request(first.rows(1))[1]) == 0 else {})
    assert reply.status == 200 or error_of(reply)


def test_a_query_changes_nothing(first: Model) -> None:
    assert first.target.get(f"{first.path}?a=b&c=%2F").json() == first.target.get(first.path).json()


def test_every_get_route_answers_the_same_twice_in_json(first: Model) -> None:
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", first.path, f"{first.path}/ready"):
        assert json.dumps(first.target.get(path).json()) == json.dumps(first.target.get(path).json())
