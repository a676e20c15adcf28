"""Clients as their users have them: tritonclient (sync and asyncio) and curl. KServe's client and perf_analyzer: test_peers.py."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest

from conformance.models import NO_JSON, Model, framed, same
from conformance.wire import Reply

triton = pytest.importorskip("tritonclient.http")


def address(model: Model) -> str:
    return f"{model.target.host}:{model.target.port}{model.target.prefix}"


def tensors(module: Any, model: Model, feeds: dict[str, np.ndarray], binary: bool) -> tuple[list[Any], list[Any]]:
    """The client's own inputs and outputs; what has no JSON form in binary."""
    inputs = []
    for tensor in model.inputs:
        if tensor.datatype == "BF16":
            pytest.skip("the client makes BF16 out of float32 itself")
        inputs.append(module.InferInput(tensor.name, list(feeds[tensor.name].shape), tensor.datatype))
        inputs[-1].set_data_from_numpy(feeds[tensor.name], binary_data=binary or tensor.datatype in NO_JSON)
    return inputs, [module.InferRequestedOutput(tensor.name, binary_data=binary or tensor.datatype in NO_JSON) for tensor in model.outputs]


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_tritonclient_gets_every_answer(model: Model, binary: bool, compression: str | None) -> None:
    if binary:
        model.need("binary_tensor_data")
    client = triton.InferenceServerClient(address(model), network_timeout=20, connection_timeout=20)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(model.name)
    assert client.get_server_metadata()["extensions"] == list(model.extensions) and client.get_model_metadata(model.name) == model.about
    for batch in {1, model.largest}:
        feeds = model.rows(batch, batch)
        inputs, outputs = tensors(triton, model, feeds, binary)
        result = client.infer(model.name, inputs, outputs=outputs, request_id="r", request_compression_algorithm=compression, response_compression_algorithm=compression)
        assert result.get_response()["id"] == "r"
        for name, values in model.infer(feeds).outputs.items():
            np.testing.assert_array_equal(result.as_numpy(name), values, err_msg=name)
    client.close()


def test_tritonclient_reads_what_is_refused(model: Model) -> None:
    from tritonclient.utils import InferenceServerException

    client = triton.InferenceServerClient(address(model))
    inputs, _ = tensors(triton, model, model.rows(1), binary=model.binary)
    for arguments, status in (({"model_name": "no-such-model"}, "404"), ({"model_name": model.name, "model_version": "987654321"}, "404"), ({"model_name": model.name, "outputs": [triton.InferRequestedOutput("no-such-output")]}, "400")):
        with pytest.raises(InferenceServerException) as failed:
            client.infer(inputs=inputs, **arguments)
        assert failed.value.status() == status and failed.value.message()
    client.close()


def test_tritonclient_asks_for_configuration_statistics_and_repository(model: Model) -> None:
    client = triton.InferenceServerClient(address(model))
    if "model_configuration" in model.extensions:
        assert client.get_model_config(model.name)["name"] == model.name
    if "statistics" in model.extensions:
        assert model.name in {row["name"] for row in client.get_inference_statistics()["model_stats"]}
        assert client.get_inference_statistics(model.name)["model_stats"]
    if "model_repository" in model.extensions:
        assert model.name in {row["name"] for row in client.get_model_repository_index()}
    client.close()


def test_tritonclients_asyncio_half_asks_many_at_once(model: Model) -> None:
    aio = pytest.importorskip("tritonclient.http.aio")

    async def ask() -> list[Any]:
        async with aio.InferenceServerClient(address(model)) as client:
            assert await client.is_server_ready() and await client.is_model_ready(model.name)
            everything = [tensors(aio, model, model.rows(1, seed), model.binary) for seed in range(32)]
            return await asyncio.gather(*[client.infer(model.name, inputs, outputs=outputs, request_id=str(seed)) for seed, (inputs, outputs) in enumerate(everything)])

    for seed, result in enumerate(asyncio.run(ask())):
        assert result.get_response()["id"] == str(seed)
        for name, values in model.infer(model.rows(1, seed)).outputs.items():
            np.testing.assert_array_equal(result.as_numpy(name), values, err_msg=name)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("way", ["json", "binary", "compressed", "expect", "chunked", "http1.0"])
def test_curl_gets_the_answer(model: Model, way: str) -> None:
    if way == "binary":
        model.need("binary_tensor_data")
    feeds = model.rows(model.largest)
    tree, blobs = model.request(feeds, binary=way == "binary")
    # curl waits for a 100 before it sends more than a megabyte.
    body, headers = framed(json.dumps(tree).encode() + b" " * (2 << 20 if way == "expect" else 0), blobs)
    options = {"compressed": ["--compressed"], "chunked": ["-H", "Transfer-Encoding: chunked"], "http1.0": ["--http1.0"]}.get(way, [])
    lines = [option for name, value in headers.items() for option in ("-H", f"{name}: {value}")]
    command = ["curl", "-sS", "-k", "--max-time", "20", "-D", "/dev/stderr", "--data-binary", "@-", *options, *lines, model.target.url + model.infer_path]
    done = subprocess.run(command, input=body, capture_output=True, timeout=30, check=True)
    *_, head = done.stderr.decode("latin-1").strip().split("\r\n\r\n")
    status, *fields = head.split("\r\n")
    named = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    named.pop("content-encoding", None)  # which curl has undone
    same(model.answer(Reply(int(status.split()[1]), named, done.stdout)), model.infer(feeds))
