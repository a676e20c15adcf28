"""A memory budget: which model leaves, that it comes back when it is asked on any path, and that nobody notices but by the time it takes."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from test_grpc import message
from test_http import expected, infer, rows, served
from test_serving_alone import make_version, publish, storage_in
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException

from portaisys.serve.core import Core, Listen
from portaisys.serve.model import Limits, ServedModel
from portaisys.serve.repository import Repository, RestingError, Room, UnknownModelError, of_storage
from portaisys.spec import UserError

MIB = 1 << 20


class Opener:
    """Opens models of a MiB each, or of what `sizes` says; what is in `gone` cannot be opened any more."""

    def __init__(self, **sizes: int) -> None:
        self.sizes, self.opened, self.gone = sizes, [], set()

    def __call__(self, reference: str) -> ServedModel:
        name, _, version = reference.partition("@")
        if name in self.gone:
            raise UserError("/secret/version.json is damaged")
        self.opened.append(name)
        model = served(name, version)
        model.file_bytes = {"fp32": int(self.sizes.get(name, MIB) / 1.2)}
        return model


def repository(opener: Opener, mib: float) -> Repository:
    return Repository(opener, lambda reference: [reference], most_bytes=int(mib * MIB))


@pytest.fixture
def three() -> Any:
    opener = Opener()
    models = repository(opener, 2.5)
    core = Core(models, ("a@1", "b@1", "c@1"), Listen(http_port=0, grpc_port=0)).start()
    yield opener, models, core
    core.stop(drain_s=1)


def client(core: Core) -> InferenceServerClient:
    return InferenceServerClient(f"127.0.0.1:{core.ports['http']}", network_timeout=20)


def here(models: Repository) -> list[str]:
    return [name for name, one in models.served.items() if one.models]


def test_the_model_that_was_asked_least_recently_leaves(three: Any) -> None:
    opener, models, core = three
    assert here(models) == ["b", "c"]
    infer(client(core), rows(1), model="b")
    infer(client(core), rows(1), model="a")  # comes back; c was asked least recently
    assert here(models) == ["a", "b"] and opener.opened == ["a", "b", "c", "a"]


@pytest.mark.parametrize("binary", [True, False])
def test_a_model_that_left_answers_rightly_when_it_is_asked(three: Any, binary: bool) -> None:
    opener, _, core = three
    x = rows(3)
    np.testing.assert_allclose(infer(client(core), x, model="a", binary=binary), expected(x), rtol=1e-5)
    assert opener.opened == ["a", "b", "c", "a"]


def test_a_model_that_left_comes_back_over_grpc_too(three: Any) -> None:
    opener, _, core = three
    with grpc.insecure_channel(f"127.0.0.1:{core.ports['grpc']}") as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelReady")
        answer = message("inference.ModelReadyResponse").FromString(
            ask(message("inference.ModelReadyRequest")(name="a").SerializeToString())
        )
    assert answer.ready and opener.opened[-1] == "a"


def test_the_index_says_who_left_and_the_others_stay_ready(three: Any) -> None:
    _, _, core = three
    states = {row["name"]: (row["state"], row.get("reason", "")) for row in client(core).get_model_repository_index()}
    assert (
        states["a"] == ("UNAVAILABLE", "left memory; comes back when it is asked")
        and states["b"][0] == "READY"
        and client(core).is_server_ready()
    )


def test_many_who_ask_at_once_load_it_once(three: Any) -> None:
    opener, models, core = three

    async def scene() -> None:
        await asyncio.gather(*(models.wake("a") for _ in range(20)))

    core.run(scene())
    assert opener.opened.count("a") == 2


def test_a_model_that_cannot_be_loaded_again_is_503_and_names_no_path(three: Any) -> None:
    opener, models, core = three
    opener.gone.add("a")
    with pytest.raises(InferenceServerException, match="had left memory and cannot be loaded again now") as caught:
        infer(client(core), rows(1), model="a")
    assert "/secret" not in str(caught.value) and models.rests("a")
    opener.gone.clear()
    models.served["a"].broken_until = 0.0  # the five seconds are over
    infer(client(core), rows(1), model="a")


def test_one_that_left_can_be_unloaded_and_is_unknown_then(three: Any) -> None:
    _, models, core = three
    client(core).unload_model("a")
    assert not models.rests("a")
    with pytest.raises(InferenceServerException, match="unknown model"):
        infer(client(core), rows(1), model="a")


def test_a_version_unloaded_by_hand_does_not_come_back_with_the_others() -> None:
    opener = Opener()
    models = Repository(opener, lambda reference: [f"{reference.partition('@')[0]}@{number}" for number in reference.partition("@")[2].split(",")], most_bytes=int(2.5 * MIB))

    async def scene() -> None:
        await models.load("m@3,2")
        await models.unload("m", "3")
        await models.load("b@1")
        models.pick("b")
        await models.load("c@1")  # which sends m to rest
        assert models.rests("m")
        await models.wake("m")
        assert models.versions("m") == ["2"] and models.pick("m").version == "2"
        await models.close()

    asyncio.run(scene())


def test_of_a_model_that_left_one_version_can_be_unloaded_and_the_other_answers() -> None:
    models = Repository(Opener(), lambda reference: [f"{reference.partition('@')[0]}@{number}" for number in reference.partition("@")[2].split(",")], most_bytes=int(2.5 * MIB))

    async def scene() -> None:
        await models.load("m@3,2")
        await models.load("b@1")
        assert models.rests("m")
        with pytest.raises(UnknownModelError, match="this server has 2, 3"):
            await models.unload("m", "7")
        await models.unload("m", "3")
        await models.wake("m")
        assert models.versions("m") == ["2"]
        await models.close()

    asyncio.run(scene())


def test_a_client_that_leaves_does_not_stop_a_model_on_its_way_back() -> None:
    go, slow, opener = threading.Event(), threading.Event(), Opener()

    def opened(reference: str) -> ServedModel:
        assert not slow.is_set() or go.wait(20)
        return opener(reference)

    models = Repository(opened, lambda reference: [reference], most_bytes=int(1.5 * MIB))

    async def scene() -> None:
        await models.load("a@1")
        await models.load("b@1")
        slow.set()
        leaves = asyncio.create_task(models.wake("a"))
        await asyncio.sleep(0)
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        stays = asyncio.create_task(models.wake("a"))
        go.set()
        await stays
        assert models.pick("a").ready and opener.opened.count("a") == 2
        await models.close()

    asyncio.run(scene())


def test_one_that_cannot_come_back_sends_the_others_to_rest_once_not_at_every_request(three: Any) -> None:
    opener, models, core = three
    opener.gone.add("a")
    for _ in range(5):
        with pytest.raises(InferenceServerException):
            infer(client(core), rows(1), model="a")
    assert here(models) and client(core).is_server_ready()


def test_following_the_registry_does_not_wake_it(three: Any) -> None:
    opener, models, core = three
    core.run(models.refresh())
    assert opener.opened == ["a", "b", "c"]


def test_a_model_that_is_larger_than_all_the_room_is_refused_with_both_numbers_and_the_others_stay() -> None:
    models = repository(Opener(big=5 * MIB), 2.5)

    async def scene() -> None:
        await models.load("a@1")
        with pytest.raises(UserError, match=r"big: its engines take about 5.0 MiB, and memory_mib allows 2.5"):
            await models.load("big@1")
        assert here(models) == ["a"] and models.pick("a").ready
        await models.close()

    asyncio.run(scene())


def test_where_nobody_can_leave_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    models = repository(Opener(), 1.5)

    async def scene() -> None:
        await models.load("a@1")
        async with models._alone.setdefault("a", asyncio.Lock()):  # a is being loaded anew
            await models.load("b@1")
        assert here(models) == ["a", "b"]
        await models.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scene())
    assert "more is in memory than memory_mib allows" in caplog.text


def test_picking_one_that_left_says_so() -> None:
    models = repository(Opener(), 1.5)

    async def scene() -> None:
        await models.load("a@1")
        await models.load("b@1")
        with pytest.raises(RestingError):
            models.pick("a")
        await models.close()

    asyncio.run(scene())


def test_of_published_versions_the_size_is_that_of_the_engines_that_are_open(tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    version = make_version(tmp_path / "v", storage.cache_dir)
    publish(version, storage)
    core = Core(
        of_storage(storage, Limits(instances=2), room=Room(memory_mib=1.0, answers_mib=1.0)), ("digits@production",), Listen(http_port=0)
    ).start()
    try:
        model = core.models.pick("digits")
        assert model.memory_bytes == int(1.2 * version.file("int8.onnx").stat().st_size) and model.batcher.instances == 2
        core.run(asyncio.to_thread(model.ladder.pin, "fp32"))
        assert model.memory_bytes == sum(int(1.2 * version.file(f"{name}.onnx").stat().st_size) for name in ("int8", "fp32"))
        with urllib.request.urlopen(f"http://127.0.0.1:{core.ports['http']}/v2") as found:
            assert json.load(found)["ports"] == core.ports
    finally:
        core.stop(drain_s=1)
