"""The conformance suite against the application as it is deployed: Ray Serve's route, below a prefix too, and its replica's data port."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conformance.conftest import KNOWN
from conftest import free_port
from test_serving_alone import make_version, publish, storage_in

from portaisys.serve.app import ServeArgs, build_app

pytestmark = pytest.mark.cluster
SUITE = Path(__file__).parent / "conformance"


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    import ray
    from ray import serve

    folder = tmp_path_factory.mktemp("serve")
    storage = storage_in(folder)
    publish(make_version(folder / "version", storage.cache_dir), storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            route, data, grpc = free_port(), free_port(), free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": route})
            serve.run(build_app(ServeArgs(model="digits@production", storage=storage, num_cpus=0.1, data_port=data, grpc_port=grpc)), route_prefix="/digits")
            yield {"route": f"http://127.0.0.1:{route}/digits", "data port": f"http://127.0.0.1:{data}", "grpc": f"127.0.0.1:{grpc}"}
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.mark.parametrize("path", ["route", "data port"])
def test_the_deployed_application_conforms(addresses: dict[str, str], path: str) -> None:
    known = [f"not {test}" for test in KNOWN[path]]
    # On the route Ray's own HTTP server reads the bytes, ten times as slowly: no fuzz there.
    options = ["--grpc", addresses["grpc"]] if path == "data port" else ["--ignore", f"{SUITE.name}/test_raw_sockets.py"]
    command = [sys.executable, "-m", "pytest", SUITE.name, "-q", "-p", "no:cacheprovider", "--url", addresses[path], *options, "--model", "digits", "--tb=short"]
    done = subprocess.run([*command, *(["-k", " and ".join(known)] if known else [])], cwd=SUITE.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
