"""The fast lane: a binary inference request whose JSON was met before goes from its bytes to the batcher without a task or a parser.

Clients repeat themselves: the JSON of one client's requests is the same bytes each time but for its id. What `codec` made of
it, and the head of the reply, are remembered by those bytes; everything else about the request is checked as ever. A request
that is in any way unusual is left to `protocol.handle`. Knows neither sockets nor Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys.serve import codec, protocol
from portaisys.serve.batcher import Piece, RowShapes
from portaisys.serve.codec import Head, RefusedError
from portaisys.serve.model import ServedModel
from portaisys.serve.repository import Repository, RestingError

REMEMBERED = 1024  # heads; beyond that all are forgotten, which costs each one parse
MOST_JSON = 4096

# Told once: the reply and its tensors, or why there is none.
Answer = Callable[["Reply", list[NDArray[Any]]], None]
Refusal = Callable[[RefusedError], None]


@dataclass(eq=False)
class Reply:
    """What is the same in all replies to one JSON of tensors of one size by one engine. `size`: bytes of the body; `lines`: kept by whoever sends it."""

    head: bytes
    size: int
    stamp: str
    lines: bytes = b""


@dataclass(eq=False)
class Known:
    """What one JSON means for one model. `cuts`: name, dtype, shape and place in the body of every input."""

    model: ServedModel
    head: Head
    cuts: list[tuple[str, np.dtype[Any], tuple[int, ...], int, int]]
    shapes: RowShapes
    body_bytes: int
    replies: dict[tuple[Any, ...], Reply] = field(default_factory=dict)  # by the precision in charge and the outputs' shapes

    def reply(self, outputs: list[NDArray[Any]]) -> Reply:
        """The reply with these outputs."""
        key = self.model.precision, *[array.shape for array in outputs]
        found = self.replies.get(key)
        if found is None:
            if len(self.replies) >= 64:  # sizes may depend on what the inputs hold
                self.replies.clear()
            pairs = zip(self.head.wanted, outputs, strict=True)
            entries = [codec.binary_entry(wanted.name, array.dtype.name, array.shape, array.nbytes) for wanted, array in pairs]
            head = codec.reply_head(self.model.name, self.model.version, self.head.id, entries)
            found = self.replies[key] = Reply(head, len(head) + sum(array.nbytes for array in outputs), self.model.stamp)
        return found


class FastLane:
    """Remembers heads of requests to the models of a repository, until those change."""

    def __init__(self, models: Repository) -> None:
        self._models = models
        self._known: dict[tuple[ServedModel, bytes], Known] = {}
        self._generation = -1

    def ask(
        self, name: str, version: str | None, headers: Mapping[str, str], json_bytes: int, body: bytes, answer: Answer, refused: Refusal
    ) -> tuple[ServedModel, list[Piece], float | None] | None:
        """Queue the request; what can be dropped, and its timeout in seconds. None: it is not for the fast lane.

        Raises RefusedError or UnknownModelError for a request that is wrong.
        """
        if json_bytes > len(body):
            return None  # refused where its length is, in the same words whether its JSON was met before or not
        began = time.perf_counter()
        if self._generation != self._models.generation:
            self._known.clear()
            self._generation = self._models.generation
        try:
            plain = self._models.pick(name, version)
        except RestingError:
            return None
        head = body[:json_bytes]
        known = self._known.get((plain, head)) or self._learn(plain, json_bytes, body)
        if known is None:
            return None
        model = self._models.pick(name, version, headers)  # a canary draws its share: only of what is asked here
        if model is not plain:
            known = self._known.get((model, head)) or self._learn(model, json_bytes, body)
            if known is None:
                return None
        if not model.ready:
            raise RefusedError(503, "the model is not ready", {"Retry-After": "1"})
        if len(body) != known.body_bytes:
            raise RefusedError(400, f"the body is {len(body)} bytes where its JSON and the tensors need {known.body_bytes}")
        feeds = {}
        for cut_name, dtype, shape, offset, count in known.cuts:
            array = np.frombuffer(body, dtype, count, offset)
            _check(cut_name, dtype, array)
            feeds[cut_name] = array.reshape(shape)
        pieces = self._queued(known, feeds, answer, refused, began)
        return model, pieces, known.head.timeout_s

    def _queued(self, known: Known, feeds: Mapping[str, NDArray[Any]], answer: Answer, refused: Refusal, began: float) -> list[Piece]:
        model, wanted = known.model, known.head.wanted

        def done(outputs: dict[str, NDArray[Any]] | None, problem: Exception | None) -> None:
            if outputs is None:
                assert problem is not None
                refused(protocol.refusal(model, problem))
                return
            arrays = [outputs[one.name] for one in wanted]
            answer(known.reply(arrays), arrays)
            if told is not None:
                told(outputs)

        try:
            pieces = model.batcher.put(feeds, done, priority=known.head.priority, shapes=known.shapes, began=began)
        except Exception as problem:
            raise protocol.refusal(model, problem) from None
        told = self._models.watched(model, feeds)  # of what is run only; `done` is called on a later turn of the loop
        return pieces

    def _learn(self, model: ServedModel, json_bytes: int, body: bytes) -> Known | None:
        if json_bytes > MOST_JSON:
            return None
        head = codec.head_of(memoryview(body)[:json_bytes], model.inputs, model.outputs)
        if not head.binary or len(head.entries) != len(model.inputs):
            return None
        codec.feeds_of(head, memoryview(body)[json_bytes:], model.inputs)  # sizes, shapes and batch, checked once in full
        cuts, offset = [], json_bytes
        for tensor, shape, size, _ in head.entries:
            dtype = np.dtype(tensor.dtype).newbyteorder("<")
            cuts.append((tensor.name, dtype, shape, offset, int(np.prod(shape, dtype=np.int64))))
            offset += size or 0
        known = Known(model, head, cuts, tuple([shape[1:] for _, _, shape, _, _ in cuts]), offset)
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[model, body[:json_bytes]] = known
        return known


def _check(name: str, dtype: np.dtype[Any], array: NDArray[Any]) -> None:
    """The two things that bytes of the right number can still have wrong."""
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise RefusedError(400, f"input {name!r} holds NaN, infinity or a number beyond its datatype")
    if dtype.kind == "b" and array.view(np.uint8).max() > 1:
        raise RefusedError(400, f"input {name!r}: a BOOL is a byte of 0 or 1")
