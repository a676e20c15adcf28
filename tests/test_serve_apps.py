"""The files of serve_apps/: checked key by key, deployed on a real cluster, rolled over under load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import free_port
from head_node import RAY, Cluster
from test_serving_alone import make_version, publish, storage_in
from tritonclient.http import InferenceServerClient, InferInput

from portaisys import registry
from portaisys.serve.deploy import check
from portaisys.spec import UserError

ROOT = Path(__file__).parents[1]
APPS = sorted((ROOT / "serve_apps").glob("*.yaml"))


@pytest.mark.parametrize("path", APPS, ids=lambda path: path.name)
def test_every_application_file_is_valid_and_local(path):
    tree = check(path)
    assert tree["http_options"]["host"] == "127.0.0.1" and tree["logging_config"]["encoding"] == "JSON"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("http_options:", "http_option:", r"http_option: unknown key; did you mean 'http_options'"),
        ("  host:", "  hots:", r"http_options\.hots: unknown key; did you mean 'host'"),
        ("route_prefix:", "route_prefx:", r"applications\.0\.route_prefx: unknown key; did you mean 'route_prefix'"),
        ("max_queue: 1024", "max_queu: 1024", r"applications\.0\.args\.max_queu"),
        ("max_queue: 1024", "max_queue: 0", r"applications\.0\.args\.max_queue.*greater than or equal to 1"),
        ("port: 8000", "port: many", r"http_options\.port"),
        ("applications:", "application:", "a list of applications"),
    ],
)
def test_a_misspelt_or_wrong_key_is_refused_where_it_stands(tmp_path, old, new, says):
    path = tmp_path / "app.yaml"
    path.write_text((ROOT / "serve_apps/digits.yaml").read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=says):
        check(path)


class Deployment:
    """serve_apps/digits.yaml with storage, port and batch of a small version; everything else as it stands."""

    def __init__(self, cluster, folder):
        self.cluster, self.path, self.port, self.storage = cluster, folder / "digits.yaml", free_port(), storage_in(folder)

    def write(self, runtime_env=None, **arguments):
        tree = yaml.safe_load((ROOT / "serve_apps/digits.yaml").read_text())
        tree["http_options"]["port"] = self.port
        storage = {"path": self.storage.path, "cache": self.storage.cache}
        tree["applications"][0]["args"] |= {"storage": storage, "max_batch": 8, "num_cpus": 0.1} | arguments
        tree["applications"][0] |= {"runtime_env": runtime_env} if runtime_env else {}
        self.path.write_text(yaml.safe_dump(tree))
        return self

    def run(self, *command):
        return subprocess.run(list(map(str, command)), env=self.cluster.environment, capture_output=True, text=True, timeout=180)

    def deploy(self, *arguments):
        return self.run(sys.executable, "-m", "portaisys.cli", "deploy", self.path, "--address", self.cluster.dashboard, *arguments)

    def logged(self):
        """The JSON lines of the replicas."""
        logs = (self.cluster.folder / "ray/session_latest/logs/serve").glob("replica_*.log")
        return [json.loads(line) for log in logs for line in log.read_text().splitlines() if line.startswith("{")]

    def client(self):
        return InferenceServerClient(f"127.0.0.1:{self.port}", network_timeout=60, connection_timeout=60)


def infer(client, x, headers=None):
    tensor = InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    answer = client.infer("digits", [tensor], headers=headers)
    return answer.get_response()["model_version"], answer.as_numpy("logits")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apps")
    cluster = Cluster(num_cpus=2, arguments=["--labels", "role=inference"])
    try:
        deployment = Deployment(cluster, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            publish(make_version(folder / "one", folder / "cache"), deployment.storage)
        yield deployment
    finally:
        cluster.stop()


@pytest.mark.cluster
def test_serve_deploy_brings_the_application_up_and_the_dashboard_shows_it(deployment):
    deployment.write()
    done = deployment.run(RAY.parent / "serve", "deploy", deployment.path, "--address", deployment.cluster.dashboard)
    assert done.returncode == 0, done.stderr[-2000:]
    deadline = time.monotonic() + 120
    while (status := deployment.cluster.get("/api/serve/applications/")["applications"].get("digits", {}).get("status")) != "RUNNING":
        assert status != "DEPLOY_FAILED" and time.monotonic() < deadline, status
        time.sleep(0.2)
    assert deployment.client().is_model_ready("digits")
    assert infer(deployment.client(), np.zeros((2, 8, 8), np.float32))[1].shape == (2, 10)


@pytest.mark.cluster
def test_the_logs_are_json_and_carry_the_request_id_that_the_client_gave(deployment):
    infer(deployment.client(), np.zeros((1, 8, 8), np.float32), headers={"X-Request-ID": "a-request-of-mine"})
    deadline = time.monotonic() + 30
    while not (lines := [line for line in deployment.logged() if line.get("request_id") == "a-request-of-mine"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert lines[0]["application"] == "digits" and lines[0]["deployment"] == "digits_inference" and lines[0]["replica"]
    # Our own lines stand among Serve's, in the same encoding.
    assert [line for line in deployment.logged() if " ready after " in line["message"]]


@pytest.mark.cluster
def test_a_changed_file_rolls_over_without_a_failed_request(deployment, tmp_path):
    """The changed file takes its code from a folder of the nodes, asks for their role, and names another version."""
    code, imported = tmp_path / "code", tmp_path / "imported"
    shutil.copytree(ROOT / "platform", code / "platform", ignore=shutil.ignore_patterns("__pycache__"))
    with (code / "platform/portaisys/serve/app.py").open("a") as app:
        app.write(f"\nPath({str(imported)!r}).touch()\n")
    publish(make_version(tmp_path / "two", tmp_path / "cache", tolerance=2e-4), deployment.storage)
    x = np.random.default_rng(1).normal(size=(3, 8, 8)).astype(np.float32)
    expected = infer(deployment.client(), x)[1]
    seen, failed, stop = [], [], threading.Event()

    def hammer():
        client = deployment.client()
        while not stop.is_set():
            try:
                version, logits = infer(client, x)
                assert np.allclose(logits, expected, atol=1e-5)
                seen.append(version)
            except Exception as error:  # whatever it is, it is a failed request
                failed.append(repr(error))

    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        from_here = {"working_dir": f"local://{code}", "env_vars": {"PYTHONPATH": f"{code}/platform"}}
        done = deployment.write(from_here, model="digits@2", max_batch=4, label_selector={"role": "inference"}).deploy()
        assert done.returncode == 0 and "digits is RUNNING below /" in done.stdout, done.stdout + done.stderr
        deadline = time.monotonic() + 60
        while "2" not in seen:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        stop.set()
        thread.join()
    assert not failed, failed[:3]
    assert imported.exists()
    assert set(seen) == {"1", "2"} and len(seen) > 50


@pytest.mark.cluster
def test_a_version_without_a_passing_verdict_is_refused_and_the_old_one_goes_on(deployment, tmp_path):
    opened = registry.open_registry(deployment.storage)
    version = make_version(tmp_path / "three", tmp_path / "cache", tolerance=3e-4)
    made = opened.publish("digits", version.path, opened.log_run("digits", {}, {}, {}, {}), {"data": "d1"}, {"action": "fail", "because": "accuracy drop 3 points"})
    refused = deployment.write(model=f"digits@{made.version}").deploy()
    assert refused.returncode == 2, refused.stdout
    assert "its verdict is 'fail' (accuracy drop 3 points), so it is not served" in refused.stderr
    assert infer(deployment.client(), np.zeros((1, 8, 8), np.float32))[0] == "2"


@pytest.mark.cluster
def test_replicas_that_no_node_can_hold_are_told_at_once_and_the_old_one_goes_on(deployment):
    waiting = deployment.write(model="digits@2", label_selector={"role": "elsewhere"}).deploy("--timeout-s", "5")
    assert waiting.returncode == 2 and "after 5 s: digits DEPLOYING" in waiting.stderr
    assert "waiting for nodes: " in waiting.stdout and "nodes with role=elsewhere have 0; lower it or add nodes (nodes there: role=inference)" in waiting.stdout
    assert infer(deployment.client(), np.zeros((1, 8, 8), np.float32))[0] == "2"


@pytest.mark.cluster
def test_without_the_token_nothing_is_deployed(deployment):
    without = subprocess.run(
        [sys.executable, "-m", "portaisys.cli", "deploy", str(ROOT / "serve_apps/digits.yaml"), "--address", deployment.cluster.dashboard],
        env=deployment.cluster.open | {"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert without.returncode == 2 and "did not take the file" in without.stderr and "Traceback" not in without.stderr
