"""The gRPC port: real clients on real sockets against the real loop, with a small numpy engine behind the real batcher."""

from __future__ import annotations

import asyncio
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio
from google.protobuf import descriptor_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_http import served, until
from test_protocol import WEIGHTS, Every, Held
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, model_config_pb2, service_pb2
from tritonclient.http import InferenceServerClient as HttpClient
from tritonclient.http import InferInput as HttpInput
from tritonclient.utils import InferenceServerException

from portaisys.serve import codec
from portaisys.serve.core import Core, Listen
from portaisys.serve.grpc import HEALTH, SERVICE, STREAM_WAITING, message
from portaisys.serve.model import BlockedError
from portaisys.serve.repository import Repository
from portaisys.spec import UserError

ROOT = Path(__file__).parents[1]
PROTOS = ROOT / "platform/portaisys/serve"
Code = grpc.StatusCode


class Running:
    """A core that listens on both ports, with models that are made when they are loaded."""

    def __init__(self, *references: str, engine: Any = None, labels: tuple[str, ...] = (), tls: tuple[str, str] = ("", ""), **limits: Any) -> None:
        self.statuses: list[int] = []

        def opener(reference: str) -> Any:
            name, _, version = reference.partition("@")
            if version == "98":
                raise BlockedError(f"{reference}: its verdict is 'fail', so it is not served")
            if version == "99":
                raise UserError("/secret/version.json is damaged")
            model = served(name, version, engine, **limits)
            model.labels = labels
            return model

        self.models = Repository(opener, lambda reference: reference.replace(",", f",{reference.partition('@')[0]}@").split(",")[::-1])
        listen = Listen(http_port=0, grpc_port=0, tls_cert=tls[0], tls_key=tls[1])
        self.core = Core(self.models, references or ("tiny@3",), listen, self.statuses.append).start()
        self.port = self.core.ports["grpc"]
        self.url = f"127.0.0.1:{self.port}"
        self.channel = grpc.insecure_channel(self.url, options=[("grpc.use_local_subchannel_pool", 1)])

    def client(self) -> InferenceServerClient:
        return InferenceServerClient(self.url)

    def call(self, method: str, body: bytes = b"", timeout: float = 20.0, metadata: Any = None) -> tuple[bytes, dict[str, str]]:
        """Bytes there and back, and the trailing metadata. Raises grpc.RpcError."""
        reply, call = self.channel.unary_unary(method).with_call(body, timeout=timeout, metadata=metadata)
        return reply, dict(call.trailing_metadata())

    def infer(self, request: Any, **options: Any) -> Any:
        return service_pb2.ModelInferResponse.FromString(self.call(f"/{SERVICE}/ModelInfer", request.SerializeToString(), **options)[0])

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: Any) -> None:
        self.channel.close()
        self.core.stop(drain_s=1)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running() as running:
        yield running


@pytest.fixture(scope="module")
def every() -> Iterator[Running]:
    with Running(engine=Every()) as running:
        yield running


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 2, 3)).astype(np.float32)


def expected(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, 6) @ WEIGHTS


X = rows(1)


def tensor_of(x: np.ndarray) -> InferInput:
    tensor = InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return tensor


def infer(client: InferenceServerClient, x: np.ndarray, model: str = "tiny", **options: Any) -> np.ndarray:
    return client.infer(model, [tensor_of(x)], outputs=[InferRequestedOutput("logits")], **options).as_numpy("logits")


def right(x: np.ndarray, answer: np.ndarray) -> None:
    np.testing.assert_allclose(answer, expected(x), rtol=1e-5, atol=1e-6)


def valid(x: np.ndarray = X, **changes: Any) -> Any:
    """A raw request; `changes` to its only input, or to the request where it has a field of the name."""
    request = {"model_name": "tiny", "raw_input_contents": [x.tobytes()]}
    request |= {key: changes.pop(key) for key in list(changes) if key in service_pb2.ModelInferRequest.DESCRIPTOR.fields_by_name and key != "parameters"}
    return service_pb2.ModelInferRequest(**{"inputs": [{"name": "x", "datatype": "FP32", "shape": list(x.shape), **changes}], **request})


def refused(server: Running, request: Any, method: str = "ModelInfer", **options: Any) -> tuple[grpc.StatusCode, str]:
    body = request if isinstance(request, bytes) else request.SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        server.call(method if method.startswith("/") else f"/{SERVICE}/{method}", body, **options)
    return caught.value.code(), caught.value.details()


# --- the messages ---------------------------------------------------------------------------------------------------


def test_the_compiled_messages_are_what_the_proto_says(tmp_path: Path) -> None:
    pythons = [sys.executable, str(ROOT / ".venvs/proto/bin/python")]
    compiler = next((one for one in pythons if Path(one).exists() and subprocess.run([one, "-c", "import grpc_tools"], capture_output=True).returncode == 0), None)
    if compiler is None:
        pytest.skip("needs grpcio-tools (make proto)")
    out = tmp_path / "out.binpb"
    subprocess.run([compiler, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"--descriptor_set_out={out}", "inference.proto", "health.proto"], check=True)
    committed, fresh = (descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()) for path in (PROTOS / "inference.binpb", out))
    assert committed == fresh


def described() -> Any:
    (file,) = [file for file in descriptor_pb2.FileDescriptorSet.FromString((PROTOS / "inference.binpb").read_bytes()).file if file.package == "inference"]
    return file


def fields_of(one: Any) -> dict[str, Any]:
    return {field.name: (field.number, field.type, field.label, field.type_name, field.HasField("oneof_index")) for field in one.field}


def test_every_message_field_has_the_number_and_type_it_has_at_triton() -> None:
    theirs: dict[str, Any] = {}
    for module in (service_pb2, model_config_pb2):
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        theirs |= {one.name: one for one in [*file.message_type, *file.enum_type, *file.service]}
    ours = described()
    for one in ours.message_type:
        assert fields_of(one).items() <= fields_of(theirs[one.name]).items(), one.name
        for nested in one.nested_type:
            (same,) = [other for other in theirs[one.name].nested_type if other.name == nested.name]
            assert fields_of(nested) == fields_of(same), (one.name, nested.name)
    assert ours.enum_type[0] == theirs["DataType"]
    methods = {method.name: method for method in theirs["GRPCInferenceService"].method}
    assert all(method == methods[method.name] for method in ours.service[0].method)


def test_our_messages_and_a_clients_of_the_same_name_live_in_one_process() -> None:
    ours, theirs = message("inference.ModelInferRequest"), service_pb2.ModelInferRequest
    assert ours is not theirs and ours.FromString(valid().SerializeToString()).SerializeToString() == valid().SerializeToString()


# --- answers --------------------------------------------------------------------------------------------------------


def test_an_unmodified_client_gets_the_right_answers(server: Running) -> None:
    client = server.client()
    for batch in (1, 2, 8, 20):
        x = rows(batch, batch)
        right(x, infer(client, x))
        right(x, infer(client, x, model_version="3", request_id="7", priority=2, timeout=20_000_000))
        right(x, client.infer("tiny", [tensor_of(x)], compression_algorithm="gzip").as_numpy("logits"))
    answer = client.infer("tiny", [tensor_of(X)], request_id="a7").get_response()
    assert (answer.model_name, answer.model_version, answer.id) == ("tiny", "3", "a7")


def test_an_unmodified_asyncio_client_gets_the_right_answers(server: Running) -> None:
    async def ask() -> list[np.ndarray]:
        async with tritonclient.grpc.aio.InferenceServerClient(server.url) as client:
            assert await client.is_server_live() and await client.is_model_ready("tiny")
            answers = await asyncio.gather(*[client.infer("tiny", [tensor_of(rows(2, seed))]) for seed in range(40)])
            return [answer.as_numpy("logits") for answer in answers]

    for seed, answer in enumerate(asyncio.run(ask())):
        right(rows(2, seed), answer)


def test_a_model_describes_itself(server: Running) -> None:
    client = server.client()
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny", "3")
    assert not client.is_model_ready("other") and not client.is_model_ready("tiny", "9")
    about = client.get_server_metadata(as_json=True)
    assert about["name"] == "portaisys" and "statistics" in about["extensions"]
    for version in ("", "3"):
        model = client.get_model_metadata("tiny", version, as_json=True)
        assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "2", "3"]}] and model["versions"] == ["3"]
        config = client.get_model_config("tiny", version, as_json=True)["config"]
        assert config["max_batch_size"] == 8 and config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": ["2", "3"]}] and "dynamic_batching" in config
    assert client.get_model_repository_index(as_json=True)["models"] == [{"name": "tiny", "version": "3", "state": "READY"}]


def test_statistics_count_samples_batches_and_nanoseconds() -> None:
    with Running() as server:
        client = server.client()
        for batch in (1, 2, 2):
            infer(client, rows(batch))
        for name in ("tiny", ""):
            (stats,) = client.get_inference_statistics(name).model_stats
            assert (stats.inference_count, stats.execution_count, stats.inference_stats.success.count) == (5, 3, 3)
            assert [(row.batch_size, row.compute_infer.count) for row in stats.batch_stats] == [(1, 1), (2, 2)]
            assert stats.inference_stats.compute_infer.ns > 0 and stats.last_inference > 1e12


DATATYPES = {name: codec.DATATYPES[name].name for name in Every.TYPES}
FIELDS = {"bool": "bool_contents", "int64": "int64_contents", "uint64": "uint64_contents", "float32": "fp32_contents", "float64": "fp64_contents"}


def contents_of(values: np.ndarray) -> dict[str, Any]:
    name = FIELDS.get(values.dtype.name, "uint_contents" if values.dtype.kind == "u" else "int_contents")
    return {name: values.ravel().tolist()}


def extremes(dtype: str) -> np.ndarray:
    if dtype == "bool":
        return np.array([[False, True]])
    info: Any = np.finfo(dtype) if dtype.startswith("float") else np.iinfo(dtype)
    return np.array([[info.min, info.max]], dtype)


def test_every_datatype_survives_both_ways_raw(every: Running) -> None:
    tensors = [InferInput(name, [1, 2], datatype) for name, datatype in DATATYPES.items()]
    for tensor, name in zip(tensors, DATATYPES, strict=True):
        tensor.set_data_from_numpy(extremes(name))
    answer = every.client().infer("tiny", tensors)
    for name in DATATYPES:
        assert answer.as_numpy(name).dtype == name and (answer.as_numpy(name) == extremes(name)).all()


@pytest.mark.parametrize("dtype", [name for name in Every.TYPES if name != "float16"])
def test_every_datatype_survives_as_contents(dtype: str) -> None:
    with Running(engine=Only(dtype)) as server:
        one = {"name": "x", "datatype": DATATYPES[dtype], "shape": [1, 2], "contents": contents_of(extremes(dtype))}
        answer = server.infer(service_pb2.ModelInferRequest(model_name="tiny", inputs=[one]))
        assert answer.outputs[0].datatype == DATATYPES[dtype] and list(answer.outputs[0].shape) == [1, 2] and not answer.outputs[0].HasField("contents")
        assert (np.frombuffer(answer.raw_output_contents[0], dtype) == extremes(dtype)[0]).all()


class Only(Every):
    """One input of a datatype, given back."""

    def __init__(self, dtype: str) -> None:
        self.inputs = self.outputs = tuple(type(Every.inputs[0])("x", one.dtype, one.shape) for one in Every.inputs if one.dtype == dtype)


def test_classification_gives_the_best_labels_and_none_where_there_are_none(server: Running) -> None:
    outputs = [InferRequestedOutput("logits", class_count=2)]
    with Running(labels=("cat", "dog", "eel", "fox")) as labelled:
        texts = labelled.client().infer("tiny", [tensor_of(np.ones((2, 2, 3), np.float32))], outputs=outputs).as_numpy("logits").astype(str)
        assert texts.shape == (2, 2) and [text.split(":")[1:] for text in texts[0]] == [["3", "fox"], ["2", "eel"]]
    texts = server.client().infer("tiny", [tensor_of(np.ones((1, 2, 3), np.float32))], outputs=outputs).as_numpy("logits").astype(str)
    assert [text.split(":")[1:] for text in texts[0]] == [["3"], ["2"]]


def test_classification_orders_every_datatype(every: Running) -> None:
    tensors = [InferInput(name, [1, 2], datatype) for name, datatype in DATATYPES.items()]
    for tensor, name in zip(tensors, DATATYPES, strict=True):
        tensor.set_data_from_numpy(np.array([[0, 1]]).astype(name))
    answer = every.client().infer("tiny", tensors, outputs=[InferRequestedOutput(name, class_count=1) for name in DATATYPES])
    assert {str(answer.as_numpy(name)[0][0], "ascii") for name in DATATYPES} == {"1.000000:1"}


def test_every_answer_says_which_engine_gave_it_and_repeats_the_requests_id(server: Running) -> None:
    _, trailing = server.call(f"/{SERVICE}/ModelInfer", valid().SerializeToString(), metadata=[("x-request-id", "r7")])
    assert trailing["x-portaisys-lineage"] == "tiny/3 fp32 dddddddddddd" and trailing["x-request-id"] == "r7"
    with pytest.raises(grpc.RpcError) as caught:
        server.call(f"/{SERVICE}/ModelInfer", valid(model_name="other").SerializeToString(), metadata=[("x-request-id", "r8")])
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "r8"
    assert "x-request-id" not in server.call(f"/{SERVICE}/ModelInfer", valid().SerializeToString())[1]


def test_heads_are_remembered_whatever_the_id_and_forgotten_with_the_models() -> None:
    with Running() as server:
        for number in range(20):
            x = rows(1, number)
            answer = server.infer(valid(x, id=f"request {number}"))
            right(x, np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(1, 4))
            assert answer.id == f"request {number}"
        lane = server.core._grpc_port.lane
        assert len(lane._known) == 1
        server.client().load_model("second", config='{"parameters": {}}')
        server.infer(valid(rows(2)))
        assert len(lane._known) == 1


def test_a_request_laid_out_unusually_means_the_same(server: Running) -> None:
    usual = valid(id="7")
    raw, head = usual.SerializeToString(), valid(id="7", raw_input_contents=[]).SerializeToString()
    tensors = raw[len(head) :]
    for body in (tensors + head, head + tensors + service_pb2.ModelInferRequest(id="8").SerializeToString(), head + b"\xfa\x3f\x01x" + tensors, head + b"\x0a\x84\x80\x00tiny" + tensors):
        answer = service_pb2.ModelInferResponse.FromString(server.call(f"/{SERVICE}/ModelInfer", body)[0])
        right(X, np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(1, 4))
        assert answer.id == service_pb2.ModelInferRequest.FromString(body).id


def test_requests_of_both_protocols_share_a_batch() -> None:
    engine = Held()
    with Running(engine=engine) as server:
        model = server.models.pick("tiny")
        answers: dict[int, np.ndarray] = {}
        xs = [rows(1, seed) for seed in range(3)]

        def ask_http(number: int) -> None:
            tensor = HttpInput("x", [1, 2, 3], "FP32")
            tensor.set_data_from_numpy(xs[number])
            answers[number] = HttpClient(f"127.0.0.1:{server.core.ports['http']}").infer("tiny", [tensor]).as_numpy("logits")

        def ask_grpc(number: int) -> None:
            answers[number] = infer(server.client(), xs[number])

        threads = []
        for number, ask in enumerate((ask_grpc, ask_http, ask_grpc)):
            threads.append(threading.Thread(target=ask, args=(number,)))
            threads[-1].start()
            until(lambda number=number: model.batcher.busy_s() > 0 and model.batcher.queued == number)
        engine.go.set()
        for thread in threads:
            thread.join(20)
        for number, x in enumerate(xs):
            right(x, answers[number])
        assert (model.stats.batches, model.stats.samples) == (2, 3)


def test_a_request_of_megabytes_is_answered() -> None:
    with Running(max_batch=4096, max_queue=1 << 20) as server:
        x = rows(100_000)
        right(x, infer(InferenceServerClient(server.url, channel_args=[("grpc.max_receive_message_length", -1)]), x))


# --- streams --------------------------------------------------------------------------------------------------------


class Stream:
    """tritonclient's stream, its answers in a queue."""

    def __init__(self, server: Running) -> None:
        self.client, self.answers = server.client(), queue.SimpleQueue()
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))

    def ask(self, x: np.ndarray, model: str = "tiny", **options: Any) -> None:
        self.client.async_stream_infer(model, [tensor_of(x)], **options)

    def next(self) -> tuple[Any, Any]:
        return self.answers.get(timeout=20)


def test_a_stream_is_answered_in_order_and_its_requests_are_batched_together() -> None:
    engine = Held()
    with Running(engine=engine) as server:
        model, stream = server.models.pick("tiny"), Stream(server)
        for seed in range(9):
            stream.ask(rows(1, seed), request_id=str(seed))
        until(lambda: model.batcher.queued == 8)
        engine.go.set()
        for seed in range(9):
            result, error = stream.next()
            assert error is None and result.get_response().id == str(seed)
            right(rows(1, seed), result.as_numpy("logits"))
        assert model.stats.batches == 2
        stream.client.stop_stream()


def test_a_request_that_fails_is_a_message_of_the_stream_which_goes_on(server: Running) -> None:
    stream = Stream(server)
    stream.ask(X)
    stream.ask(X, model="other")
    stream.ask(rows(1)[:, :1], request_id="8")
    stream.ask(X, enable_empty_final_response=True)
    answers = [stream.next() for _ in range(4)]
    for result, error in (answers[0], answers[3]):
        assert error is None
        right(X, result.as_numpy("logits"))
    assert "unknown model; this server has tiny" in str(answers[1][1]) and "has shape" in str(answers[2][1])
    stream.client.stop_stream()


def test_a_refusal_in_a_stream_names_the_request(server: Running) -> None:
    calls = server.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
    bodies = [valid(id="a", model_name="other").SerializeToString(), b"\xff", valid(id="c").SerializeToString()]
    replies = [service_pb2.ModelStreamInferResponse.FromString(reply) for reply in calls(iter(bodies), timeout=20)]
    assert [reply.infer_response.id for reply in replies] == ["a", "", "c"]
    assert [bool(reply.error_message) for reply in replies] == [True, True, False] and "is no ModelInferRequest" in replies[1].error_message


def test_a_stream_holds_no_more_than_its_bound_and_answers_everything() -> None:
    engine = Held()
    with Running(engine=engine, max_batch=1, max_queue=1000) as server:
        model = server.models.pick("tiny")
        calls = server.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        replies = calls(iter([valid().SerializeToString()] * 400), timeout=30)
        until(lambda: model.batcher.queued == STREAM_WAITING - 1)
        engine.go.set()
        assert len(list(replies)) == 400 and model.stats.requests == 400


def test_a_client_that_leaves_its_stream_takes_what_waits_with_it() -> None:
    engine = Held()
    with Running(engine=engine, max_batch=1) as server:
        model, stream = server.models.pick("tiny"), Stream(server)
        for _ in range(5):
            stream.ask(X)
        until(lambda: model.batcher.queued == 4)
        stream.client.stop_stream(cancel_requests=True)
        until(lambda: model.batcher.queued == 0)
        engine.go.set()
        right(X, infer(server.client(), X))


# --- what is refused ------------------------------------------------------------------------------------------------


def contents(**fields: Any) -> dict[str, Any]:
    return {"raw_input_contents": [], "contents": fields}


def parameter(**choice: Any) -> dict[str, Any]:
    return {**valid_tree(), "parameters": {next(iter(choice)): choice[next(iter(choice))]}}


def valid_tree() -> dict[str, Any]:
    return {"model_name": "tiny", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2, 3]}], "raw_input_contents": [X.tobytes()]}


def with_parameter(name: str, **choice: Any) -> Any:
    return service_pb2.ModelInferRequest(**valid_tree(), parameters={name: service_pb2.InferParameter(**choice)})


ONES = [1.0] * 6
BAD: dict[str, tuple[Any, grpc.StatusCode, str]] = {
    "unknown model": (valid(model_name="other"), Code.NOT_FOUND, "unknown model; this server has tiny"),
    "no model": (valid(model_name=""), Code.NOT_FOUND, "unknown model"),
    "unknown version": (valid(model_version="9"), Code.NOT_FOUND, "unknown version of tiny; this server has 3"),
    "a path for a version": (valid(model_version="../3"), Code.NOT_FOUND, "unknown version"),
    "no message": (b"\xff\xff", Code.INVALID_ARGUMENT, "the request is no ModelInferRequest"),
    "no message behind a head": (valid().SerializeToString()[:-1], Code.INVALID_ARGUMENT, "the request is no ModelInferRequest"),
    "a length of a thousand bytes": (b"\x0a" + b"\x80" * 1000, Code.INVALID_ARGUMENT, "the request is no ModelInferRequest"),
    "an id that is no UTF-8": (valid(id="@@").SerializeToString().replace(b"@@", b"\xff\xfe"), Code.INVALID_ARGUMENT, "the request is no ModelInferRequest"),
    "a name that is no UTF-8": (valid(model_name="@@").SerializeToString().replace(b"@@", b"\xff\xfe"), Code.INVALID_ARGUMENT, "the request is no ModelInferRequest"),
    "empty": (b"", Code.NOT_FOUND, "unknown model"),
    "no inputs": (valid(inputs=[], raw_input_contents=[]), Code.INVALID_ARGUMENT, "missing input x"),
    "raw without inputs": (valid(inputs=[]), Code.INVALID_ARGUMENT, "1 raw_input_contents for 0 inputs"),
    "two raw for one input": (valid(raw_input_contents=[X.tobytes()] * 2), Code.INVALID_ARGUMENT, "2 raw_input_contents for 1 inputs"),
    "raw and contents": (valid(contents={"fp32_contents": ONES}), Code.INVALID_ARGUMENT, "exclude each other"),
    "neither": (valid(raw_input_contents=[]), Code.INVALID_ARGUMENT, "neither contents nor raw_input_contents"),
    "contents elsewhere": (valid(**contents(fp64_contents=ONES)), Code.INVALID_ARGUMENT, "contents of its datatype stand in fp32_contents alone"),
    "contents twice": (valid(**contents(fp32_contents=ONES, int_contents=[1])), Code.INVALID_ARGUMENT, "stand in fp32_contents alone"),
    "too few elements": (valid(**contents(fp32_contents=ONES[1:])), Code.INVALID_ARGUMENT, "5 elements where the shape needs 6"),
    "no elements": (valid(**contents()), Code.INVALID_ARGUMENT, "0 elements where the shape needs 6"),
    "NaN in contents": (valid(**contents(fp32_contents=[float("nan")] * 6)), Code.INVALID_ARGUMENT, "holds NaN"),
    "NaN": (valid(np.full((1, 2, 3), np.nan, np.float32)), Code.INVALID_ARGUMENT, "holds NaN"),
    "raw too short": (valid(raw_input_contents=[b"\0" * 20]), Code.INVALID_ARGUMENT, "20 bytes where shape and datatype need 24"),
    "raw too long": (valid(raw_input_contents=[b"\0" * 28]), Code.INVALID_ARGUMENT, "28 bytes where shape and datatype need 24"),
    "raw empty": (valid(raw_input_contents=[b""]), Code.INVALID_ARGUMENT, "0 bytes where"),
    "unknown input": (valid(name="y"), Code.INVALID_ARGUMENT, "unknown input name; the model has x"),
    "input twice": (valid(inputs=valid_tree()["inputs"] * 2, raw_input_contents=[X.tobytes()] * 2), Code.INVALID_ARGUMENT, "stands twice"),
    "wrong datatype": (valid(datatype="FP64"), Code.INVALID_ARGUMENT, "has datatype FP32"),
    "BYTES": (valid(datatype="BYTES"), Code.INVALID_ARGUMENT, "has datatype FP32"),
    "wrong dim": (valid(shape=[1, 3, 2]), Code.INVALID_ARGUMENT, "has shape"),
    "negative dims": (valid(shape=[1, -2, -3]), Code.INVALID_ARGUMENT, "has shape"),
    "zero dim": (valid(shape=[0, 2, 3], raw_input_contents=[b""]), Code.INVALID_ARGUMENT, "has shape"),
    "huge dim": (valid(shape=[2**62, 2, 3]), Code.INVALID_ARGUMENT, "24 bytes where shape and datatype need more than can be sent"),
    "unknown output": (valid(outputs=[{"name": "probabilities"}]), Code.INVALID_ARGUMENT, "unknown output name"),
    "output twice": (valid(outputs=[{"name": "logits"}] * 2), Code.INVALID_ARGUMENT, "stands twice"),
    "timeout negative": (with_parameter("timeout", int64_param=-1), Code.INVALID_ARGUMENT, "timeout is a number of microseconds"),
    "timeout a string": (with_parameter("timeout", string_param="1"), Code.INVALID_ARGUMENT, "timeout is not an integer"),
    "priority too large": (with_parameter("priority", uint64_param=2**64 - 1), Code.INVALID_ARGUMENT, "priority is a number"),
    "shared memory": (with_parameter("shared_memory_region", string_param="r"), Code.INVALID_ARGUMENT, "shared memory is not supported"),
    "more samples than the queue": (valid(rows(65)), Code.INVALID_ARGUMENT, "65 samples in one request; at most 64"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_request_is_refused_with_a_code_and_a_reason_and_the_next_one_is_answered(server: Running, what: str) -> None:
    request, code, says = BAD[what]
    for _ in range(2):  # before and after its head is remembered
        found, details = refused(server, request)
        assert (found, "secret" in details, len(details) < 200) == (code, False, True) and says in details, details
    assert server.infer(valid()).model_name == "tiny"


def test_the_two_protocols_refuse_in_the_same_words(server: Running) -> None:
    http = HttpClient(f"127.0.0.1:{server.core.ports['http']}")
    tensor = HttpInput("x", [1, 3, 2], "FP32")
    tensor.set_data_from_numpy(X.reshape(1, 3, 2))
    with pytest.raises(InferenceServerException) as over_http:
        http.infer("tiny", [tensor])
    with pytest.raises(InferenceServerException) as over_grpc:
        server.client().infer("tiny", [tensor_of(X.reshape(1, 3, 2))])
    assert over_http.value.message() == over_grpc.value.message() and over_grpc.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_fp16_has_no_contents_and_elements_beyond_a_datatype_are_refused(every: Running) -> None:
    for dtype, field, says in (("float16", {"fp32_contents": [1.0]}, "no form in contents"), ("int8", {"int_contents": [128]}, "an element is not a INT8"), ("uint16", {"uint_contents": [1 << 16]}, "an element is not a UINT16")):
        with Running(engine=Only(dtype)) as server:
            one = {"name": "x", "datatype": DATATYPES[dtype], "shape": [1, 1], "contents": field}
            code, details = refused(server, service_pb2.ModelInferRequest(model_name="tiny", inputs=[one]))
            assert code == Code.INVALID_ARGUMENT and says in details


def test_inputs_of_different_batch_and_a_bool_of_two_are_refused(every: Running) -> None:
    def request(int8_rows: int, boolean: bytes) -> Any:
        inputs = [{"name": name, "datatype": datatype, "shape": [int8_rows if name == "int8" else 1, 1]} for name, datatype in DATATYPES.items()]
        raw = [b"\0" * int8_rows if name == "int8" else boolean if name == "bool" else b"\0" * np.dtype(name).itemsize for name in DATATYPES]
        return service_pb2.ModelInferRequest(model_name="tiny", inputs=inputs, raw_input_contents=raw)

    assert every.infer(request(1, b"\1")).model_name == "tiny"
    assert "differ in dimension 0" in refused(every, request(2, b"\1"))[1] and "a byte of 0 or 1" in refused(every, request(1, b"\2"))[1]


def test_what_is_not_offered_is_unimplemented_and_too_much_is_exhausted(server: Running) -> None:
    client = server.client()
    with pytest.raises(InferenceServerException) as caught:
        client.get_system_shared_memory_status()
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    assert refused(server, b"", "/no/such")[0] == Code.UNIMPLEMENTED
    code, details = refused(server, b"\0" * (codec.MAX_BODY_BYTES + 1))
    assert code == Code.RESOURCE_EXHAUSTED and "larger than max" in details
    right(X, infer(client, X))


def test_calls_that_others_gave_up_by_the_thousand_do_not_end_ours() -> None:
    with Running() as server:
        go, blocked = threading.Event(), threading.Event()
        server.core._loop.call_soon_threadsafe(lambda: (blocked.set(), go.wait(30)))  # a busy server takes no call up
        assert blocked.wait(10)
        body = valid().SerializeToString()
        leavers = [grpc.insecure_channel(server.url, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(4)]
        for channel in leavers:
            grpc.channel_ready_future(channel).result(10)
            calls = [channel.unary_unary(f"/{SERVICE}/ModelInfer").future(body, timeout=30) for _ in range(900)]
            for call in calls:
                call.cancel()
        ours = [server.channel.unary_unary(f"/{SERVICE}/ModelInfer").future(body, timeout=30) for _ in range(50)]
        grpc.channel_ready_future(server.channel).result(10)
        threading.Timer(1.0, go.set).start()  # ours are on their way; nothing tells from outside that they came
        for call in ours:
            assert service_pb2.ModelInferResponse.FromString(call.result()).model_name == "tiny"
        for channel in leavers:
            channel.close()


def test_an_engine_failure_is_internal_and_leaks_nothing(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    code, details = refused(server, valid(np.full((1, 2, 3), 13, np.float32)))
    assert code == Code.INTERNAL and "secret" not in details and "/" not in details and "10.0.0.7" not in details
    assert "secret" in caplog.text  # the log has the cause
    right(X, infer(server.client(), X))


def test_replies_are_counted_by_the_status_of_http() -> None:
    with Running() as server:
        server.infer(valid())
        refused(server, valid(model_name="other"))
        refused(server, valid(shape=[1]))
        assert server.statuses == [200, 404, 400]


# --- load, time, leaving --------------------------------------------------------------------------------------------


def test_a_full_queue_is_exhausted_and_a_timeout_is_a_deadline_while_the_batch_runs() -> None:
    engine = Held()
    with Running(engine=engine, max_batch=1, max_queue=1) as server:
        model, client = server.models.pick("tiny"), server.client()
        first: list[str] = []
        one = threading.Thread(target=lambda: first.append(status_of(lambda: infer(client, X, timeout=300_000))))
        one.start()
        until(lambda: model.batcher.busy_s() > 0)
        waits = server.channel.unary_unary(f"/{SERVICE}/ModelInfer").future(valid().SerializeToString(), timeout=20)
        until(lambda: model.batcher.queued == 1)
        with pytest.raises(grpc.RpcError) as caught:
            server.call(f"/{SERVICE}/ModelInfer", valid().SerializeToString())
        assert caught.value.code() == Code.RESOURCE_EXHAUSTED and "the queue is full" in caught.value.details()
        assert int(dict(caught.value.trailing_metadata())["retry-after"]) >= 1
        one.join(20)
        assert first == ["StatusCode.DEADLINE_EXCEEDED"] and model.stats.rejected == {"queue_full": 1, "timeout": 1}
        engine.go.set()
        assert waits.result().startswith(b"\n\x04tiny")


def status_of(ask: Any) -> str:
    with pytest.raises(InferenceServerException) as caught:
        ask()
    return str(caught.value.status())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_cancels_leaves_the_queue(streamed: bool) -> None:
    engine = Held()
    with Running(engine=engine, max_batch=1) as server:
        model = server.models.pick("tiny")
        call = server.channel.unary_unary(f"/{SERVICE}/ModelInfer")
        first = call.future(valid().SerializeToString(), timeout=20)
        until(lambda: model.batcher.busy_s() > 0)
        stream = server.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        second = stream(iter([valid().SerializeToString()])) if streamed else call.future(valid().SerializeToString())
        until(lambda: model.batcher.queued == 1)
        second.cancel()
        until(lambda: model.batcher.queued == 0)
        engine.go.set()
        assert first.result()


def test_the_deadline_of_a_call_takes_it_out_of_the_queue() -> None:
    engine = Held()
    with Running(engine=engine, max_batch=1) as server:
        model = server.models.pick("tiny")
        for _ in range(2):  # the first is in the engine, the second behind it
            assert refused(server, valid(), timeout=0.3)[0] == Code.DEADLINE_EXCEEDED
        until(lambda: model.batcher.queued == 0)
        engine.go.set()
        right(X, infer(server.client(), X))


def test_draining_finishes_what_is_under_way_ends_streams_and_watches_and_closes_the_port() -> None:
    engine = Held()
    server = Running(engine=engine)
    busy = server.channel.unary_unary(f"/{SERVICE}/ModelInfer").future(valid().SerializeToString(), timeout=20)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    requests.put(valid(id="in the stream").SerializeToString())
    stream = server.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter(requests.get, None), timeout=20)
    watch = server.channel.unary_stream(f"/{HEALTH}/Watch")(b"", timeout=20)
    states = iter(watch)
    assert next(states) == b"\x08\x01"
    model = server.models.pick("tiny")
    until(lambda: model.batcher.busy_s() > 0 and model.batcher.queued == 1)
    stopping = threading.Thread(target=server.core.stop)
    stopping.start()
    assert list(states) == [b"\x08\x02"]  # NOT_SERVING, and no more
    engine.go.set()
    assert busy.result()
    assert service_pb2.ModelStreamInferResponse.FromString(next(stream)).infer_response.id == "in the stream"
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() == Code.UNAVAILABLE and "leaving" in caught.value.details()
    stopping.join(10)
    assert not stopping.is_alive()
    requests.put(None)
    assert refused(server, valid(), timeout=5)[0] == Code.UNAVAILABLE
    server.channel.close()


def test_two_processes_may_share_a_port_and_a_taken_one_is_refused() -> None:
    def core(port: int, *, shared: bool) -> Core:
        models = Repository(lambda reference: served("tiny", "3"), lambda reference: [reference])
        return Core(models, ("tiny@3",), Listen(grpc_port=port, shared=shared))

    with Running() as server, pytest.raises(UserError, match=rf"grpc_port: cannot listen on 127\.0\.0\.1:{server.port}"):
        core(server.port, shared=False).start()
    first = core(0, shared=True).start()
    second = core(first.ports["grpc"], shared=True).start()
    assert first.ports == second.ports
    right(X, infer(InferenceServerClient(f"127.0.0.1:{first.ports['grpc']}"), X))
    for one in (first, second):
        one.stop(drain_s=1)


def test_over_tls_with_a_real_certificate(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    with Running(tls=(str(certificate), str(key))) as server:
        right(X, infer(InferenceServerClient(server.url, ssl=True, root_certificates=str(certificate)), X))
        with pytest.raises(InferenceServerException):
            infer(server.client(), X, client_timeout=5)  # in the clear
    with pytest.raises(UserError, match=r"tls_cert: .*none\.pem"):
        Running(tls=(str(tmp_path / "none.pem"), ""))


# --- models and health ----------------------------------------------------------------------------------------------


def load(name: str, reference: str) -> Any:
    return service_pb2.RepositoryModelLoadRequest(model_name=name, parameters={"reference": service_pb2.ModelRepositoryParameter(string_param=reference)})


def test_loading_and_unloading_touch_no_other_model_and_a_failing_version_keeps_the_old_one() -> None:
    with Running("tiny@2,5") as server:
        client = server.client()
        server.call(f"/{SERVICE}/RepositoryModelLoad", load("second", "1").SerializeToString())
        right(X, infer(client, X, model="second"))
        code, details = refused(server, load("tiny", "99"), "RepositoryModelLoad")
        assert code == Code.INVALID_ARGUMENT and "could not be loaded" in details and "secret" not in details
        code, details = refused(server, load("tiny", "98"), "RepositoryModelLoad")
        assert code == Code.FAILED_PRECONDITION and "its verdict is 'fail'" in details
        for name in ("../x", "TINY", "a" * 1000, "x\0y", ""):
            assert refused(server, load(name, "1"), "RepositoryModelLoad")[0] == Code.INVALID_ARGUMENT
        for version in ("2", "5"):
            right(X, infer(client, X, model_version=version))
        client.unload_model("second")
        assert status_of(lambda: infer(client, X, model="second")) == "StatusCode.NOT_FOUND"
        assert status_of(lambda: client.unload_model("second")) == "StatusCode.NOT_FOUND"
        assert status_of(lambda: client.get_model_metadata("second")) == "StatusCode.NOT_FOUND"


def test_a_model_that_is_closed_is_not_ready_and_unavailable() -> None:
    with Running() as server:
        client, model = server.client(), server.models.pick("tiny")
        right(X, infer(client, X))
        server.core.run(model.close())
        assert not client.is_server_ready() and not client.is_model_ready("tiny") and client.is_server_live()
        assert refused(server, valid())[0] == Code.UNAVAILABLE
        assert client.get_model_repository_index().models[0].state == "UNAVAILABLE"
        model.closed = False  # as a request sees it that came just before
        assert refused(server, valid()) == (Code.UNAVAILABLE, "the model is being unloaded")
        server.core.run(unlist(server))


async def unlist(server: Running) -> None:
    server.models.served.clear()


def health(server: Running, service: str) -> str:
    check = server.channel.unary_unary(f"/{HEALTH}/Check", message("grpc.health.v1.HealthCheckRequest").SerializeToString, message("grpc.health.v1.HealthCheckResponse").FromString)
    reply = check(message("grpc.health.v1.HealthCheckRequest")(service=service), timeout=20)
    return str(reply.DESCRIPTOR.enum_types_by_name["ServingStatus"].values_by_number[reply.status].name)


def test_health_is_that_of_the_models(server: Running) -> None:
    assert [health(server, service) for service in ("", SERVICE, "tiny")] == ["SERVING"] * 3
    assert refused(server, b"\x0a\x05other", f"/{HEALTH}/Check")[0] == Code.NOT_FOUND
    assert refused(server, b"\xff", f"/{HEALTH}/Check")[0] == Code.INVALID_ARGUMENT


def test_a_watch_tells_every_change_and_nothing_else() -> None:
    with Running() as server:
        watch = server.channel.unary_stream(f"/{HEALTH}/Watch")
        states, second = watch(b"", timeout=20), watch(b"\x0a\x06second", timeout=20)
        assert (next(states), next(second)) == (b"\x08\x01", b"\x08\x03")  # SERVING, SERVICE_UNKNOWN
        server.call(f"/{SERVICE}/RepositoryModelLoad", load("second", "1").SerializeToString())
        assert next(second) == b"\x08\x01"
        server.client().unload_model("second")
        assert next(second) == b"\x08\x03"
        server.client().unload_model("tiny")
        assert next(states) == b"\x08\x02"  # NOT_SERVING: no model is left
        for one in (states, second):
            one.cancel()


def test_calls_that_come_and_go_leave_nothing_behind_and_nothing_in_the_log(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    descriptors = lambda: len(list(Path("/proc/self/fd").iterdir()))  # noqa: E731
    with caplog.at_level(logging.WARNING):
        right(X, infer(server.client(), X))
        before = descriptors()
        for _ in range(20):
            with server.client() as client:
                right(X, infer(client, X))
                client.start_stream(lambda result, error: None)
                client.stop_stream()
        until(lambda: descriptors() <= before + 2)
    assert caplog.text == "" and not server.core._grpc_port._takers


# --- fuzz: whatever comes in, there is an answer and it is not our fault -----------------------------------------------

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
OURS = {Code.INTERNAL, Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.UNIMPLEMENTED}


def ask(server: Running, method: str, body: bytes) -> bytes | None:
    try:
        return server.call(method, body)[0]
    except grpc.RpcError as error:
        assert error.code() not in OURS, (error.code(), error.details())
        return None


@FUZZ
@given(
    shape=st.lists(st.integers(-2, 7) | st.integers(-(2**63), 2**63 - 1), max_size=4), raw=st.lists(st.binary(max_size=60), max_size=3) | st.just([X.tobytes()]),
    datatype=st.sampled_from(["FP32", "FP16", "INT8", "BYTES", ""]) | st.text(max_size=5), name=st.sampled_from(["x", "y", ""]), elements=st.none() | st.lists(st.floats(width=32), max_size=7),
)  # fmt: skip
def test_any_raw_sizes_shapes_and_datatypes(server: Running, shape: list[int], raw: list[bytes], datatype: str, name: str, elements: list[float] | None) -> None:
    request = service_pb2.ModelInferRequest(model_name="tiny", inputs=[{"name": name, "datatype": datatype, "shape": shape}], raw_input_contents=raw)
    if elements is not None:
        request.inputs[0].contents.fp32_contents.extend(elements)
    reply = ask(server, f"/{SERVICE}/ModelInfer", request.SerializeToString())
    if reply is not None:
        assert (datatype, name, shape[1:]) == ("FP32", "x", [2, 3]) and 24 * shape[0] == (len(raw[0]) if raw else 4 * len(elements or []))


PARAMETER = st.one_of(
    st.booleans().map(lambda value: {"bool_param": value}), st.integers(-(2**63), 2**63 - 1).map(lambda value: {"int64_param": value}), st.text(max_size=4).map(lambda value: {"string_param": value}),
    st.floats().map(lambda value: {"double_param": value}), st.integers(0, 2**64 - 1).map(lambda value: {"uint64_param": value}), st.just({}),
)  # fmt: skip
PARAMETERS = st.dictionaries(st.sampled_from(["priority", "classification", "binary_data", "binary_data_size", "shared_memory_region", "sequence_id"]), PARAMETER, max_size=3)


@FUZZ
@given(request=PARAMETERS, tensor=PARAMETERS, output=PARAMETERS)
def test_any_parameters_anywhere(server: Running, request: Any, tensor: Any, output: Any) -> None:
    made = [{name: service_pb2.InferParameter(**choice) for name, choice in one.items()} for one in (request, tensor, output)]
    one = {**valid_tree()["inputs"][0], "parameters": made[1]}
    asked = service_pb2.ModelInferRequest(model_name="tiny", parameters=made[0], inputs=[one], outputs=[{"name": "logits", "parameters": made[2]}], raw_input_contents=[X.tobytes()])
    ask(server, f"/{SERVICE}/ModelInfer", asked.SerializeToString())
    assert server.infer(valid()).model_name == "tiny"


@FUZZ
@given(st.data())
def test_any_bytes_of_any_method(server: Running, data: st.DataObject) -> None:
    good = valid(id="7", outputs=[{"name": "logits"}]).SerializeToString()
    at = data.draw(st.integers(0, len(good)))
    body = data.draw(st.binary(max_size=40) | st.just(good[:at]) | st.binary(min_size=1, max_size=3).map(lambda some: good[:at] + some + good[at + len(some) :]))
    for method in ("ModelInfer", data.draw(st.sampled_from(["ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex"]))):
        ask(server, f"/{SERVICE}/{method}", body)
    (reply,) = server.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter([body]), timeout=20)
    assert service_pb2.ModelStreamInferResponse.FromString(reply).error_message or reply
