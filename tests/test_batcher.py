"""The batcher against an engine whose runs the test holds and lets go, on a real loop and a real thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portaisys.serve.batcher import Batcher, BatchRecord, ClosedError, EngineFailedError, QueueFullError, TooManySamplesError, _bucket


@dataclass
class HeldEngine:
    """Doubles its input. `go` lets runs through, `entered` says that one has begun."""

    batches: list[list[float]] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    go: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    inside: int = 0
    most_inside: int = 0

    def run(self, feeds: Any) -> Any:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.batches.append([float(row.flat[0]) for row in feeds["x"]])
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.go.wait(20)
        self.inside -= 1
        if (feeds["x"] == 13).any():
            raise OSError("/secret/path is gone")
        return {"y": feeds["x"] * 2}


def rows(*values: float) -> dict[str, Any]:
    return {"x": np.array(values, np.float32)[:, None]}


def answer(outputs: Any) -> list[float]:
    return [float(value) for value in outputs["y"][:, 0]]


async def busy(engine: HeldEngine, batcher: Batcher, value: float = 0) -> asyncio.Task[Any]:
    """One request that is in the engine, which is held."""
    task = asyncio.create_task(batcher.submit(rows(value)))
    assert await asyncio.to_thread(engine.entered.wait, 20)
    return task


async def queue(batcher: Batcher, *requests: dict[str, Any]) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(batcher.submit(request)) for request in requests]
    await asyncio.sleep(0)  # one turn of the loop: each has put its samples into the queue
    return tasks


def play(scene: Callable[[HeldEngine, Batcher], Awaitable[None]], **options: Any) -> HeldEngine:
    async def whole() -> None:
        batcher = Batcher(engine.run, **{"max_batch": 4, "max_queue": 8, **options})
        try:
            await asyncio.wait_for(scene(engine, batcher), 30)
        finally:
            engine.go.set()
            await batcher.close()

    engine = HeldEngine()
    asyncio.run(whole())
    return engine


def test_requests_that_arrive_while_the_engine_runs_become_one_batch() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        first = await busy(engine, batcher)
        others = await queue(batcher, rows(1), rows(2, 3), rows(4))
        engine.go.set()
        assert answer(await first) == [0]
        assert [answer(await task) for task in others] == [[2], [4, 6], [8]]

    assert play(scene).batches == [[0], [1, 2, 3, 4]]


def test_batches_are_counted_in_samples_not_requests() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        tasks = [await busy(engine, batcher), *await queue(batcher, rows(1, 2, 3), rows(4, 5), rows(6))]
        engine.go.set()
        await asyncio.gather(*tasks)

    assert play(scene).batches == [[0], [1, 2, 3], [4, 5, 6]]


def test_a_request_above_max_batch_is_split_and_answered_in_order() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        engine.go.set()
        assert answer(await batcher.submit(rows(*range(7)))) == [0, 2, 4, 6, 8, 10, 12]

    assert play(scene).batches == [[0, 1, 2, 3], [4, 5, 6]]


def test_the_queue_limit_is_exact_and_does_not_count_what_runs() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        await busy(engine, batcher)
        await queue(batcher, rows(*range(5)), rows(*range(3)))
        assert batcher.queued == 8
        with pytest.raises(QueueFullError) as refused:
            await batcher.submit(rows(1))
        assert refused.value.retry_after_s >= 1

    play(scene)


def test_a_request_that_no_queue_could_hold_is_refused_for_good() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        with pytest.raises(TooManySamplesError, match="at most 8"):
            await batcher.submit(rows(*range(9)))

    assert play(scene).batches == []


def test_a_cancelled_request_leaves_the_queue_at_once_and_never_reaches_the_engine() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        first = await busy(engine, batcher)
        leaves, stays = await queue(batcher, rows(*range(20, 26)), rows(1))
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        assert batcher.queued == 1
        engine.go.set()
        assert answer(await stays) == [2] and answer(await first) == [0]

    assert play(scene).batches == [[0], [1]]


def test_a_request_cancelled_in_the_engine_does_not_disturb_its_neighbours() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        first = await busy(engine, batcher)
        first.cancel()
        (second,) = await queue(batcher, rows(5))
        engine.go.set()
        assert answer(await second) == [10]

    play(scene)


def test_an_engine_failure_fails_its_own_batch_only() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        first = await busy(engine, batcher)
        tasks = await queue(batcher, rows(13, 1), rows(2, 3), rows(4))
        engine.go.set()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [type(result) for result in results] == [dict, EngineFailedError, EngineFailedError, dict]
        assert "secret" not in str(results[1]) and isinstance(results[1].__cause__, OSError)
        assert answer(await batcher.submit(rows(6))) == [12]

    play(scene)


def test_a_failed_piece_takes_the_rest_of_its_request_out_of_the_queue() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        engine.go.set()
        with pytest.raises(EngineFailedError):
            await batcher.submit(rows(13, 1, 2, 3, 4, 5))
        assert answer(await batcher.submit(rows(7))) == [14]
        assert batcher.queued == 0

    play(scene)


def test_close_finishes_what_is_queued_and_refuses_what_comes_later() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        tasks = await queue(batcher, rows(1), rows(2))
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            await batcher.submit(rows(3))
        engine.go.set()
        await closing
        assert [answer(task.result()) for task in tasks] == [[2], [4]]

    play(scene, max_delay_ms=60_000)  # which closing does not wait out


def test_the_engine_runs_in_one_thread_that_is_not_the_loops() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        engine.go.set()
        for _ in range(5):
            await asyncio.gather(*(batcher.submit(rows(value)) for value in range(8)))

    engine = play(scene)
    assert engine.most_inside == 1 and len(engine.threads) == 1
    assert threading.current_thread().name not in engine.threads


def test_the_loop_answers_others_while_the_engine_runs() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        task = await busy(engine, batcher)  # got here, so the loop turns although the engine is held
        assert batcher.busy_s() > 0 and not task.done()
        engine.go.set()
        await task

    play(scene)


def test_a_delay_is_cut_short_by_a_full_batch() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        engine.go.set()
        await asyncio.gather(*(batcher.submit(rows(value)) for value in range(4)))  # 60 s would fail the scene

    assert play(scene, max_delay_ms=60_000).batches == [[0, 1, 2, 3]]


def test_a_delay_ends_for_a_batch_that_never_fills() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        engine.go.set()
        assert answer(await batcher.submit(rows(3))) == [6]

    play(scene, max_delay_ms=5)


def test_rows_of_different_shapes_never_share_a_batch() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        first = await busy(engine, batcher)
        tasks = await queue(batcher, rows(1), {"x": np.full((1, 3), 2, np.float32)}, rows(3))
        engine.go.set()
        await first
        assert [(await task)["y"].shape for task in tasks] == [(1, 1), (1, 3), (1, 1)]

    assert play(scene).batches == [[0], [1, 3], [2]]  # those of one shape together, whoever came first leading


def test_rows_of_like_length_share_a_batch_where_padding_is_allowed_and_others_do_not() -> None:
    def of(value: float, length: int) -> dict[str, Any]:
        return {"x": np.full((1, length), value, np.float32)}

    fed: list[Any] = []

    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        run = batcher._run
        batcher._run = lambda feeds: fed.append(feeds["x"].tolist()) or {"y": run(feeds)["y"][:, :1]}
        first = await busy(engine, batcher)
        tasks = await queue(batcher, of(1, 3), of(2, 40), of(3, 5), of(4, 33), of(5, 8))
        engine.go.set()
        await first
        assert [answer(await task) for task in tasks] == [[2], [4], [6], [8], [10]]

    assert play(scene, pads={"x": 7}).batches == [[0], [1, 3, 5], [2, 4]]
    assert fed[1] == [[1] * 3 + [7] * 5, [3] * 5 + [7] * 3, [5] * 8] and fed[2] == [[2] * 40, [4] * 33 + [7] * 7]


@given(length=st.integers(1, 100_000))
def test_a_bucket_of_lengths_holds_the_length_and_never_half_as_much_again(length: int) -> None:
    assert length <= _bucket(length) <= max(8, 1.5 * length) and _bucket(_bucket(length)) == _bucket(length)


def test_a_lone_request_never_waits_for_company() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        engine.go.set()
        for value in range(3):
            assert answer(await batcher.submit(rows(value))) == [2 * value]  # 60 s would fail the scene

    assert play(scene, max_delay_ms=60_000).batches == [[0], [1], [2]]


def test_a_higher_priority_goes_first_and_nobody_is_forgotten() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        first = await busy(engine, batcher)
        tasks = [asyncio.create_task(batcher.submit(rows(value), priority=priority)) for value, priority in ((1, 2), (2, 1), (3, 2), (4, 1))]
        await asyncio.sleep(0)
        engine.go.set()
        assert [answer(await task) for task in (first, *tasks)] == [[0], [2], [4], [6], [8]]

    assert play(scene).batches == [[0], [2, 4], [1, 3]]


def test_several_instances_run_at_once() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        tasks = await queue(batcher, rows(*range(8)))
        while engine.inside < 2:
            await asyncio.sleep(0.001)
        engine.go.set()
        assert answer(await tasks[0]) == [2 * value for value in range(8)]

    engine = play(scene, instances=2)
    assert engine.most_inside == 2 and len(engine.threads) == 2


def test_a_request_that_leaves_is_told_to_nobody_and_frees_its_place() -> None:
    told: list[Any] = []

    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        first = await busy(engine, batcher)
        pieces = batcher.put(rows(*range(1, 7)), lambda outputs, error: told.append((outputs, error)))
        assert batcher.queued == 6 and len(pieces) == 2
        batcher.drop(pieces)
        batcher.drop(pieces)  # twice does no harm
        assert batcher.queued == 0
        engine.go.set()
        await first

    assert play(scene).batches == [[0]] and told == []


def test_the_queue_is_refused_within_milliseconds_while_the_engine_is_held() -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        await busy(engine, batcher)
        await queue(batcher, rows(*range(8)))
        for _ in range(1000):  # a thousand refusals in well under the scene's limit: none waits for the engine
            with pytest.raises(QueueFullError):
                batcher.put(rows(1), lambda outputs, error: None)

    play(scene)


def test_an_engine_that_loses_rows_is_a_failure_not_a_shifted_answer() -> None:
    async def scene() -> None:
        batcher = Batcher(lambda feeds: {"y": feeds["x"][:1]}, max_batch=4)
        with pytest.raises(EngineFailedError):
            await batcher.submit(rows(1, 2))
        await batcher.close()

    asyncio.run(scene())


def test_every_run_is_observed_once_with_its_samples() -> None:
    seen: list[BatchRecord] = []

    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        engine.go.set()
        await batcher.submit(rows(1, 2, 3, 4, 5))

    play(scene, observe=seen.append)
    assert [(record.samples, record.requests, record.failed) for record in seen] == [(4, 1, False), (1, 1, False)]
    assert all(record.engine_s > 0 and record.queue_s >= 0 for record in seen)


def test_an_observer_that_fails_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        tasks = [await busy(engine, batcher), *await queue(batcher, rows(1), rows(2, 3, 4, 5))]
        engine.go.set()
        assert [answer(await task) for task in tasks] == [[0], [2], [4, 6, 8, 10]]

    def fail(record: BatchRecord) -> None:
        raise KeyError("status")

    play(scene, observe=fail)
    assert "observer" in caplog.text


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20), max_batch=st.integers(1, 6))
def test_everyone_gets_the_answers_to_their_own_rows(sizes: list[int], max_batch: int) -> None:
    starts = [1000 + 20 * index for index in range(len(sizes))]

    async def scene(engine: HeldEngine, batcher: Batcher) -> None:
        engine.go.set()
        requests = [[start + offset for offset in range(size)] for start, size in zip(starts, sizes, strict=True)]
        answers = await asyncio.gather(*(batcher.submit(rows(*request)) for request in requests))
        assert [answer(outputs) for outputs in answers] == [[2 * value for value in request] for request in requests]

    engine = play(scene, max_batch=max_batch, max_queue=200)
    assert max(map(len, engine.batches)) <= max_batch and sum(map(len, engine.batches)) == sum(sizes)
