"""Twenty SIGKILLs at seeded random moments of a short run, each followed by a restart: the digests are the undisturbed run's."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from portaisys import artifact

ROOT = Path(__file__).parents[1]
STAGES = ("train", "prune-1", "distill-2", "export-dense", "export-small", "quantize")  # what follows depends on milliseconds
KILLS = 20

pytestmark = pytest.mark.slow


def command(folder):
    return [
        sys.executable, "-m", "portaisys.cli", "run", str(ROOT / "jobs/specs/digits.yaml"), "train.num_workers=0", "train.epochs=4",
        "compress.1.distill.epochs=4", "model.channels=[16,32]", "model.blocks=[1,1]", "compress.0.prune.round_to=4", "gate.max_accuracy_drop=0.04",
        "gate.latency_pairs=20", "train.checkpoint_every_steps=3", f"storage.path={folder / 'runs'}", f"storage.cache={folder / 'cache'}",
    ]  # fmt: skip


def digests(folder):
    return {name: artifact.read(folder / "runs/digits" / name, verify=True).digest for name in STAGES}


def test_twenty_killed_runs_end_with_the_digests_of_an_undisturbed_one(tmp_path):
    subprocess.run(command(tmp_path / "warm"), check=True, capture_output=True)
    started = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    length_s = time.monotonic() - started
    expected = digests(tmp_path / "whole")
    assert expected == digests(tmp_path / "warm")
    rng = random.Random(0)
    killed = 0
    for number in range(2 * KILLS):
        folder = tmp_path / f"killed-{number}"
        process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        moment_s = rng.uniform(0.1, 0.95) * length_s
        try:
            process.wait(moment_s)
            continue  # it was faster than the one measured: no kill, so it does not count
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        again = subprocess.run(command(folder), capture_output=True, text=True)
        assert again.returncode == 0, f"kill {number} at {moment_s:.1f} s: {again.stderr[-2000:]}"
        assert digests(folder) == expected, f"kill {number} at {moment_s:.1f} s"
        killed += 1
        print(f"kill {killed}/{KILLS} at {moment_s:.1f} s of {length_s:.1f}: same digests", flush=True)
        shutil.rmtree(folder)
        if killed == KILLS:
            return
    raise AssertionError(f"only {killed} of {2 * KILLS} runs were alive when they were to be killed")
