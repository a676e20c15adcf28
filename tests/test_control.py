"""Release control: canary and shadow on both paths, promotions and roll backs followed from a real registry without a dropped request."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_http import Running, X, raw, reply, rows, served, until
from test_protocol import Held, Linear
from test_serving_alone import make_version, storage_in

from portaisys import registry
from portaisys.cli import main
from portaisys.serve import control, repository
from portaisys.serve.control import Canary, Compared, Release, Shadow, Share, Traffic, differing, traffic_of
from portaisys.serve.core import Core, Listen
from portaisys.serve.model import Limits
from portaisys.serve.repository import Repository, of_storage
from portaisys.spec import Storage, UserError


@pytest.mark.parametrize(("percent", "expected"), [(10, 100), (33.3, 333), (100, 1000), (0.5, 5)])
def test_a_share_is_exact_and_spread(percent: float, expected: int) -> None:
    share = Share(percent)
    taken = [share.takes() for _ in range(1000)]
    assert abs(sum(taken) - expected) <= 1
    window = round(500 / percent) * 2
    assert all(sum(taken[start : start + window]) >= 1 for start in range(0, 1000 - window, window))


def test_a_share_by_value_is_always_the_same_and_about_right() -> None:
    share = Share(20)
    sides = {f"user-{number}": share.takes(f"user-{number}") for number in range(2000)}
    assert sides == {value: share.takes(value) for value in sides} and 330 < sum(sides.values()) < 470


@pytest.mark.parametrize(
    "tree", [{"canary": {"version": "x", "percent": 10}}, {"canary": {"version": "3", "percent": 0}}, {"shadow": {"version": "3", "percent": 101}}, {"canary": {"percent": 10}}, {"canary": {"version": "3", "percent": 1, "of": 2}}]
)
def test_traffic_that_makes_no_sense_is_refused(tree: Any) -> None:
    with pytest.raises(UserError, match="traffic: "):
        traffic_of(tree)


def test_traffic_is_what_was_written() -> None:
    traffic = Traffic(Canary("3", 10, "x-user"), Shadow("4"))
    assert traffic_of(json.loads(json.dumps(traffic.to_dict()))) == traffic and traffic.versions == ["3", "4"] and traffic_of({}) == Traffic()


def test_rows_differ_by_their_decision_or_by_their_numbers() -> None:
    scores = np.array([[1, 2], [3, 1]], np.float32)
    assert differing({"y": scores}, {"y": scores + 0.4}) == 0 and differing({"y": scores}, {"y": scores[:, ::-1]}) == 2
    assert differing({"y": scores[:, :1]}, {"y": scores[:, :1] + np.array([[0], [0.1]], np.float32)}) == 1
    assert differing({"y": scores}, {"y": scores[:1]}) == 2 and differing({"y": scores}, {}) == 2


def test_what_a_shadow_was_found_to_answer_comes_with_an_interval() -> None:
    found = Compared(rows=200, differing=10).to_dict()
    assert found["share"] == 0.05 and 0.02 < found["low"] < 0.05 < found["high"] < 0.1 and "share" not in Compared().to_dict()


# --- both paths -----------------------------------------------------------------------------------------------------


class Other(Linear):
    """Answers otherwise."""

    def run(self, feeds: Any) -> dict[str, Any]:
        return {"logits": -super().run(feeds)["logits"]}


class Failing(Linear):
    def run(self, feeds: Any) -> dict[str, Any]:
        raise OSError("no")


def lineages(server: Running, count: int, headers: str = "") -> Counter[str]:
    """Which versions answered, and that each answered as it does."""
    found: Counter[str] = Counter()
    with server.connect() as sock:
        stream = sock.makefile("rwb")
        for _ in range(count):
            stream.write(raw(X, headers=headers))
            stream.flush()
            status, fields, _ = reply(stream)
            assert status == 200
            found[fields["x-portaisys-lineage"].split()[0]] += 1
    return found


@pytest.fixture
def two() -> Iterator[Running]:
    with Running("tiny@3,4") as running:  # 4 answers by default
        yield running


@pytest.mark.parametrize("headers", ["", "Accept-Encoding: gzip\r\n"], ids=["fast lane", "handled"])
def test_a_canary_answers_its_share_on_either_path(two: Running, headers: str) -> None:
    two.models.served["tiny"].release = Release(Traffic(Canary("3", 25)))
    assert lineages(two, 80, headers) == {"tiny/3": 20, "tiny/4": 60}
    two.models.served["tiny"].release = Release(Traffic(Canary("3", 50, "x-user")))
    for user in range(6):
        assert len(lineages(two, 5, f"{headers}X-User: {user}\r\n")) == 1
    two.models.served["tiny"].release = Release()
    assert lineages(two, 10, headers) == {"tiny/4": 10}


@pytest.mark.parametrize("percent", [10, 25, 50])
def test_a_canarys_share_is_the_same_for_requests_that_the_fast_lane_hands_on(two: Running, percent: int) -> None:
    two.models.served["tiny"].release = Release(Traffic(Canary("3", percent)))
    found: Counter[str] = Counter()
    with two.connect() as sock:
        stream = sock.makefile("rwb")
        for _ in range(40):
            stream.write(raw(X, parameters={"binary_data_output": False}))  # its answer is JSON
            stream.flush()
            found[reply(stream)[1]["x-portaisys-lineage"].split()[0]] += 1
    assert found["tiny/3"] == 40 * percent / 100


def test_a_version_in_the_url_is_never_the_canarys(two: Running) -> None:
    two.models.served["tiny"].release = Release(Traffic(Canary("3", 100)))
    with two.connect() as sock:
        sock.sendall(raw(X, path="/v2/models/tiny/versions/4/infer"))
        assert reply(sock.makefile("rb"))[1]["x-portaisys-lineage"].startswith("tiny/4 ")


@pytest.mark.parametrize("headers", ["", "Accept-Encoding: gzip\r\n"], ids=["fast lane", "handled"])
@pytest.mark.parametrize(("engine", "differ", "failed"), [(Linear, 0, 0), (Other, 20, 0), (Failing, 0, 20)])
def test_a_shadow_is_compared_and_never_returned(two: Running, headers: str, engine: Any, differ: int, failed: int) -> None:
    one = two.models.served["tiny"]
    one.models["3"].batcher._run = engine().run
    one.release = Release(Traffic(shadow=Shadow("3")))
    assert lineages(two, 20, headers) == {"tiny/4": 20}
    compared = one.release.compared
    until(lambda: compared.rows + compared.failed == 20)
    assert (compared.rows, compared.differing, compared.failed) == (20 - failed, differ, failed)
    with two.connect() as sock:
        sock.sendall(b"GET /v2/models/tiny/traffic HTTP/1.1\r\nHost: a\r\n\r\n")
        status = json.loads(reply(sock.makefile("rb"))[2])
    assert status["default"] == "4" and status["shadow"] == {"version": "3", "percent": 100.0} and status["compared"]["rows"] == 20 - failed


def test_a_shadow_that_is_full_is_skipped_and_holds_nobody_up(two: Running) -> None:
    one = two.models.served["tiny"]
    one.models["3"].batcher.max_queue = 0
    one.release = Release(Traffic(shadow=Shadow("3", 50)))
    assert lineages(two, 10) == {"tiny/4": 10} and one.release.compared.skipped == 5


# --- the registry is followed ---------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path) -> tuple[Storage, registry.Registry]:
    """Three versions of digits; the first is in production."""
    storage = storage_in(tmp_path)
    opened = registry.open_registry(storage)
    for number, tolerance in ((1, 1e-4), (2, 2e-4), (3, 3e-4)):
        version = make_version(tmp_path / f"version{number}", storage.cache_dir, tolerance=tolerance)
        run_id = opened.log_run("digits", {}, {}, {}, {})
        opened.publish("digits", version.path, run_id, {"data": "d1"}, {"action": "pass", "because": "test"})
    opened.promote("digits", 1, "first")
    return storage, opened


def test_promotion_and_roll_back_are_followed_under_load_without_a_failed_request(published: tuple[Storage, registry.Registry]) -> None:
    storage, opened = published
    core = Core(of_storage(storage, Limits()), ("digits@production",), Listen(http_port=0)).start()
    failed: list[Any] = []
    seen: Counter[str] = Counter()
    stop = threading.Event()

    def ask() -> None:
        with Running.connect(core) as sock:  # type: ignore[arg-type]
            stream = sock.makefile("rwb")
            x = np.zeros((1, 8, 8), np.float32)
            while not stop.is_set():
                stream.write(raw(x, path="/v2/models/digits/infer"))
                stream.flush()
                status, headers, body = reply(stream)
                seen[headers.get("x-portaisys-lineage", "").split(" ")[0]] += 1
                if status != 200:
                    failed.append((status, body))

    core.port = core.ports["http"]  # type: ignore[attr-defined]
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for change, version in ((lambda: opened.promote("digits", 2, "better"), "2"), (lambda: opened.rollback("digits", "worse"), "1")):
            change()
            core.run(core.models.refresh())
            until(lambda version=version: core.models.served["digits"].default == version)
            before = seen[f"digits/{version}"]
            until(lambda before=before, version=version: seen[f"digits/{version}"] > before + 20)
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
        core.stop(drain_s=1)
    assert failed == [] and set(seen) == {"digits/1", "digits/2"}


def test_traffic_is_set_by_the_command_recorded_and_followed(published: tuple[Storage, registry.Registry], capsys: pytest.CaptureFixture[str]) -> None:
    storage, opened = published
    models = of_storage(storage, Limits())

    async def scene() -> None:
        await models.load("digits@production")
        assert await asyncio.to_thread(main, ["traffic", "digits", "--canary", "2", "--percent", "50", "--by", "X-User", "--shadow", "3", "--because", "try it", "--storage", storage.path]) == 0
        await models.refresh()
        assert models.versions("digits") == ["1", "2", "3"] and models.status("digits")["canary"] == {"version": "2", "percent": 50.0, "by": "x-user"}
        assert await asyncio.to_thread(main, ["traffic", "digits", "--canary", "9", "--storage", storage.path]) == 2
        assert await asyncio.to_thread(main, ["traffic", "digits", "--clear", "--storage", storage.path]) == 0
        await models.refresh()
        assert models.versions("digits") == ["1"] and "canary" not in models.status("digits")
        await models.close()

    asyncio.run(scene())
    assert [(entry.event, entry.because) for entry in opened.ledger("digits")][-2:] == [("traffic", "try it"), ("traffic", "")]
    assert "has no version 9" in capsys.readouterr().err and opened.verify_ledger()


def test_a_registry_that_is_down_changes_nothing(published: tuple[Storage, registry.Registry], monkeypatch: pytest.MonkeyPatch) -> None:
    storage, _ = published
    models = of_storage(storage, Limits())

    async def scene() -> None:
        await models.load("digits@production")
        model = models.pick("digits")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        await models.refresh()
        assert models.pick("digits") is model and model.ready
        await models.close()

    asyncio.run(scene())


def test_an_outage_of_the_registry_takes_no_canary_and_no_pin_away(published: tuple[Storage, registry.Registry], monkeypatch: pytest.MonkeyPatch) -> None:
    storage, opened = published
    opened.set_traffic("digits", Traffic(Canary("2", 50), pin="fp32").to_dict())
    models = of_storage(storage, Limits())

    async def scene() -> None:
        await models.load("digits@1")  # a number needs no registry to be looked up, its traffic does
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        for again in (models.refresh(), models.load("digits@1")):
            await again
            assert models.status("digits")["canary"]["version"] == "2" and models.pick("digits").precision == "fp32" and models.versions("digits") == ["1", "2"]
        await models.close()

    asyncio.run(scene())


def test_a_promotion_that_cannot_be_loaded_leaves_the_old_version_and_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def opener(reference: str) -> Any:
        asked.append(reference)
        if reference == "tiny@2" and len(asked) < 4:
            raise UserError("/secret is damaged")
        return served("tiny", reference.partition("@")[2])

    names = ["tiny@1"]
    models = Repository(opener, lambda reference: [names[0]])

    async def scene() -> None:
        await models.load("tiny@production")
        names[0] = "tiny@2"
        for _ in range(3):
            await models.refresh()
        assert asked == ["tiny@1", "tiny@2"] and models.versions("tiny") == ["1"]  # not at every look
        monkeypatch.setattr(repository, "RETRY_S", 0.0)
        models.served["tiny"].retry_at = 0.0
        await models.refresh()
        assert asked[2:] == ["tiny@2"] and models.versions("tiny") == ["1"]
        await models.refresh()
        assert asked[3:] == ["tiny@2"] and models.versions("tiny") == ["2"] and models.pick("tiny").version == "2"
        await models.refresh()
        assert len(asked) == 4
        await models.close()

    asyncio.run(scene())


def test_a_version_taken_out_by_hand_stays_out_until_the_registry_says_otherwise() -> None:
    models = Repository(lambda reference: served("tiny", reference.partition("@")[2]), lambda reference: ["tiny@2", "tiny@1"])

    async def scene() -> None:
        await models.load("tiny@all")
        await models.unload("tiny", "2")
        await models.refresh()
        assert models.versions("tiny") == ["1"]
        models.traffic = lambda name: Traffic(shadow=Shadow("3"))
        await models.refresh()
        assert models.versions("tiny") == ["1", "2", "3"]
        await models.close()

    asyncio.run(scene())


@pytest.mark.parametrize("headers", ["", "Accept-Encoding: gzip\r\n"], ids=["fast lane", "handled"])
def test_a_shadow_is_not_asked_what_the_version_in_charge_refuses(two: Running, headers: str) -> None:
    one = two.models.served["tiny"]
    one.release = Release(Traffic(shadow=Shadow("3")))
    one.models["4"].batcher.max_queue, held = 0, Held()
    one.models["3"].batcher._run = held.run  # what it was asked would stay there
    with two.connect() as sock:
        sock.sendall(raw(X, headers=headers))
        assert reply(sock.makefile("rb"))[0] == 400  # more than could ever be queued
    asked = one.models["3"].batcher.queued, one.models["3"].batcher.busy_s()
    held.go.set()
    assert asked == (0, 0.0)


def test_a_replica_that_starts_while_the_registry_is_down_serves_what_the_alias_meant_last(published: tuple[Storage, registry.Registry], monkeypatch: pytest.MonkeyPatch) -> None:
    storage, opened = published

    async def scene(reference: str) -> list[str]:
        models = of_storage(storage, Limits())
        await models.load(reference)
        found = models.versions("digits")
        await models.close()
        return found

    assert asyncio.run(scene("digits@production")) == ["1"]
    opened.promote("digits", 2, "better")
    assert asyncio.run(scene("digits@production")) == ["2"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert asyncio.run(scene("digits@production")) == ["2"]


def test_references_name_one_several_the_newest_or_all_that_passed(published: tuple[Storage, registry.Registry], tmp_path: Path) -> None:
    from portaisys.serve.repository import expand

    storage, opened = published
    bad = make_version(tmp_path / "bad", storage.cache_dir, tolerance=4e-4)
    opened.publish("digits", bad.path, opened.log_run("digits", {}, {}, {}, {}), {"data": "d1"}, {"action": "fail", "because": "worse"})
    for which, numbers in (("production", [1]), ("2", [2]), ("latest", [3]), ("latest:2", [3, 2]), ("all", [3, 2, 1]), ("1,3", [3, 1])):
        assert expand(f"digits@{which}", storage) == [f"digits@{number}" for number in numbers]
    with pytest.raises(UserError, match="has no alias 'staging'"):
        expand("digits@staging", storage)
    models = of_storage(storage, Limits())
    with pytest.raises(UserError, match="its verdict is 'fail'"):
        asyncio.run(models.load("digits@4"))
    assert models.served == {}


def test_every_row_of_a_shadow_is_its_own(two: Running) -> None:
    one = two.models.served["tiny"]
    one.release = Release(Traffic(shadow=Shadow("3")))
    with two.connect() as sock:
        stream = sock.makefile("rwb")
        for seed in range(10):
            stream.write(raw(rows(5, seed)))
            stream.flush()
            assert reply(stream)[0] == 200
    until(lambda: one.release.compared.rows == 50)
    assert one.release.compared.differing == 0 and control.LAST > 1
