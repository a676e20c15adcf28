"""Answers kept for inputs that come again: whose they are, what they may take, and that no other model's is ever given."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from test_http import infer, rows
from test_protocol import Linear
from tritonclient.http import InferenceServerClient

from portaisys.serve.answers import ENTRY_BYTES, Answers, Recall, key_of
from portaisys.serve.batcher import Batcher
from portaisys.serve.core import Core, Listen
from portaisys.serve.model import ServedModel, Stats
from portaisys.serve.repository import of_models

X = rows(1)


def outputs(value: float, size: int = 4) -> dict[str, Any]:
    return {"y": np.full((1, size), value, np.float32)}


def test_what_was_asked_for_longest_ago_leaves_first_and_no_more_is_held_than_may_be() -> None:
    answers = Answers(8 * (ENTRY_BYTES + 16))
    for number in range(8):
        answers.keep(bytes([number]), outputs(number))
    answers.get(b"\x00")
    answers.keep(b"new", outputs(9))
    assert answers.get(b"\x01") is None and answers.get(b"\x00") is not None and answers.get(b"new") is not None
    assert answers.held_bytes <= answers.most_bytes


def test_an_answer_that_would_push_out_all_others_is_not_kept() -> None:
    answers = Answers(4 * ENTRY_BYTES)
    answers.keep(b"k", outputs(1, ENTRY_BYTES))
    assert answers.get(b"k") is None and answers.held_bytes == 0


def test_an_answer_is_a_copy_and_keeps_no_batch_alive() -> None:
    answers, batch = Answers(1 << 20), np.arange(64, dtype=np.float32).reshape(16, 4)
    answers.keep(b"k", {"y": batch[3:4]})
    batch[:] = 0
    found = answers.get(b"k")
    assert found is not None and found["y"].tolist() == [[12, 13, 14, 15]] and found["y"].base is None


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.zeros((1, 3), np.float32)},
        {"x": np.zeros((2, 2), np.float32)},
        {"x": np.zeros((1, 4), np.int32)},
        {"z": np.zeros((1, 4), np.float32)},
        {"x": np.full((1, 4), -0.0, np.float32)},
    ],
)
def test_inputs_that_differ_in_anything_have_another_key(other: dict[str, Any]) -> None:
    assert key_of("m/1 int8", {"x": np.zeros((1, 4), np.float32)}) != key_of("m/1 int8", other)


def test_versions_and_precisions_have_keys_of_their_own() -> None:
    feeds = {"x": np.zeros((1, 4), np.float32)}
    assert len({key_of(stamp, feeds) for stamp in ("m/1 int8", "m/2 int8", "m/1 fp32", "n/1 int8")}) == 4


class Counting(Linear):
    """How often it ran, and whether it gives NaN."""

    def __init__(self, *, odd: bool = False) -> None:
        super().__init__()
        self.runs, self.odd = 0, odd

    def run(self, feeds: Any) -> dict[str, Any]:
        self.runs += 1
        found = super().run(feeds)
        return {name: array * np.float32("nan") for name, array in found.items()} if self.odd else found


def remembering(engine: Counting, answers: Answers, name: str = "tiny", stamp: Any = None) -> ServedModel:
    stats, recall = Stats(), Recall(answers, stamp or (lambda: f"{name}/3"))
    return ServedModel(
        name,
        "3",
        engine,
        Batcher(engine.run, max_batch=8, observe=stats.batch, memory=recall),
        (),
        {"digest": "d" * 64},
        (),
        stats,
        recall=recall,
    )


def test_the_second_request_is_answered_without_the_engine_on_both_lanes_and_counted() -> None:
    engine, other, answers = Counting(), Counting(), Answers(1 << 20)
    model = remembering(engine, answers)
    core = Core(of_models(model, remembering(other, answers, "other")), (), Listen(http_port=0)).start()
    try:
        client = InferenceServerClient(f"127.0.0.1:{core.ports['http']}")
        first = infer(client, X)
        assert np.array_equal(infer(client, X, binary=False), first) and np.array_equal(infer(client, X), first) and engine.runs == 1
        assert np.array_equal(infer(client, X, model="other"), first) and other.runs == 1
        assert not np.array_equal(infer(client, X + 1), first) and engine.runs == 2
        told = client.get_inference_statistics("tiny")["model_stats"][0]["inference_stats"]
        assert (told["cache_hit"]["count"], told["cache_miss"]["count"], told["success"]["count"]) == (2, 2, 4)
    finally:
        core.stop(drain_s=1)


def test_an_answer_of_a_rung_that_was_left_is_not_given() -> None:
    engine, rung = Counting(), ["int8"]
    model = remembering(engine, Answers(1 << 20), stamp=lambda: rung[0])

    async def scene() -> None:
        await model.infer({"x": X})
        rung[0] = "fp32"
        await model.infer({"x": X})
        assert engine.runs == 2
        await model.close()

    asyncio.run(scene())


def test_nan_is_not_kept() -> None:
    engine = Counting(odd=True)
    model = remembering(engine, Answers(1 << 20))

    async def scene() -> None:
        await model.infer({"x": X})
        await model.infer({"x": X})
        assert engine.runs == 2
        await model.close()

    asyncio.run(scene())


def test_who_left_is_not_told_a_kept_answer_either() -> None:
    model, told = remembering(Counting(), Answers(1 << 20)), []

    async def scene() -> None:
        await model.infer({"x": X})
        pieces = model.batcher.put({"x": X}, lambda outputs, problem: told.append(outputs))
        model.batcher.drop(pieces)
        await asyncio.sleep(0)
        await model.infer({"x": X})
        await model.close()

    asyncio.run(scene())
    assert told == []
