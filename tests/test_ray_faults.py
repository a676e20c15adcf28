"""Faults of a group of Ray Train workers, each caused for real on one cluster: a notice, a hung and a stopped rank, torn rows, a killed driver, too few places."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from head_node import ROOT, Cluster

from portaisys import artifact

pytestmark = pytest.mark.cluster

# A user's data whose loader does at step `when` what a file says, once: rank 1 alone, since only it takes the row.
DATA = '''
import os, pathlib, signal, time
'''


@pytest.fixture(scope="module")
def there():
    started = Cluster(num_cpus=3)
    try:
        yield started
    finally:
        started.stop()


def command(folder, *overrides):
    return [
        sys.executable, "-m", "portaisys.cli", "train", str(ROOT / "jobs/specs/digits.yaml"), "train.num_workers=2", "train.epochs=40", "model.channels=[8,16]", "model.blocks=[1,1]",
        "compress=[]", "engine.also_build=[]", "train.checkpoint_every_steps=50", f"storage.path={folder / 'runs'}", f"storage.cache={folder / 'cache'}", *overrides,
    ]  # fmt: skip


def environment(cluster):
    return cluster.environment | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}", "PYTHONPATH": str(ROOT / "platform")}


def begin(cluster, folder, *overrides):
    return subprocess.Popen(command(folder, *overrides), env=environment(cluster), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(process, condition, timeout_s=100):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline and (process is None or process.poll() is None), process and process.communicate()[0][-3000:]
        time.sleep(0.05)
    return found


def workers(cluster):
    return [child for child in psutil.Process(cluster.process.pid).children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())]


def steps(folder):
    return [json.loads(line)["step"] for log in folder.glob("runs/digits/logs/*.jsonl") for line in log.read_text().splitlines()]


def trained(cluster, folder, *overrides):
    process = begin(cluster, folder, *overrides)
    until(process, lambda: max(steps(folder), default=0) >= 100)
    return process


def test_probe(there, tmp_path):
    process = trained(there, tmp_path, "train.hang_timeout_s=5", "train.max_failures=1")
    print("start", time.monotonic())
    os.kill(workers(there)[1].pid, signal.SIGTERM)
    work = tmp_path / "runs/digits/train.work"
    until(process, lambda: "asked to leave" in ((work / "restarts.jsonl").read_text() if (work / "restarts.jsonl").exists() else ""))
    print("noted", time.monotonic(), (work / "restarts.jsonl").read_text())
    until(process, lambda: (work / "notes.jsonl").read_text().count("from") == 2)
    print("again", time.monotonic(), (work / "notes.jsonl").read_text())
    at = max(steps(tmp_path))
    until(process, lambda: max(steps(tmp_path)) > at + 40)
    victim = workers(there)[-1]
    os.kill(victim.pid, signal.SIGSTOP)
    print("stopped", time.monotonic(), victim.pid)
    until(process, lambda: (work / "restarts.jsonl").read_text().count("note") == 2)
    print("noted", time.monotonic(), (work / "restarts.jsonl").read_text())
    until(process, lambda: (work / "notes.jsonl").read_text().count("from") == 3)
    print("again", time.monotonic(), (work / "notes.jsonl").read_text(), psutil.pid_exists(victim.pid) and victim.status())
    said = process.communicate(timeout=200)[0]
    print(said[-1500:], psutil.pid_exists(victim.pid) and victim.status())
    print(artifact.read(tmp_path / "runs/digits/train").notes)
