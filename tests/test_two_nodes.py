"""Two machines in small: network namespaces joined by a veth pair, `ray start` in each; DDP across the link, which is cut and restored."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from head_node import RAY, ROOT

from portaisys import artifact

pytestmark = pytest.mark.cluster
HERE, THERE = "10.77.0.1", "10.77.0.2"
PORT = "6399"
CUT_IS_NOTICED = {  # in seconds instead of Ray's half minute: the test waits for it
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}  # fmt: skip


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def why_not():
    if shutil.which("ip") is None:
        return "needs the command ip (iproute2)"
    name = f"pt{os.getpid()}"
    made = ip("netns", "add", name)
    ip("netns", "del", name)
    return f"network namespaces are not allowed here: {made.stderr.strip()}" if made.returncode else ""


@pytest.fixture(scope="module")
def link():
    """Names of two namespaces that see nothing but each other."""
    if reason := why_not():
        pytest.skip(reason)
    names = [f"pt{os.getpid()}{letter}" for letter in "ab"]
    for name in names:
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
    for name, address in zip(names, (HERE, THERE), strict=True):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
    yield names
    for name in names:
        ip("netns", "del", name)


class Machine:
    """A namespace with `ray start` in it, started again when it ends, as a service manager does."""

    def __init__(self, namespace, environment, *arguments):
        command = ["ip", "netns", "exec", namespace, RAY, "start", "--block", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", *arguments]
        loop = f"while true; do {' '.join(map(str, command))}; sleep 1; done"
        self.process = subprocess.Popen(["bash", "-c", loop], env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def machines(link):
    """The environment of a process on the first machine, connected to the cluster of both."""
    folder = Path(tempfile.mkdtemp(prefix="pn", dir="/tmp"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))} | CUT_IS_NOTICED
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "HOME": str(folder), "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT / "platform")}
    started = [
        Machine(link[0], environment, "--head", f"--port={PORT}", f"--node-ip-address={HERE}", f"--temp-dir={folder}/ray", "--include-dashboard=false"),
        Machine(link[1], environment, f"--address={HERE}:{PORT}", f"--node-ip-address={THERE}"),
    ]
    try:
        yield environment | {"RAY_ADDRESS": f"{HERE}:{PORT}", "MLFLOW_TRACKING_URI": f"http://{HERE}:5000"}  # training alone asks no registry
    finally:
        for machine in started:
            machine.stop()
        shutil.rmtree(folder, ignore_errors=True)


NODES = "import ray; ray.init(log_to_driver=False); print(sum(node['Alive'] for node in ray.nodes()))"


def on_first(link, machines, *command, **options):
    return subprocess.Popen(["ip", "netns", "exec", link[0], sys.executable, *map(str, command)], env=machines, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def wait_for_both(link, machines):
    deadline = time.monotonic() + 120
    while not on_first(link, machines, "-c", NODES).communicate()[0].strip().endswith("2"):
        assert time.monotonic() < deadline


def train(link, machines, folder, name):
    overrides = [
        f"name={name}", "train.epochs=30", "train.num_workers=2", "train.checkpoint_every_steps=8", "train.max_failures=4", "model.channels=[8,16]", "model.blocks=[1,1]",
        "compress=[]", "engine.also_build=[]", "storage.shared=true", f"storage.path={folder}/runs", f"storage.cache={folder}/cache",
    ]  # fmt: skip
    return on_first(link, machines, "-m", "portaisys.cli", "train", ROOT / "jobs/specs/digits.yaml", *overrides)


def steps(folder, name):
    return [json.loads(line)["step"] for log in folder.glob(f"runs/{name}/logs/*.jsonl") for line in log.read_text().splitlines()]


def test_a_run_over_two_machines_survives_the_loss_of_the_link_between_them(link, machines, tmp_path):
    wait_for_both(link, machines)
    whole = train(link, machines, tmp_path, "whole")
    said = whole.communicate(timeout=200)[0]
    assert whole.returncode == 0, said[-3000:]

    cut = train(link, machines, tmp_path, "cut")
    deadline = time.monotonic() + 100
    while max(steps(tmp_path, "cut"), default=0) < 60:
        assert cut.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    ip("-n", link[1], "link", "set", "eth0", "down")
    before = len(steps(tmp_path, "cut"))
    alone = on_first(link, machines, "-c", "import ray, time; ray.init(log_to_driver=False)\nwhile sum(node['Alive'] for node in ray.nodes()) > 1: time.sleep(0.1)")
    alone.communicate(timeout=60)
    assert cut.poll() is None
    ip("-n", link[1], "link", "set", "eth0", "up")
    said = cut.communicate(timeout=250)[0]
    assert cut.returncode == 0, said[-3000:]

    # It went on from its last checkpoint, not from the start, and ended with the very bits of the run that nobody disturbed.
    went_on = steps(tmp_path, "cut")[before:]
    assert min(went_on) > 50, went_on
    assert artifact.read(tmp_path / "runs/cut/train").digest == artifact.read(tmp_path / "runs/whole/train").digest
    assert re.search("train .* done|✓ train", said)
