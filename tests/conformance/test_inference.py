"""Answers, checked without knowing the model: a row alone, in a batch, in JSON, in binary, compressed or not is the same row."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from conformance.models import NO_JSON, Model, close, framed, packed, same
from conformance.wire import LENGTH, refused


def halves(model: Model, batch: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    feeds = model.rows(batch, seed)
    return [{name: values[row : row + 1] for name, values in feeds.items()} for row in range(batch)]


# --- what an answer is ----------------------------------------------------------------------------------------------


def test_the_same_input_has_the_same_output(model: Model) -> None:
    feeds = model.rows(1)
    first = model.infer(feeds)
    for _ in range(3):
        same(model.infer(feeds), first)


def test_without_a_list_of_outputs_all_come_and_of_the_batch_that_was_sent(model: Model) -> None:
    batch = min(model.largest, 5)
    outputs = model.infer(model.rows(batch)).outputs
    assert list(outputs) == [tensor.name for tensor in model.outputs]
    if model.largest > 1:
        assert {len(values) for values in outputs.values()} == {batch}


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_a_row_of_a_batch_has_the_answer_it_has_alone_and_in_its_place(model: Model, binary: bool) -> None:
    batch = model.need_batches()
    if binary:
        model.need("binary_tensor_data")
    together = model.infer(model.rows(batch), binary=binary).outputs
    alone = [model.infer(row, binary=binary).outputs for row in halves(model, batch)]
    for name, values in together.items():
        for row, own in enumerate(alone):
            assert close(values[row : row + 1], own[name]), f"row {row} of {name} is {values[row].ravel()[:4]} in a batch of {batch} and {own[name].ravel()[:4]} alone"
    if all(close(own[name], alone[0][name]) for own in alone for name in together):
        pytest.skip("the model gives every row the same answer, so a swapped one would not be seen")


def test_batches_of_every_size_up_to_the_largest_are_answered(model: Model) -> None:
    largest = model.need_batches()
    everything = model.infer(model.rows(largest)).outputs
    for size in sorted({1, 2, 3, largest // 2, largest - 1, largest} - {0}):
        part = model.infer({name: values[:size] for name, values in model.rows(largest).items()}).outputs
        assert all(close(values, everything[name][:size]) for name, values in part.items())


def test_json_and_binary_are_the_same_to_the_bit(model: Model) -> None:
    model.need("binary_tensor_data")
    for seed in range(3):
        feeds = model.rows(min(model.largest, 4), seed)
        answers = [model.infer(feeds, binary=binary_in, binary_outputs=binary_out) for binary_in in (False, True) for binary_out in (False, True)]
        for answer in answers[1:]:
            same(answer, answers[0])


def test_flat_and_nested_data_are_the_same(model: Model) -> None:
    feeds = model.rows(min(model.largest, 3))
    tree, blobs = model.request(feeds)
    nested = json.loads(json.dumps(tree))
    for entry in nested["inputs"]:
        if "data" in entry:
            entry["data"] = np.array(entry["data"], object).reshape(entry["shape"]).tolist()
    same(model.answer(model.post(nested, blobs)), model.answer(model.post(tree, blobs)))


def test_inputs_in_json_and_in_binary_may_be_mixed_in_any_order(model: Model) -> None:
    model.need("binary_tensor_data")
    if len(model.inputs) < 2:
        pytest.skip("the model has one input")
    feeds = model.rows(2 if model.largest > 1 else 1)
    expected = model.infer(feeds)
    as_json, as_binary = model.request(feeds)[0]["inputs"], model.request(feeds, binary=True)[0]["inputs"]
    mixed = [binary if number % 2 or "data" not in text else text for number, (text, binary) in enumerate(zip(as_json, as_binary, strict=True))][::-1]
    blobs = [packed(tensor, feeds[tensor.name]) for tensor, entry in zip(model.inputs, mixed[::-1], strict=True) if "data" not in entry][::-1]
    same(model.answer(model.post({"inputs": mixed, "parameters": {"binary_data_output": True}}, blobs)), expected)


def test_an_integer_where_a_real_is_due_is_one(model: Model) -> None:
    reals = [tensor for tensor in model.inputs if tensor.datatype in ("FP32", "FP64")]
    if not reals:
        pytest.skip("the model has no input of reals in JSON")
    feeds = model.rows(1) | {tensor.name: np.ones_like(model.rows(1)[tensor.name]) for tensor in reals}
    text = json.dumps(model.request(feeds)[0]).replace("1.0", "1").encode()
    same(model.answer(model.post(text, model.request(feeds)[1])), model.infer(feeds))


# --- id, outputs, versions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["r1", "", "0", 'a "quoted" \\ line\n', "Grüße ☃ 𝄞", "a\u0000b", "x" * 500], ids=["short", "empty", "zero", "escaped", "unicode", "null", "long"])
@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_the_id_comes_back_as_it_was_given(model: Model, id: str, binary: bool) -> None:
    if binary:
        model.need("binary_tensor_data")
    answer = model.infer(model.rows(1), binary=binary, id=id)
    assert answer.tree.get("id") == id


def test_only_the_outputs_that_were_asked_for_come(model: Model) -> None:
    feeds = model.rows(1)
    everything = model.infer(feeds).outputs
    tree, blobs = model.request(feeds)
    for tensor in model.outputs:
        outputs = model.answer(model.post({**tree, "outputs": [model.wanted(tensor)]}, blobs)).outputs
        assert list(outputs) == [tensor.name] and close(outputs[tensor.name], everything[tensor.name])


def test_each_output_is_binary_or_not_as_it_was_asked_for(model: Model) -> None:
    model.need("binary_tensor_data")
    feeds = model.rows(1)
    expected = model.infer(feeds)
    inputs, blobs = model.request(feeds)
    for default in (False, True):
        for odd in (0, 1):
            # One says it, the next leaves it to the default.
            outputs = [{"name": tensor.name, "parameters": {"binary_data": not default}} if number % 2 == odd else {"name": tensor.name} for number, tensor in enumerate(model.outputs)]
            if any(tensor.datatype in NO_JSON and entry.get("parameters", {}).get("binary_data", default) is False for tensor, entry in zip(model.outputs, outputs, strict=True)):
                continue
            answer = model.answer(model.post({"inputs": inputs["inputs"], "parameters": {"binary_data_output": default}, "outputs": outputs}, blobs))
            same(answer, expected)
            binary = ["data" not in entry for entry in answer.tree["outputs"]]
            assert binary == [entry.get("parameters", {}).get("binary_data", default) for entry in outputs]


def test_a_version_in_the_url_answers_itself(model: Model) -> None:
    if not model.about.get("versions"):
        pytest.skip("the model lists no versions")
    feeds = model.rows(1)
    for version in model.about["versions"]:
        for binary in (False, True) if model.binary else (False,):
            assert model.infer(feeds, path=f"{model.path}/versions/{version}/infer", binary=binary).tree["model_version"] == version
    unnamed = model.infer(feeds)
    if unnamed.tree["model_version"] in model.about["versions"]:
        same(model.infer(feeds, path=f"{model.path}/versions/{unnamed.tree['model_version']}/infer"), unnamed)


def test_parameters_that_clients_send_to_anyone_are_passed_over(model: Model) -> None:
    feeds = model.rows(1)
    same(model.infer(feeds, **({"parameters": {"triton_enable_empty_final_response": False}})), model.infer(feeds))


# --- binary, raw, compressed ------------------------------------------------------------------------------------------


def test_a_raw_body_is_one_sample_and_answered_in_binary(model: Model) -> None:
    model.need("binary_tensor_data")
    (tensor, *others), feeds = model.inputs, model.rows(1)
    if others or -1 in tensor.shape[1:]:
        pytest.skip("a raw body is for models of one input of fixed size")
    blob = packed(tensor, feeds[tensor.name])
    reply = model.target.ask("POST", model.infer_path, blob, {LENGTH: "0", "Content-Type": "application/octet-stream"})
    answer = model.answer(reply)
    assert LENGTH.lower() in reply.headers and all("data" not in entry for entry in answer.tree["outputs"])
    same(answer, model.infer(feeds))
    for wrong in (blob[:-1], blob + b"\0", b""):
        refused(model.target.ask("POST", model.infer_path, wrong, {LENGTH: "0"}), 400)


PACKERS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
@pytest.mark.parametrize("encoding", PACKERS)
def test_bodies_may_be_compressed_both_ways(model: Model, encoding: str, binary: bool) -> None:
    if binary:
        model.need("binary_tensor_data")
    feeds = model.rows(model.largest)
    expected = model.infer(feeds, binary=binary)
    body, headers = framed(*model.request(feeds, binary=binary))
    for accepted in ({}, {"Accept-Encoding": encoding}):
        reply = model.target.ask("POST", model.infer_path, PACKERS[encoding](body), {**headers, "Content-Encoding": encoding, **accepted})
        assert reply.headers.get("content-encoding", "identity") in ("identity", *accepted.values())
        same(model.answer(reply), expected)


def test_names_of_encodings_are_of_any_case(first: Model) -> None:
    """RFC 9110, 8.4.1."""
    body, headers = framed(*first.request(first.rows(1)))
    same(first.answer(first.target.ask("POST", first.infer_path, gzip.compress(body), {**headers, "Content-Encoding": "GZIP"})), first.infer(first.rows(1)))


@pytest.mark.parametrize("accepted", ["identity", "gzip;q=0", "gzip;q=0, identity", "br", "*;q=0, identity", "deflate;q=0,gzip;q=0.0", ""])
def test_nobody_gets_an_encoding_that_he_refused(model: Model, accepted: str) -> None:
    reply = model.post(*model.request(model.rows(model.largest)), {"Accept-Encoding": accepted})
    assert "content-encoding" not in reply.headers
    model.answer(reply)


@pytest.mark.parametrize("accepted", ["gzip, deflate", "br, gzip", "deflate, gzip;q=1.0, *;q=0.5", "GZIP", "gzip;q=0.5"])
def test_of_many_encodings_the_answer_names_the_one_it_has(model: Model, accepted: str) -> None:
    feeds = model.rows(model.largest)
    same(model.infer(feeds, headers={"Accept-Encoding": accepted}), model.infer(feeds))


# --- an identity model, found by what it answers ------------------------------------------------------------------------

EDGES = {
    "FP32": [0.0, -0.0, 0.1, 1 / 3, 16777217.0, 3.4028234e38, -3.4028234e38, 1.17549435e-38, 1e-45, 123456.789],
    "FP64": [0.0, -0.0, 0.1, 1 / 3, 2.0**53 + 2, 1.7976931348623157e308, 5e-324, 2.2250738585072014e-308, 1e22, 123456789.123456789],
    "FP16": [0.0, -0.0, 0.1, 65504.0, -65504.0, 6e-8, 6.1e-5, 1.0, 2.0, 0.333],
}


def test_every_number_of_every_datatype_goes_through_an_identity_model_unchanged(model: Model) -> None:
    ordinary = model.rows(1)
    if [(tensor.name, tensor.datatype) for tensor in model.inputs] != [(tensor.name, tensor.datatype) for tensor in model.outputs]:
        pytest.skip("the model is no identity")
    if any(-1 not in tensor.shape[1:] for tensor in model.inputs) or any(not close(values, ordinary[name]) for name, values in model.infer(ordinary).outputs.items()):
        pytest.skip("the model is no identity of any size")
    feeds = {}
    for tensor in model.inputs:
        if tensor.datatype in EDGES:
            values = np.array(EDGES[tensor.datatype], tensor.dtype)
        elif tensor.dtype.kind in "iu":
            limits = np.iinfo(tensor.dtype)
            values = np.array([limits.min, limits.max, 0, 1, limits.max - 1, limits.min + 1, limits.max // 2, 7, 8, 9], tensor.dtype)
        else:
            values = ordinary[tensor.name].ravel().take(np.arange(10), mode="wrap")
        feeds[tensor.name] = values.reshape(1, *(10 if size == -1 and number == 0 else 1 for number, size in enumerate(tensor.shape[1:])))
    for binary_in in (False, True) if model.binary else (False,):
        for binary_out in (False, True) if model.binary else (False,):
            for name, values in model.infer(feeds, binary=binary_in, binary_outputs=binary_out).outputs.items():
                assert values.tobytes() == feeds[name].tobytes(), f"{name}: {values} where {feeds[name]} was sent"
