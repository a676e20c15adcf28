"""Jobs as users submit them: a cluster of `ray start --head` with token authentication, `ray job submit`, the dashboard's APIs."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import free_port

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).parent / "ray"
TINY = ["train.epochs=2", "model.channels=[8,16]", "model.blocks=[1,1]", "compress=[]", "engine.also_build=[]"]

pytestmark = pytest.mark.cluster


class Cluster:
    """A head node of its own: real processes, a token, a dashboard; gone with its process group."""

    def __init__(self, num_cpus):
        self.folder = Path(tempfile.mkdtemp(prefix="pj", dir="/tmp"))  # short: Ray's sockets stand below it
        ports = [free_port() for _ in range(3)]
        self.dashboard = f"http://127.0.0.1:{ports[1]}"
        self.open = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))} | {"HOME": str(self.folder)}
        self.environment = self.open | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"}
        command = [
            RAY, "start", "--head", "--block", "--num-cpus", num_cpus, "--port", ports[0], "--dashboard-port", ports[1], "--ray-client-server-port", ports[2],
            "--temp-dir", self.folder / "ray", "--disable-usage-stats", "--include-dashboard", "true",
        ]  # fmt: skip
        self.process = subprocess.Popen(list(map(str, command)), env=self.environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 90
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)

    def _answers(self):
        try:
            return self.get("/api/jobs/") is not None
        except (OSError, urllib.error.URLError):
            return False

    def get(self, path):
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def submit(self, *entrypoint, environment=None, timeout=300):
        command = [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", ROOT, "--runtime-env", ROOT / "jobs/runtime_env.yaml", "--", *entrypoint]
        return subprocess.run(list(map(str, command)), env=environment or self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)  # SIGTERM takes 20 s, and nothing here is worth waiting for
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(num_cpus=3)
    try:
        yield cluster
    finally:
        cluster.stop()


def test_without_the_token_a_job_is_refused(cluster):
    refused = cluster.submit("python", "-c", "print('ran')", environment=cluster.open)
    assert refused.returncode != 0 and "ran\n" not in refused.stdout


def test_a_training_job_succeeds_and_the_dashboard_shows_its_run(cluster):
    done = cluster.submit("python", "jobs/train.py", "jobs/specs/digits.yaml", *TINY)
    assert done.returncode == 0 and "succeeded" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    # A relative storage.path would go with the job's working directory.
    assert f"this job writes to {cluster.folder}/portaisys/runs" in done.stdout
    assert (cluster.folder / "portaisys/runs/digits/train/manifest.json").exists()
    assert [job["status"] for job in cluster.get("/api/jobs/") if "jobs/train.py" in job["entrypoint"]] == ["SUCCEEDED"]
    runs = cluster.get("/api/train/v2/runs/v1")["train_runs"]
    assert [(run["name"].rpartition("-")[0], run["status"]) for run in runs] == [("digits-train", "FINISHED")]


def test_the_same_job_again_says_that_it_was_finished(cluster):
    again = cluster.submit("python", "jobs/train.py", "jobs/specs/digits.yaml", *TINY)
    assert again.returncode == 0 and "= train          finished before" in again.stdout, again.stdout[-3000:]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.num_workers=64", "train.batch_size=64"], "error: train.num_workers: 64 workers need 64 CPUs and the cluster has 3"),
        (["train.use_gpu=true"], "workers need 2 GPUs and the cluster has 0"),
        (["model={name: factory, factory: 'no_such_package:model'}"], "error: model.factory"),
    ],
    ids=["cpus", "gpus", "package"],
)
def test_a_job_that_can_never_run_ends_at_once_with_one_line(cluster, overrides, says):
    failed = cluster.submit("python", "jobs/train.py", "jobs/specs/digits.yaml", "name=other", *TINY, *overrides)
    assert failed.returncode != 0 and says in failed.stdout, failed.stdout[-3000:]
    assert "Traceback" not in failed.stdout
