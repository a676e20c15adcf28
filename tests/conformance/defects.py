"""Faults that servers have been seen to have, each planted into ours by a few lines around it, so that it is known that the suite finds them.

Two kinds: around `Core.handle` (a request in, a reply out) and around the data port (bytes in, bytes out).
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from portaisys.serve.protocol import Response

Handle = Callable[[str, str, Mapping[str, str], bytes], Awaitable[Response]]
LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Defect:
    """`tests`: those that should find it, as FILE::TEST without the test_ of both."""

    handle: Callable[[Handle, str, str, Mapping[str, str], bytes], Awaitable[Response]]
    tests: tuple[str, ...]


# --- around Core.handle -------------------------------------------------------------------------------------------------


def split(body: bytes, headers: Mapping[str, str]) -> tuple[dict[str, Any], bytes]:
    """The JSON of a request or reply, and what follows it."""
    length = int(next((value for name, value in headers.items() if name.lower() == LENGTH.lower()), len(body)))
    return json.loads(body[:length]), body[length:]


def joined(reply: Response, tree: Mapping[str, Any], blob: bytes) -> Response:
    head = json.dumps(tree).encode()
    length = {LENGTH: str(len(head))} if LENGTH in reply.headers else {}
    return replace(reply, headers={**reply.headers, **length}, body=head + blob)


def answers(change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> Any:
    """`change` to the JSON and blobs of every right answer to an inference request."""

    async def handle(ask: Handle, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        reply = await ask(method, path, plain(headers), body)
        return joined(reply, *change(*split(reply.body, reply.headers))) if infers(path) and reply.status == 200 else reply

    return handle


def requests(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """`change` to the JSON of every inference request that has one."""

    async def handle(ask: Handle, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        if infers(path):
            with contextlib.suppress(ValueError, RecursionError, AttributeError, KeyError, TypeError):
                tree, blob = split(body, headers)
                head = json.dumps(change(tree)).encode()
                lengths = {name: str(len(head)) for name in headers if name.lower() == LENGTH.lower()}
                headers, body = {**headers, **lengths}, head + blob
        return await ask(method, path, headers, body)

    return handle


def replies(change: Callable[[Response, str], Response]) -> Any:
    """`change` to every reply."""

    async def handle(ask: Handle, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        return change(await ask(method, path, headers, body), path)

    return handle


def infers(path: str) -> bool:
    return path.endswith("/infer")


def plain(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() != "accept-encoding"}


async def as_it_is(ask: Handle, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
    return await ask(method, path, headers, body)


async def any_version(ask: Handle, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
    return await ask(method, re.sub("/versions/[^/]+", "", path), headers, body)


async def without_content_encoding(ask: Handle, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
    reply = await ask(method, path, headers, body)
    return replace(reply, headers={name: value for name, value in reply.headers.items() if name != "Content-Encoding"})


async def blind_to_encodings(ask: Handle, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
    reply = await ask(method, path, plain(headers), body)
    packed = infers(path) and reply.status == 200
    return replace(reply, headers={**reply.headers, "Content-Encoding": "gzip"}, body=zlib.compress(reply.body, wbits=31)) if packed else reply


def renamed_error(reply: Response, path: str) -> Response:
    return replace(reply, body=json.dumps({"detail": json.loads(reply.body)["error"]}).encode()) if reply.status >= 400 else reply


def shape_is_internal(reply: Response, path: str) -> Response:
    return replace(reply, status=500) if reply.status == 400 and b"has shape" in reply.body else reply


def one_byte_less(reply: Response, path: str) -> Response:
    return replace(reply, headers={**reply.headers, LENGTH: str(int(reply.headers[LENGTH]) - 1)}) if LENGTH in reply.headers else reply


def trace(reply: Response, path: str) -> Response:
    message = 'Traceback (most recent call last):\n  File "protocol.py", line 1'
    return replace(reply, body=json.dumps({"error": message}).encode()) if reply.status >= 400 else reply


def no_content_type(reply: Response, path: str) -> Response:
    return replace(reply, headers={**reply.headers, "Content-Type": "text/plain"}) if infers(path) else reply


def unlisted(reply: Response, path: str) -> Response:
    return replace(reply, body=reply.body.replace(b'"statistics",', b"")) if path == "/v2" else reply


def samples_as_requests(reply: Response, path: str) -> Response:
    if not path.endswith("/stats"):
        return reply
    tree = json.loads(reply.body)
    for row in tree["model_stats"]:
        row["inference_count"] = row["inference_stats"]["success"]["count"]
    return replace(reply, body=json.dumps(tree).encode())


class Crossed:
    """Under load an answer goes to whoever is answered next."""

    def __init__(self) -> None:
        self.asking = 0
        self.last: Response | None = None

    async def __call__(self, ask: Handle, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        if not infers(path):
            return await ask(method, path, headers, body)
        self.asking += 1
        reply = await ask(method, path, headers, body)
        alone, self.asking = self.asking == 1, self.asking - 1
        before, self.last = self.last, reply
        return reply if alone or before is None else before


def without_id(tree: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
    return ({name: value for name, value in tree.items() if name != "id" or value}, blob)


def swapped(tree: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
    """The last two rows of what goes out as JSON change places."""
    for output in tree["outputs"]:
        size = len(output.get("data", ())) // output["shape"][0]
        if output["shape"][0] > 2 and "data" in output:
            data = output["data"]
            output["data"] = [*data[: -2 * size], *data[-size:], *data[-2 * size : -size]]
    return tree, blob


def short(tree: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Six digits of every number, as printf has them."""
    for output in tree["outputs"]:
        if output["datatype"] in ("FP32", "FP64") and "data" in output:
            output["data"] = [float(f"{value:.6g}") for value in output["data"]]
    return tree, blob


def all_outputs(tree: dict[str, Any]) -> dict[str, Any]:
    """What has no JSON form stays binary, everything else comes unasked."""
    return {name: value for name, value in tree.items() if name != "outputs"} if len(tree["outputs"]) == 1 and "parameters" not in tree["outputs"][0] else tree


def known_inputs(tree: dict[str, Any]) -> dict[str, Any]:
    return {**tree, "inputs": [entry for entry in tree["inputs"] if entry["name"] != "no-such-input"]}


def finite(tree: dict[str, Any]) -> dict[str, Any]:
    """NaN and Infinity are read, and taken for zero."""
    text = re.sub(r"-?\b(NaN|Infinity)\b", "0.0", json.dumps(tree))
    changed: dict[str, Any] = json.loads(text)
    return changed


DEFECTS: dict[str, Defect] = {
    "none": Defect(as_it_is, ()),
    "empty-id-is-dropped": Defect(answers(without_id), ("inference::the_id_comes_back_as_it_was_given",)),
    "shape-error-is-500": Defect(replies(shape_is_internal), ("refusals::a_request_spoiled_in_one_place_is_400",)),
    "error-body-has-detail": Defect(replies(renamed_error), ("routes::an_unknown_model_is_404", "routes::a_wrong_method_is_405_with_an_error_and_the_right_one")),
    "version-is-ignored": Defect(any_version, ("routes::an_unknown_version_is_404", "inference::a_version_in_the_url_answers_itself")),
    "rows-are-swapped": Defect(answers(swapped), ("inference::a_row_of_a_batch_has_the_answer_it_has_alone_and_in_its_place",)),
    "json-length-is-wrong": Defect(replies(one_byte_less), ("inference::json_and_binary_are_the_same_to_the_bit",)),
    "outputs-are-not-filtered": Defect(requests(all_outputs), ("inference::only_the_outputs_that_were_asked_for_come",)),
    "unknown-input-is-accepted": Defect(requests(known_inputs), ("refusals::a_request_spoiled_in_one_place_is_400",)),
    "gzip-without-content-encoding": Defect(without_content_encoding, ("inference::bodies_may_be_compressed_both_ways", "inference::of_many_encodings_the_answer_names_the_one_it_has")),
    "gzip-for-everybody": Defect(blind_to_encodings, ("inference::nobody_gets_an_encoding_that_he_refused",)),
    "nan-is-zero": Defect(requests(finite), ("refusals::what_is_no_number_in_json_is_400",)),
    "numbers-lose-digits": Defect(answers(short), ("inference::json_and_binary_are_the_same_to_the_bit", "inference::every_number_of_every_datatype_goes_through_an_identity_model_unchanged")),
    "errors-hold-a-trace": Defect(replies(trace), ("routes::an_unknown_model_is_404",)),
    "content-type-is-text": Defect(replies(no_content_type), ("inference::the_same_input_has_the_same_output",)),
    "answers-cross-under-load": Defect(Crossed(), ("connections::64_clients_at_once_each_get_their_own_answers",)),
    "statistics-count-requests": Defect(replies(samples_as_requests), ("routes::statistics_count_samples_requests_and_nanoseconds",)),
    "statistics-are-there-unlisted": Defect(replies(unlisted), ("routes::statistics_are_there_if_and_only_if_they_are_listed",)),
}  # fmt: skip


# --- around the data port -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PortDefect:
    """`stream`: what becomes of bytes that a client sends; `order`: of whole requests among them, None: they are not looked at; `once`: the connection ends with its first answer."""

    tests: tuple[str, ...]
    stream: Callable[[bytes], bytes] = bytes
    order: Callable[[list[bytes]], list[bytes]] | None = None
    once: bool = False


def repaired(data: bytes) -> bytes:
    """Bare line feeds are taken for ends of lines, and of many Content-Lengths the first one counts."""
    head, end, body = re.sub(rb"\r?\n", b"\r\n", data).partition(b"\r\n\r\n")
    first, *others = re.split(rb"(?=\r\nContent-Length:)", head)
    kept = [others[0], *(re.sub(rb"\r\nContent-Length:[^\r]*", b"", other) for other in others[1:])] if others else []
    return b"".join([first, *kept]) + end + body


def whole(data: bytes) -> tuple[list[bytes], bytes]:
    """The whole requests at the start of `data`, and the rest."""
    found = []
    while (end := data.find(b"\r\n\r\n")) >= 0:
        length = re.search(rb"\r\nContent-Length: (\d+)", data[:end])
        stop = end + 4 + (int(length.group(1)) if length else 0)
        if stop > len(data):
            break
        found.append(data[:stop])
        data = data[stop:]
    return found, data


PORT_DEFECTS: dict[str, PortDefect] = {
    "none": PortDefect(("connections::pipelined_requests_are_answered_in_order", "connections::a_connection_stays_open_for_the_next_request", "connections::a_request_of_two_readings_is_refused_and_what_follows_is_not_read")),
    "pipelined-answers-come-out-of-order": PortDefect(("connections::pipelined_requests_are_answered_in_order",), order=lambda requests: requests[::-1]),
    "malformed-http-is-repaired": PortDefect(("connections::a_request_of_two_readings_is_refused_and_what_follows_is_not_read",), stream=repaired),
    "connections-end-with-their-first-answer": PortDefect(("connections::a_connection_stays_open_for_the_next_request",), once=True),
}


class Proxy:
    """Stands before a port with a defect."""

    def __init__(self, port: int, defect: PortDefect) -> None:
        self._behind, self._defect = port, defect
        self._server = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                behind = socket.create_connection(("127.0.0.1", self._behind))
                for relay in (self._there, self._back):
                    threading.Thread(target=relay, args=(client, behind), daemon=True).start()

    def _there(self, client: socket.socket, behind: socket.socket) -> None:
        left = b""
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                data = self._defect.stream(data)
                if self._defect.order is not None:
                    requests, left = whole(left + data)
                    data = b"".join(self._defect.order(requests))
                behind.sendall(data)
            behind.shutdown(socket.SHUT_WR)

    def _back(self, client: socket.socket, behind: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := behind.recv(1 << 20):
                client.sendall(data)
                if self._defect.once:
                    break
        for sock in (client, behind):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
