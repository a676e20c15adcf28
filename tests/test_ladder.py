"""The precision ladder: what makes it climb, what does not, and that no client sees the answer that made it."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_serving_alone import make_version, publish, storage_in

from portaisys.engine import Tensor
from portaisys.monitor import Bounds, Window, decide, differing
from portaisys.serve import model as serving
from portaisys.serve.control import Traffic
from portaisys.serve.ladder import EXACTNESS, Ladder, rungs_from
from portaisys.serve.model import Limits, open_reference
from portaisys.serve.repository import of_storage
from portaisys.spec import UserError


@pytest.mark.parametrize(
    ("window", "action"),
    [
        (Window(), "keep"),
        (Window(rows=1000, compared=49, agreed=0), "keep"),  # too few to say
        (Window(rows=1000, compared=50, agreed=40), "fall back"),
        (Window(rows=1000, compared=100, agreed=98), "keep"),
        (Window(rows=1000, compared=100, agreed=95), "keep"),  # below 98 %, but not beyond doubt
        (Window(rows=1000, compared=1000, agreed=950), "fall back"),
        (Window(rows=1000, compared=1000, agreed=1000), "keep"),
        (Window(rows=3, odd=1), "fall back"),
    ],
)
def test_the_monitor_decides_on_counts_alone(window: Window, action: str) -> None:
    decision = decide(window, Bounds())
    assert decision.action == action and decision.because and decision.figures["rows"] == window.rows


def test_an_engine_as_good_as_its_bound_is_seldom_given_up() -> None:
    rng = np.random.default_rng(0)
    wrong = sum(decide(Window(500, 0, 500, int(rng.binomial(500, 0.98))), Bounds()).action == "fall back" for _ in range(1000))
    right = sum(decide(Window(500, 0, 500, int(rng.binomial(500, 0.93))), Bounds()).action == "fall back" for _ in range(1000))
    assert wrong < 20 and right > 970  # 1 % each time it is asked; what is clearly worse is found


class Rung:
    """x [n, 2] -> y [n, 2]; `answer` says what comes out."""

    backend, device = "test", "cpu"
    inputs, outputs = (Tensor("x", "float32", (-1, 2)),), (Tensor("y", "float32", (-1, 2)),)

    def __init__(self, precision: str, answer: Any = None) -> None:
        self.precision, self.answer, self.closed, self.ran = precision, answer or (lambda x: x), False, 0

    def run(self, feeds: Any) -> dict[str, Any]:
        self.ran += 1
        return {"y": self.answer(feeds["x"])}

    def close(self) -> None:
        self.closed = True


def ladder(first: Any, *, every: int = 2, middle: Any = None, **rest: Any) -> tuple[Ladder, dict[str, Rung]]:
    rungs = {"int8": Rung("int8", first), "bf16": Rung("bf16", middle), "fp32": Rung("fp32")}

    def opener(precision: str) -> Any:
        if precision == rest.get("broken"):
            raise UserError("no such file")
        return rungs[precision]

    return Ladder("tiny", list(rungs), rungs["int8"], opener, Bounds(rows=10), every=every), rungs


def rows(count: int, seed: int = 0) -> dict[str, Any]:
    return {"x": np.random.default_rng(seed).normal(size=(count, 2)).astype(np.float32)}


def test_no_client_sees_the_nan_that_makes_it_climb(caplog: pytest.LogCaptureFixture) -> None:
    found, _ = ladder(lambda x: x * np.float32(np.nan))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(found.run(rows(3))["y"], rows(3)["x"])
    assert found.engine.precision == "bf16" and "3 of 3 rows were answered with NaN" in caplog.text
    (step,) = found.status()["steps"]
    assert (step["before"], step["now"]) == ("int8", "bf16") and (found.window.rows, found.window.odd) == (3, 0)


def test_it_climbs_on_while_there_is_a_rung_and_answers_with_the_last_whatever_it_says() -> None:
    nan = lambda x: x * np.float32(np.nan)  # noqa: E731
    found, rungs = ladder(nan, middle=nan)
    np.testing.assert_array_equal(found.run(rows(2))["y"], rows(2)["x"])
    assert found.engine.precision == "fp32"
    rungs["fp32"].answer = nan
    assert np.isnan(found.run(rows(2))["y"]).all() and found.engine.precision == "fp32"


def test_too_little_agreement_on_sampled_batches_makes_it_climb_and_sound_answers_do_not() -> None:
    wrong, _ = ladder(lambda x: x[:, ::-1])
    for seed in range(10):
        wrong.run(rows(5, seed))
    assert wrong.engine.precision == "bf16" and "as the reference" in wrong.steps[0].because
    right, rungs = ladder(None)
    for seed in range(20):
        right.run(rows(5, seed))
    assert right.engine.precision == "int8" and right.steps == [] and (right.window.compared, right.window.agreed) == (50, 50) and rungs["fp32"].ran == 10


def test_with_no_sampling_the_reference_is_never_asked() -> None:
    found, rungs = ladder(lambda x: x[:, ::-1], every=0)
    for seed in range(10):
        found.run(rows(5, seed))
    assert found.engine.precision == "int8" and rungs["fp32"].ran == 0


def test_a_rung_that_cannot_be_opened_is_passed_over() -> None:
    found, _ = ladder(lambda x: x * np.float32(np.nan), broken="bf16")
    assert np.isfinite(found.run(rows(1))["y"]).all() and found.engine.precision == "fp32"


def test_a_pin_holds_against_signals_and_lets_go_to_where_they_led() -> None:
    found, _ = ladder(lambda x: x * np.float32(np.nan))
    found.run(rows(1))
    found.pin("int8")
    assert np.isnan(found.run(rows(1))["y"]).all() and found.engine.precision == "int8"  # an operator wants it so
    found.pin("")
    assert found.engine.precision == "bf16" and [step.now for step in found.steps] == ["bf16", "int8", "bf16"]
    found.pin("fp8")
    assert found.engine.precision == "bf16"


def test_many_threads_climb_once() -> None:
    found, _ = ladder(lambda x: x * np.float32(np.nan))
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(found.run(rows(2))["y"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found.steps) == 1 and len(answers) == 8 and all(np.isfinite(answer).all() for answer in answers)


def test_a_batch_that_ran_beside_the_one_that_climbed_gives_no_nan_either() -> None:
    together = threading.Barrier(4)

    def odd(x: Any) -> Any:
        together.wait(10)  # all are in the first engine before any of them says so
        return x * np.float32(np.nan)

    found, _ = ladder(odd)
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(found.run(rows(2))["y"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found.steps) == 1 and len(answers) == 4 and all(np.isfinite(answer).all() for answer in answers)


def test_closing_frees_every_rung_that_was_opened() -> None:
    found, rungs = ladder(lambda x: x * np.float32(np.nan))
    found.run(rows(1))
    found.close()
    assert [rung.closed for rung in rungs.values()] == [True, True, False]


def test_rungs_are_the_admitted_precisions_that_are_more_exact() -> None:
    assert rungs_from("int8", ["int8", "fp32", "bf16"]) == ["int8", "bf16", "fp32"] and rungs_from("fp32", ["int8", "fp32"]) == ["fp32"]
    assert EXACTNESS[-1] == "fp32" and differing({"y": np.ones((2, 1))}, {"y": np.ones((2, 1))}) == 0


# --- a real version -------------------------------------------------------------------------------------------------


def test_a_served_version_climbs_from_int8_to_fp32_and_its_lineage_says_so(tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    publish(make_version(tmp_path / "version", storage.cache_dir), storage)
    model = open_reference("digits@production", storage, replace(Limits(), check_every=1))
    assert model.ladder is not None and model.ladder.rungs == ["int8", "fp32"] and model.stamp.startswith("digits/1 int8 ")
    int8 = model.ladder.engine
    real, x = int8.run, np.random.default_rng(1).normal(size=(4, 8, 8)).astype(np.float32)

    async def scene() -> None:
        right = (await model.batcher.submit({"x": x}))["logits"]
        int8.run = lambda feeds: {"logits": real(feeds)["logits"] * np.float32(np.inf)}  # type: ignore[method-assign]
        again = (await model.batcher.submit({"x": x}))["logits"]
        assert np.isfinite(again).all() and np.abs(right - again).max() < 0.2 * np.abs(right).max()
        await model.close()

    asyncio.run(scene())
    assert model.stamp.startswith("digits/1 fp32 ") and model.ladder.status()["rung"] == "fp32"


def test_a_precision_asked_for_by_name_has_no_ladder(tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    publish(make_version(tmp_path / "version", storage.cache_dir), storage)
    model = open_reference("digits@production", storage, Limits(precision="int8"))
    assert model.ladder is not None and model.ladder.rungs == ["int8"]
    asyncio.run(model.close())


def test_the_registrys_pin_is_applied_to_every_version_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = storage_in(tmp_path)
    publish(make_version(tmp_path / "version", storage.cache_dir), storage)
    models = of_storage(storage, Limits())
    pins = iter([Traffic(), Traffic(pin="fp32"), Traffic()])
    models.traffic = lambda name: next(pins)

    async def scene() -> list[str]:
        await models.load("digits@production")
        seen = [models.pick("digits").precision]
        for _ in range(2):
            await models.refresh()
            seen.append(models.pick("digits").precision)
        await models.close()
        return seen

    assert asyncio.run(scene()) == ["int8", "fp32", "int8"] and serving.STUCK_S > 0
