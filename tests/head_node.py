"""A Ray cluster as users start one, for tests: `ray start --head` with token authentication and the dashboard."""

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

from conftest import free_port

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).parent / "ray"


class Cluster:
    """A head node of its own: real processes, a token, a dashboard; gone with its process group."""

    def __init__(self, num_cpus, port=None, settings=None, arguments=()):
        self.folder = Path(tempfile.mkdtemp(prefix="pj", dir="/tmp"))  # short: Ray's sockets stand below it
        ports = [port or free_port(), free_port(), free_port()]
        self.port = ports[0]
        self.dashboard = f"http://127.0.0.1:{ports[1]}"
        self.open = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))} | {"HOME": str(self.folder)}
        self.environment = self.open | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"}
        self.environment |= settings or {}
        command = [
            RAY, "start", "--head", "--block", "--num-cpus", num_cpus, "--port", ports[0], "--dashboard-port", ports[1], "--ray-client-server-port", ports[2],
            "--temp-dir", self.folder / "ray", "--disable-usage-stats", "--include-dashboard", "true", *arguments,
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

    def begin(self, *entrypoint, environment=None, folder=ROOT):
        """`ray job submit`, whose output is the job's."""
        command = [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", folder, "--runtime-env", ROOT / "jobs/runtime_env.yaml", "--", *entrypoint]
        return subprocess.Popen(
            list(map(str, command)), env=environment or self.environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def submit(self, *entrypoint, timeout=300, **options):
        """The same, waited for."""
        process = self.begin(*entrypoint, **options)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)  # SIGTERM takes 20 s, and nothing here is worth waiting for
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
