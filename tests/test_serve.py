"""Serving a published version: opened in this process, then by Ray Serve and asked by a real client."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from test_serving_alone import LABELS, make_version, publish, storage_in
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from portaisys import artifact
from portaisys.engine import Options, cache
from portaisys.serve.app import ServeArgs, _absolute, build_app
from portaisys.serve.batcher import BatchRecord
from portaisys.serve.model import Limits, ServedModel, open_version
from portaisys.serve.ray_metrics import RayMetrics, ReplyMetrics
from portaisys.spec import Storage, UserError

APP = Path(__file__).parents[1] / "serve_apps" / "digits.yaml"

# --- opening a version, without Ray -------------------------------------------------------------------------------


def opened(version: artifact.Artifact, cache_dir: Path, **limits: Any) -> ServedModel:
    return open_version(version.path, "1", cache.Cache(cache_dir), Limits(**limits))


def test_the_best_admitted_precision_is_served(tmp_path: Path) -> None:
    model = opened(make_version(tmp_path / "v", tmp_path), tmp_path)
    assert (model.engine.precision, list(model.fallbacks), model.ready) == ("int8", [], True)
    assert model.lineage["serving"]["max_batch"] == 8 and model.lineage["lineage"]["run_id"] == "r1"
    asyncio.run(model.close())
    assert not model.ready


def test_a_precision_with_other_golden_answers_here_is_passed_over_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = opened(make_version(tmp_path / "v", tmp_path, spoil="int8"), tmp_path)
    assert model.engine.precision == "fp32"
    (reason,) = model.lineage["serving"]["fallbacks"]
    assert "int8: at batch 1 logits is 1 (bound 0.0001) off from what the same row gets from the reference" in reason and reason.removeprefix("int8: ") in caplog.text
    asyncio.run(model.close())


def test_no_precision_that_holds_is_an_error_with_every_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no admitted precision holds.*int8: at batch 1.*fp32: at batch 1"):
        opened(make_version(tmp_path / "v", tmp_path, tolerance=-1.0), tmp_path)


def test_a_precision_override_must_be_admitted_and_has_no_fallback(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v", tmp_path, spoil="int8")
    with pytest.raises(UserError, match="admitted int8, fp32"):
        opened(version, tmp_path, precision="fp16")
    with pytest.raises(UserError, match="no admitted precision holds"):
        opened(version, tmp_path, precision="int8")


def test_more_than_the_verified_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_batch 9: the version was verified up to 8"):
        opened(make_version(tmp_path / "v", tmp_path), tmp_path, max_batch=9)


def test_a_changed_file_is_not_served(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v", tmp_path)
    (version.path / "version.json").write_text((version.path / "version.json").read_text().replace("digit 1", "digit 7"))
    with pytest.raises(UserError, match=r"version\.json differs from its manifest"):
        opened(version, tmp_path)


def test_what_ran_is_counted_in_batches_and_samples(tmp_path: Path) -> None:
    async def ask() -> None:
        model = opened(make_version(tmp_path / "v", tmp_path), tmp_path)
        await model.infer({"x": np.zeros((20, 8, 8), np.float32)})
        await model.close()
        assert (model.stats.batches, model.stats.samples, model.stats.failed_requests) == (3, 20, 0) and model.stats.engine_s > 0

    asyncio.run(ask())


# --- the application's arguments ----------------------------------------------------------------------------------


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_bach"):
        ServeArgs.model_validate({"model": "digits@production", "max_bach": 8})
    with pytest.raises(ValidationError, match="pth"):
        ServeArgs.model_validate({"model": "digits@production", "storage": {"pth": "runs"}})
    with pytest.raises(ValidationError, match="raise max_queue"):
        ServeArgs(model="digits@production", max_batch=8, max_queue=4)


def test_ray_sees_the_builders_argument_as_a_type_not_a_string() -> None:
    assert build_app.__annotations__["args"] is ServeArgs


def test_the_example_application_is_valid_and_local() -> None:
    tree = yaml.safe_load(APP.read_text())
    assert tree["http_options"]["host"] == "127.0.0.1"
    for application in tree["applications"]:
        assert application["import_path"] == "portaisys.serve.app:build_app"
        ServeArgs.model_validate(application["args"])


def test_relative_storage_is_taken_from_where_the_application_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _absolute("runs") == str(tmp_path / "runs")
    assert [_absolute(path) for path in ("/runs", "~/runs", "s3://bucket/runs")] == ["/runs", "~/runs", "s3://bucket/runs"]


def test_metrics_are_recorded_by_batch_and_by_reply() -> None:
    RayMetrics("digits@production").batch(BatchRecord(samples=3, queue_s=0.001, engine_s=0.002, failed=True))
    RayMetrics("digits@production").fallbacks(["int8: golden answers differ"])
    replies = ReplyMetrics()
    for status in (200, 503, 200):
        replies.count(status)
    assert replies._counts == {200: 2, 503: 1}
    replies.flush()
    assert replies._counts == {}


def test_queues_rejections_and_steps_are_recorded_once_each(tmp_path: Path) -> None:
    version = make_version(tmp_path / "version", tmp_path / "cache")
    model = opened(version, tmp_path / "cache")
    replies = ReplyMetrics()
    assert model.ladder is not None
    for total in (1, 3):
        model.stats.rejected["queue_full"] = total
        replies.models([model])
        replies.models([model])
        assert replies._told == {("portaisys_rejected", "digits", "1", "queue_full"): total}
    model.ladder.pin("fp32")
    replies.models([model])
    assert list(replies._seen.values()) == [1]
    asyncio.run(model.close())


# --- Ray Serve ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    url: str
    storage: Storage
    x: np.ndarray
    logits: np.ndarray
    logits_fp32: np.ndarray

    def client(self) -> InferenceServerClient:
        return InferenceServerClient(self.url, network_timeout=60, connection_timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import ray
    from ray import serve

    folder = tmp_path_factory.mktemp("serve")
    storage = storage_in(folder)
    version = make_version(folder / "version", storage.cache_dir)
    publish(version, storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            port = free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(build_app(ServeArgs(model="digits@production", storage=storage, num_cpus=0.1)))
            x = np.random.default_rng(1).normal(size=(64, 8, 8)).astype(np.float32)
            answers = [offline_answers(version, storage.cache_dir, precision, x) for precision in ("int8", "fp32")]
            yield Served(f"127.0.0.1:{port}", storage, x, *answers)
        finally:
            serve.shutdown()
            ray.shutdown()


def offline_answers(version: artifact.Artifact, cache_dir: Path, precision: str, x: np.ndarray) -> np.ndarray:
    options = Options(precision, opt_batch=4, max_batch=8)
    engine = cache.load(cache.get_or_build(version.file(f"{precision}.onnx"), "onnxruntime", options, cache.Cache(cache_dir)), options)
    logits = np.concatenate([engine.run({"x": row[None]})["logits"] for row in x])
    engine.close()
    return logits


def infer(client: InferenceServerClient, x: np.ndarray, *, binary: bool = True, model: str = "digits", **options: Any) -> np.ndarray:
    tensor = InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    return client.infer(model, [tensor], outputs=[InferRequestedOutput("logits", binary_data=binary)], **options).as_numpy("logits")


def same(answers: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(answers, expected, atol=1e-5)
    assert (answers.argmax(1) == expected.argmax(1)).all()


@pytest.mark.cluster
def test_a_client_finds_a_warm_model_that_describes_itself(served: Served) -> None:
    client = served.client()
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("digits", "1")
    about = client.get_model_metadata("digits")
    assert about["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 8, 8]}]
    assert about["outputs"][0]["parameters"]["labels"] == LABELS
    assert client.get_model_config("digits")["max_batch_size"] == 8
    lineage = json.loads(urllib.request.urlopen(f"http://{served.url}/v2/models/digits/lineage", timeout=30).read())
    assert lineage["serving"]["precision"] == "int8" and len(lineage["digest"]) == 64


@pytest.mark.cluster
@pytest.mark.parametrize("binary", [True, False])
def test_one_by_one_the_client_gets_the_offline_engines_answers(served: Served, binary: bool) -> None:
    client = served.client()
    for x, expected in zip(served.x[:16, None], served.logits[:16, None], strict=True):
        same(infer(client, x, binary=binary), expected)


@pytest.mark.cluster
@pytest.mark.parametrize("binary", [True, False])
def test_32_clients_at_once_each_get_their_own_answers(served: Served, binary: bool) -> None:
    def ask(start: int) -> np.ndarray:
        client = served.client()  # tritonclient's is not to be shared between threads
        return np.concatenate([infer(client, served.x[index : index + 1], binary=binary) for index in (start, start + 32)])

    with ThreadPoolExecutor(32) as pool:
        for start, answers in enumerate(pool.map(ask, range(32))):
            same(answers, served.logits[[start, start + 32]])


@pytest.mark.cluster
def test_a_request_above_max_batch_and_a_compressed_one_get_the_same_answers(served: Served) -> None:
    client = served.client()
    same(infer(client, served.x), served.logits)
    same(infer(client, served.x, request_compression_algorithm="gzip", response_compression_algorithm="gzip"), served.logits)
    same(infer(client, served.x, binary=False, request_compression_algorithm="deflate", response_compression_algorithm="deflate"), served.logits)


@pytest.mark.cluster
@pytest.mark.parametrize("wrong", ["name", "rank", "dtype", "size", "model", "version"])
def test_what_the_client_got_wrong_is_its_error_and_named(served: Served, wrong: str) -> None:
    x = served.x[:1].astype(np.float64 if wrong == "dtype" else np.float32)
    x = x.reshape(1, 64) if wrong == "rank" else x[:, :4] if wrong == "size" else x
    tensor = InferInput("y" if wrong == "name" else "x", list(x.shape), "FP64" if wrong == "dtype" else "FP32")
    tensor.set_data_from_numpy(x)
    with pytest.raises(InferenceServerException) as refused:
        served.client().infer("other" if wrong == "model" else "digits", [tensor], model_version="9" if wrong == "version" else "")
    assert refused.value.status() == ("404" if wrong in ("model", "version") else "400")
    says = {"name": "the model has x", "rank": "has shape", "size": "has shape", "dtype": "has datatype FP32"}
    assert says.get(wrong, "this server has") in refused.value.message()
    same(infer(served.client(), served.x[:1]), served.logits[:1])


@pytest.mark.cluster
def test_with_the_registry_gone_a_new_replica_starts_from_its_local_copy_below_any_route(served: Served) -> None:
    from ray import serve

    shutil.rmtree(served.storage.path)
    args = ServeArgs(model="digits@production", storage=served.storage, num_cpus=0.1, precision="fp32", max_batch=4)
    serve.run(build_app(args), name="second", route_prefix="/second")
    client = InferenceServerClient(f"{served.url}/second", network_timeout=60)
    assert client.is_model_ready("digits")
    same(infer(client, served.x), served.logits_fp32)
