"""The same protocol over gRPC, asked by tritonclient, and by a plain channel for what it does not know."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from conformance.conftest import OWN_MODELS, option
from conformance.models import NO_JSON, Model, Tensor, close, discovered
from conformance.wire import Target

triton = pytest.importorskip("tritonclient.grpc")
TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def address(request: pytest.FixtureRequest) -> str:
    url = option(request.config, "--url")
    found = option(request.config, "--grpc") if url or option(request.config, "--grpc") else request.getfixturevalue("ours").get("grpc")
    if not found:
        pytest.skip("no --grpc HOST:PORT")
    return str(found)


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    client = triton.InferenceServerClient(address)
    yield client
    client.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """gRPC has one path, whatever HTTP has."""
    if "asked" in metafunc.fixturenames:
        names = option(metafunc.config, "--model")
        metafunc.parametrize("asked", names or (["first"] if option(metafunc.config, "--url") or option(metafunc.config, "--grpc") else OWN_MODELS), indirect=True, scope="module")


@pytest.fixture(scope="module")
def asked(request: pytest.FixtureRequest, client: Any) -> Model:
    """A model as gRPC describes it; no HTTP needed."""
    about = client.get_server_metadata(as_json=True, client_timeout=TIMEOUT_S)
    extensions = tuple(about.get("extensions", ()))
    name = request.param
    if name == "first":
        name = client.get_model_repository_index(as_json=True, client_timeout=TIMEOUT_S)["models"][0]["name"]
    metadata = client.get_model_metadata(name, as_json=True, client_timeout=TIMEOUT_S)
    for kind in ("inputs", "outputs"):
        for tensor in metadata[kind]:
            tensor["shape"] = [int(size) for size in tensor.get("shape", [])]  # JSON of protobuf has 64 bits as text
    return Model(Target("http://unused"), name, metadata, {}, extensions)


def tensors(model: Model, feeds: dict[str, np.ndarray]) -> tuple[list[Any], list[Any]]:
    inputs = []
    for tensor in model.inputs:
        if tensor.datatype == "BF16":
            pytest.skip("the client makes BF16 out of float32 itself")
        inputs.append(triton.InferInput(tensor.name, list(feeds[tensor.name].shape), tensor.datatype))
        inputs[-1].set_data_from_numpy(feeds[tensor.name])
    return inputs, [triton.InferRequestedOutput(tensor.name) for tensor in model.outputs]


def infer(client: Any, model: Model, feeds: dict[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
    inputs, outputs = tensors(model, feeds)
    result = client.infer(model.name, inputs, outputs=outputs, client_timeout=TIMEOUT_S, **options)
    return {tensor.name: result.as_numpy(tensor.name) for tensor in model.outputs}


def code_of(call: Any, *arguments: Any, **options: Any) -> str:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException) as failed:
        call(*arguments, client_timeout=TIMEOUT_S, **options)
    assert failed.value.message() and "Traceback" not in failed.value.message()
    return str(failed.value.status()).removeprefix("StatusCode.")


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_the_server_and_its_models_are_live_and_ready(client: Any, asked: Model) -> None:
    assert client.is_server_live(client_timeout=TIMEOUT_S) and client.is_server_ready(client_timeout=TIMEOUT_S)
    assert client.is_model_ready(asked.name, client_timeout=TIMEOUT_S)
    for version in asked.about.get("versions", ()):
        assert client.is_model_ready(asked.name, version, client_timeout=TIMEOUT_S)
    about = client.get_server_metadata(client_timeout=TIMEOUT_S)
    assert about.name and about.version and list(about.extensions) == list(asked.extensions)


def test_grpc_and_http_describe_a_model_alike(client: Any, asked: Model, request: pytest.FixtureRequest) -> None:
    url = option(request.config, "--url") or (None if option(request.config, "--grpc") else request.getfixturevalue("ours")["data port"])
    if url is None:
        pytest.skip("no --url to hold it against")
    over_http = discovered(Target(url.rstrip("/")), asked.name)
    assert (asked.inputs, asked.outputs, asked.about["versions"]) == (over_http.inputs, over_http.outputs, over_http.about["versions"])


def test_the_configuration_is_what_perf_analyzer_reads(client: Any, asked: Model) -> None:
    asked.need("model_configuration")
    config = client.get_model_config(asked.name, client_timeout=TIMEOUT_S).config
    assert config.name == asked.name and config.max_batch_size >= 0
    assert [entry.name for entry in config.input] == [tensor.name for tensor in asked.inputs]
    assert [entry.name for entry in config.output] == [tensor.name for tensor in asked.outputs]


def test_statistics_count_samples(client: Any, asked: Model) -> None:
    asked.need("statistics")

    def counted() -> int:
        return sum(row.inference_count for row in client.get_inference_statistics(asked.name, client_timeout=TIMEOUT_S).model_stats)

    before = counted()
    for batch in (1, 2) if asked.largest > 1 else (1, 1, 1):
        infer(client, asked, asked.rows(batch))
    assert counted() - before == 3


def test_the_repository_lists_the_model(client: Any, asked: Model) -> None:
    asked.need("model_repository")
    rows = client.get_model_repository_index(client_timeout=TIMEOUT_S).models
    assert {row.version for row in rows if (row.name, row.state) == (asked.name, "READY")} <= set(asked.about["versions"])


def test_health_is_said_by_the_standard_service_too(address: str) -> None:
    grpc = pytest.importorskip("grpc")
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            assert check(b"", timeout=TIMEOUT_S) == b"\x08\x01"  # status: SERVING
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                pytest.skip("the server has no grpc.health.v1")
            raise
        with pytest.raises(grpc.RpcError) as failed:
            check(b"\x0a\x0fno-such-service", timeout=TIMEOUT_S)
        assert failed.value.code() is grpc.StatusCode.NOT_FOUND


# --- answers ----------------------------------------------------------------------------------------------------------


def test_rows_of_a_batch_have_the_answers_they_have_alone(client: Any, asked: Model) -> None:
    batch = min(asked.need_batches(), 16)
    feeds = asked.rows(batch)
    together = infer(client, asked, feeds)
    for row in range(batch):
        for name, values in infer(client, asked, {name: values[row : row + 1] for name, values in feeds.items()}).items():
            assert close(together[name][row : row + 1], values), f"row {row} of {name}"


def test_grpc_and_http_answer_alike(client: Any, asked: Model, request: pytest.FixtureRequest) -> None:
    url = option(request.config, "--url") or (None if option(request.config, "--grpc") else request.getfixturevalue("ours")["data port"])
    if url is None:
        pytest.skip("no --url to hold it against")
    over_http, feeds = discovered(Target(url.rstrip("/")), asked.name), asked.rows(asked.largest)
    for name, values in over_http.infer(feeds, binary=over_http.binary).outputs.items():
        np.testing.assert_array_equal(infer(client, asked, feeds)[name], values)


TYPED = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents",
    "UINT32": "uint_contents", "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


def typed(model: Model, feeds: dict[str, np.ndarray], tensors: list[Tensor]) -> Any:
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(model_name=model.name, id="t")
    for tensor in tensors:
        values = feeds[tensor.name]
        entry = message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=list(values.shape))
        getattr(entry.contents, TYPED[tensor.datatype]).extend(values.ravel().tolist())
    return message


def sent(address: str, message: Any) -> Any:
    import grpc
    from tritonclient.grpc import service_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        return service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message, timeout=TIMEOUT_S)


def test_typed_contents_are_the_same_as_raw_ones(client: Any, asked: Model, address: str) -> None:
    if any(tensor.datatype in NO_JSON for tensor in asked.inputs):
        pytest.skip("the model takes FP16 or BF16, for which there are no typed contents")
    feeds = asked.rows(min(asked.largest, 2))
    reply, expected = sent(address, typed(asked, feeds, list(asked.inputs))), infer(client, asked, feeds)
    assert reply.id == "t" and reply.model_name == asked.name
    for index, entry in enumerate(reply.outputs):
        tensor = next(tensor for tensor in asked.outputs if tensor.name == entry.name)
        contents = reply.raw_output_contents[index] if reply.raw_output_contents else None
        values = np.frombuffer(contents, tensor.dtype) if contents is not None else np.array(list(getattr(entry.contents, TYPED[entry.datatype])), tensor.dtype)
        np.testing.assert_array_equal(values.reshape(list(entry.shape)), expected[entry.name])


def test_typed_and_raw_contents_in_one_request_are_invalid(asked: Model, address: str) -> None:
    grpc = pytest.importorskip("grpc")
    tensors = [tensor for tensor in asked.inputs if tensor.datatype not in NO_JSON]
    if not tensors:
        pytest.skip("no input has typed contents")
    message = typed(asked, asked.rows(1), tensors)
    message.raw_input_contents.append(bytes(4))
    with pytest.raises(grpc.RpcError) as failed:
        sent(address, message)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("id", ["r", "", "Grüße"])
def test_the_id_comes_back(client: Any, asked: Model, id: str) -> None:
    inputs, _ = tensors(asked, asked.rows(1))
    assert client.infer(asked.name, inputs, request_id=id, client_timeout=TIMEOUT_S).get_response().id == id


def test_only_the_outputs_that_were_asked_for_come(client: Any, asked: Model) -> None:
    inputs, outputs = tensors(asked, asked.rows(1))
    for output in outputs:
        reply = client.infer(asked.name, inputs, outputs=[output], client_timeout=TIMEOUT_S).get_response()
        assert [entry.name for entry in reply.outputs] == [output.name()]
    reply = client.infer(asked.name, inputs, client_timeout=TIMEOUT_S).get_response()
    assert [entry.name for entry in reply.outputs] == [tensor.name for tensor in asked.outputs]


def test_every_version_answers_itself(client: Any, asked: Model) -> None:
    inputs, _ = tensors(asked, asked.rows(1))
    for version in asked.about.get("versions", ()):
        assert client.infer(asked.name, inputs, model_version=version, client_timeout=TIMEOUT_S).get_response().model_version == version


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_messages_may_be_compressed(client: Any, asked: Model, compression: str) -> None:
    feeds = asked.rows(asked.largest)
    for name, values in infer(client, asked, feeds, compression_algorithm=compression).items():
        np.testing.assert_array_equal(values, infer(client, asked, feeds)[name])


# --- codes ------------------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_not_found(client: Any, asked: Model) -> None:
    inputs, _ = tensors(asked, asked.rows(1))
    assert code_of(client.infer, "no-such-model", inputs) == "NOT_FOUND"
    assert code_of(client.infer, asked.name, inputs, model_version="987654321") == "NOT_FOUND"
    assert code_of(client.get_model_metadata, "no-such-model") == "NOT_FOUND"
    assert code_of(client.get_model_metadata, asked.name, "987654321") == "NOT_FOUND"


def spoiled(asked: Model, **changes: Any) -> list[Any]:
    inputs, _ = tensors(asked, asked.rows(1))
    for name, value in changes.items():
        if name == "shape":
            del inputs[0]._input.shape[:]
            inputs[0]._input.shape.extend(value)
        else:
            setattr(inputs[0]._input, name, value)
    return inputs


def test_what_is_wrong_with_a_request_is_an_invalid_argument(client: Any, asked: Model) -> None:
    inputs, _ = tensors(asked, asked.rows(1))
    shape = list(asked.rows(1)[asked.inputs[0].name].shape)
    other = "INT16" if asked.inputs[0].datatype != "INT16" else "FP32"
    wrong = {
        "an unknown name": spoiled(asked, name="no-such-input"), "a datatype": spoiled(asked, datatype=other), "a rank": spoiled(asked, shape=[*shape, 1]), "a larger shape": spoiled(asked, shape=[shape[0] + 1, *shape[1:]]),
        "a negative dimension": spoiled(asked, shape=[-1, *shape[1:]]), "a dimension of zero": spoiled(asked, shape=[0, *shape[1:]]), "a huge dimension": spoiled(asked, shape=[(1 << 62) + 1, *shape[1:]]),
        "a missing input": inputs[1:], "an input twice": [inputs[0], *inputs],
    }  # fmt: skip
    for what, bad in wrong.items():
        assert code_of(client.infer, asked.name, bad) == "INVALID_ARGUMENT", what
    assert code_of(client.infer, asked.name, inputs, outputs=[triton.InferRequestedOutput("no-such-output")]) == "INVALID_ARGUMENT"
    infer(client, asked, asked.rows(1))


def test_bytes_that_are_no_message_are_an_error_and_the_next_one_is_answered(client: Any, asked: Model, address: str) -> None:
    grpc = pytest.importorskip("grpc")
    with grpc.insecure_channel(address) as channel:
        for data in (b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", bytes(1 << 20)):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(data, timeout=TIMEOUT_S)
        with pytest.raises(grpc.RpcError) as failed:
            channel.unary_unary("/inference.GRPCInferenceService/NoSuchMethod")(b"", timeout=TIMEOUT_S)
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
    infer(client, asked, asked.rows(1))


# --- a stream ---------------------------------------------------------------------------------------------------------


def test_a_stream_answers_each_message_and_an_error_ends_only_its_own(asked: Model, address: str) -> None:
    told: queue.Queue[tuple[Any, Any]] = queue.Queue()
    expected = {}
    with triton.InferenceServerClient(address) as client:
        for seed in range(16):
            expected[str(seed)] = infer(client, asked, asked.rows(1, seed))
        client.start_stream(callback=lambda result, error: told.put((result, error)))
        for seed in range(16):
            inputs, outputs = tensors(asked, asked.rows(1, seed))
            client.async_stream_infer(asked.name, inputs, outputs=outputs, request_id=str(seed))
            if seed == 7:
                client.async_stream_infer(asked.name, spoiled(asked, name="no-such-input"), request_id="wrong")
        answers = [told.get(timeout=TIMEOUT_S) for _ in range(17)]
        client.stop_stream()
    errors = [error for _, error in answers if error is not None]
    assert len(errors) == 1 and "no-such-input" not in str(errors[0].message())
    results = {result.get_response().id: result for result, error in answers if error is None}
    assert set(results) == set(expected)
    for id, outputs in expected.items():
        for name, values in outputs.items():
            np.testing.assert_array_equal(results[id].as_numpy(name), values, err_msg=f"{id} {name}")
