"""Faults of a group of Ray Train workers, caused for real on one cluster: a notice, a hung and a stopped rank, torn rows, a killed driver, too few places."""

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

# digits, read row by row; in whoever finds the file `hang` first it never comes back, and while `torn` is there no row can be read.
ROWS = """
import os, threading
from pathlib import Path
from sklearn.datasets import load_digits

class Rows:
    def __init__(self, folder):
        digits = load_digits()
        self.x, self.y, self.folder = digits.images[:, None].astype("float32") / 16, digits.target, Path(folder)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        if (self.folder / "torn").exists():
            raise OSError("the disk is gone")
        if (self.folder / "hang").exists():
            try:
                (self.folder / "hang").rename(self.folder / "hung")
            except FileNotFoundError:
                pass
            else:
                threading.Event().wait()
        return self.x[index], self.y[index]
"""


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "faulty_rows.py").write_text(ROWS)
    # A stopped worker and a hung one keep their places for a minute after they were given up: there must be room for their successors.
    started = Cluster(num_cpus=5, settings={"PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{folder}"})
    try:
        yield started
    finally:
        started.stop()


def begin(cluster, folder, *overrides):
    command = [
        sys.executable, "-m", "portaisys.cli", "train", str(ROOT / "jobs/specs/digits.yaml"), "train.num_workers=2", "model.channels=[8]", "model.blocks=[1]", "train.augment=none",
        "compress=[]", "engine.also_build=[]", "train.checkpoint_every_steps=20", f"storage.path={folder / 'runs'}", f"storage.cache={folder / 'cache'}", *overrides,
    ]  # fmt: skip
    return subprocess.Popen(command, env=cluster.environment | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(process, condition):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(cluster):
    return [child for child in psutil.Process(cluster.process.pid).children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())]


def rows(folder, name):
    file = folder / "runs/digits/train.work" / name
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def attempts(folder):
    return [row["from"] for row in rows(folder, "notes.jsonl") if "from" in row]


def steps(folder):
    return [json.loads(line)["step"] for log in folder.glob("runs/digits/logs/*.jsonl") for line in log.read_text().splitlines()]


def trains_on(process, folder, more=20):
    """Until it has done `more` steps than any before."""
    at = max(steps(folder), default=0)
    until(process, lambda: max(steps(folder), default=0) >= at + more)


def test_a_notice_a_hung_loader_and_a_stopped_worker_are_survived_and_torn_rows_end_the_run_at_once(there, tmp_path):
    data = f"data={{source: factory, factory: 'faulty_rows:Rows', options: {{folder: {tmp_path}}}, test_rows: 600}}"
    process = begin(there, tmp_path, data, "train.epochs=2000", "train.max_failures=3", "train.hang_timeout_s=6")
    trains_on(process, tmp_path)
    os.kill(workers(there)[1].pid, signal.SIGTERM)
    until(process, lambda: len(attempts(tmp_path)) == 2)

    trains_on(process, tmp_path)
    (tmp_path / "hang").touch()
    until(process, lambda: len(attempts(tmp_path)) == 3)

    trains_on(process, tmp_path)
    stopped = workers(there)[0]
    os.kill(stopped.pid, signal.SIGSTOP)
    until(process, lambda: len(attempts(tmp_path)) == 4)
    until(process, lambda: not stopped.is_running())

    trains_on(process, tmp_path)
    (tmp_path / "torn").touch()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("error: data.factory: faulty_rows:Rows: item ") and said.strip().endswith("the disk is gone"), said[-2000:]
    left, hung, silent = (row["note"] for row in rows(tmp_path, "restarts.jsonl"))
    start = attempts(tmp_path)
    assert f"asked to leave; all went on from step {start[1]}, where they wrote a checkpoint" in left and len(start) == 4 and start == sorted(start)
    assert "no worker has moved for 6 s: rank " in hung and "is loading the rows of step" in hung and "the others are computing step" in hung
    assert "does not answer" in silent and f"process {stopped.pid}" in silent


@pytest.mark.slow  # Ray holds a killed driver's places for a minute
def test_fewer_workers_train_where_that_is_allowed_and_a_killed_driver_is_followed_by_the_same_command(there, tmp_path):
    fewer = ["train.num_workers=8", "train.min_workers=1", "train.batch_size=128", "train.micro_batch=16", "train.epochs=30"]
    killed = begin(there, tmp_path, *fewer)
    trains_on(killed, tmp_path, 60)
    killed.kill()
    killed.communicate()
    again = begin(there, tmp_path, *fewer)
    said = again.communicate(timeout=150)[0]
    assert again.returncode == 0 and "where an earlier run stopped" in said, said[-3000:]
    notes = artifact.read(tmp_path / "runs/digits/train").notes
    assert "train.num_workers: 8 were asked for and 5 trained, for which there was room" in notes
    assert notes[-1].startswith("trained in 2 attempts: from step 0 with 5 workers, from step "), notes


def test_one_process_trains_where_no_worker_has_room_and_the_spec_allows_it(there, tmp_path):
    process = begin(there, tmp_path, "train.min_workers=0", "train.label_selector={role: nowhere}", "train.epochs=1")
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 0, said[-3000:]
    (note,) = artifact.read(tmp_path / "runs/digits/train").notes
    assert note.startswith("train.num_workers: 2 were asked for and one process without workers trained") and "nodes with role=nowhere have 0" in note
