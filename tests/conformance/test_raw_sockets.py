"""Whatever comes over a socket, the server neither hangs nor fails, and who comes next is answered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance.models import Model, framed, same
from conformance.wire import Target

FUZZ = settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

TOKENS = [
    b"GET ", b"POST ", b"HEAD ", b"OPTIONS * ", b"CONNECT a:1 ", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"/v2", b"/v2/health/live", b"/v2/models/", b"{infer}", b" HTTP/1.1", b" HTTP/1.0", b" HTTP/9.9", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b" ", b":", b"%", b"%00", b"?", b"//",
    b"Host: a\r\n", b"Content-Length: ", b"Content-Length: 2\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Connection: upgrade\r\n", b"Upgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"Inference-Header-Content-Length: ", b"Content-Encoding: gzip\r\n", b"Accept-Encoding: gzip\r\n",
    b"0", b"1", b"-1", b"7fffffff", b"4294967296", b"18446744073709551616", b"{}", b"[", b'{"inputs":[]}', b"\x1f\x8b\x08", b"0\r\n\r\n", b"2\r\n{}\r\n", b";", b"\xff\xfe",
]  # fmt: skip
tokens = st.lists(st.sampled_from(TOKENS) | st.binary(max_size=12), max_size=40)
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.sampled_from(TOKENS) | st.binary(max_size=6)), min_size=1, max_size=5)
names = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20) | st.sampled_from(["Content-Encoding", "Accept-Encoding", "Content-Type", "Inference-Header-Content-Length", "Expect", "Connection", "Host", "X-Request-ID", "Authorization", "Content-Length", "Transfer-Encoding"])
values = st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=30) | st.sampled_from(["", "0", "1", "gzip", "deflate", "identity", "close", "keep-alive", "100-continue", "chunked", "a" * 5000, "-1", "99999999999999999999"])
cuts = st.lists(st.floats(0, 1), max_size=12)


def withstands(target: Target, data: bytes) -> None:
    """No 5xx for it, no hang, and others are answered. What a request to another connection outran is not waited for."""
    with target.connect() as connection:
        connection.send_until_cut(data)
        target.is_well()
        connection.no_more()
        try:
            answered = connection.stream.read()
        except ConnectionError:
            answered = b""
    # 501 and 505 are a server's words for a method and a version that it does not know.
    failed = [status for status in re.findall(rb"^HTTP/1\.[01] (5\d\d)", answered, re.M) if status not in (b"501", b"505")]
    assert failed == [], answered[:300]


def cut(data: bytes, shares: Sequence[float]) -> list[bytes]:
    places = sorted({0, len(data), *(int(share * len(data)) for share in shares)})
    return [data[start:stop] for start, stop in pairwise(places)]


@FUZZ
@given(parts=tokens)
def test_bytes_that_look_like_http_are_withstood(first: Model, parts: list[bytes]) -> None:
    withstands(first.target, b"".join(parts).replace(b"{infer}", first.infer_path.encode()))


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
@FUZZ
@given(edits=edits)
def test_a_good_request_damaged_anywhere_is_withstood(first: Model, binary: bool, edits: list[tuple[float, int, bytes]]) -> None:
    data = first.bytes_of(first.rows(1), binary=binary and first.binary) * 2
    for share, length, insert in edits:
        place = int(share * len(data))
        data = data[:place] + insert + data[place + length :]
    withstands(first.target, data)


@FUZZ
@given(headers=st.lists(st.tuples(names, values), max_size=6))
def test_any_headers_are_withstood(first: Model, headers: list[tuple[str, str]]) -> None:
    data = first.bytes_of(first.rows(1), binary=first.binary)
    lines = b"".join(b"%b: %b\r\n" % (name.encode("latin-1"), value.encode("latin-1")) for name, value in headers)
    withstands(first.target, data.replace(b"\r\n", b"\r\n" + lines, 1))


@pytest.mark.parametrize("chunks", [False, True], ids=["whole", "in chunks"])
@FUZZ
@given(shares=cuts, seed=st.integers(0, 3))
def test_wherever_it_is_cut_a_good_request_has_its_answer(first: Model, chunks: bool, shares: list[float], seed: int) -> None:
    feeds = first.rows(1, seed)
    body, headers = framed(*first.request(feeds, binary=first.binary))
    if chunks:
        head = first.target.bytes_of("POST", first.infer_path, b"", {**headers, "Transfer-Encoding": "chunked"}, framed=False)
        pieces = [head, *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in cut(body, shares)), b"0\r\n\r\n"]
    else:
        pieces = cut(first.bytes_of(feeds, binary=first.binary), shares)
    with first.target.connect() as connection:
        for piece in pieces:
            connection.send(piece)
        same(first.answer(connection.reply()), first.infer(feeds))
