"""Replicas of one application on a real Ray cluster: what one is asked to load or unload they all do, newcomers too, and there are as many as the load needs."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from conftest import free_port
from test_serving_alone import make_version, storage_in

from portaisys import registry
from portaisys.serve.app import ServeArgs, build_app
from portaisys.serve.scaling import Autoscale
from portaisys.spec import Storage

pytestmark = pytest.mark.cluster


@dataclass(frozen=True)
class Cluster:
    """`deploy` changes the one application; `data`: its data port."""

    storage: Storage
    data: int

    def deploy(self, **args: object) -> None:
        from ray import serve

        serve.run(build_app(ServeArgs(model="digits@production", storage=self.storage, num_cpus=0.1, data_port=self.data, **args)))  # type: ignore[arg-type]

    def statuses(self, path: str, times: int = 40) -> Counter[int]:
        """Of so many connections, which the kernel spreads over the replicas of a port."""
        return Counter(self.ask(path) for _ in range(times))

    def ask(self, path: str, body: bytes | None = None) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{self.data}{path}", body), timeout=60) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as refused:
            return refused.code

    def running(self) -> int:
        from ray import serve

        return int(serve.status().applications["default"].deployments["inference"].replica_states.get("RUNNING", 0))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    import ray
    from ray import serve

    folder = tmp_path_factory.mktemp("siblings")
    storage = storage_in(folder)
    version = make_version(folder / "version", storage.cache_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        opened = registry.open_registry(storage)
        for name in ("digits", "extra"):
            made = opened.publish(name, version.path, opened.log_run(name, {}, {}, {}, {}), {"data": "d1"}, {"action": "pass", "because": "test"})
            opened.promote(name, made.version, "test")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
            yield Cluster(storage, free_port())
        finally:
            serve.shutdown()
            ray.shutdown()


def test_what_one_replica_loads_all_have_newcomers_too_until_it_is_unloaded(cluster: Cluster) -> None:
    cluster.deploy(num_replicas=2)
    assert cluster.statuses("/v2/models/extra/ready") == {404: 40}
    assert cluster.ask("/v2/repository/models/extra/load", b"{}") == 200
    assert cluster.statuses("/v2/models/extra/ready") == {200: 40}
    cluster.deploy(num_replicas=3)
    until(lambda: cluster.running() == 3 and cluster.statuses("/v2/models/extra/ready") == {200: 40})
    assert cluster.ask("/v2/repository/models/extra/unload", b"{}") == 200
    assert cluster.statuses("/v2/models/extra/ready") == {404: 40}
    assert cluster.statuses("/v2/models/digits/ready") == {200: 40}


def test_there_are_as_many_replicas_as_the_load_of_the_data_port_needs(cluster: Cluster) -> None:
    cluster.deploy(autoscale=Autoscale(max_replicas=2, target_load=0.02, look_back_s=1, upscale_delay_s=0, downscale_delay_s=1))
    until(lambda: cluster.running() == 1)
    stop = threading.Event()

    def load() -> None:
        body = b'{"inputs": [{"name": "x", "shape": [8, 8, 8], "datatype": "FP32", "data": %b}]}' % str([0.5] * 512).encode()
        while not stop.is_set():
            cluster.ask("/v2/models/digits/infer", body)

    askers = [threading.Thread(target=load) for _ in range(4)]
    for asker in askers:
        asker.start()
    try:
        until(lambda: cluster.running() == 2)
    finally:
        stop.set()
        for asker in askers:
            asker.join()
    until(lambda: cluster.running() == 1)
