"""Searching a space on Ray: how trials end, what is tried twice, and a search that is killed and gone on with."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from portaisys import cluster, spec
from portaisys.spec import UserError
from portaisys.trials import Range, _placement_groups, search


@pytest.fixture(scope="module")
def ray_cluster():
    with cluster.on_ray(2):
        yield


def make_formula():
    """Stands for training: what a trial reports and returns is real, what it computes is quick. Made here, so that it travels by value."""

    def formula(params, report):
        if params["a"] > 0.8:
            raise UserError("train.learning_rate: too large")
        for epoch in (1, 2, 3):
            # Those to be invalid are bad as well: the best of the others is then never stopped, in whatever order they report.
            report({"validation_error": params["a"] + 0.1 / epoch + (params["b"] == 2), "epoch": epoch})
        return {"validation_error": params["a"], "latency_ms": float("nan") if params["b"] == 2 else 1 - params["a"], "parameters": 5}

    return formula


@pytest.mark.cluster
def test_every_trial_ends_with_its_state_and_nothing_is_left_on_the_cluster(ray_cluster, tmp_path):
    options = spec.Search(trials=12, max_concurrent=2, early_stop=spec.EarlyStop())
    trials = search(make_formula(), {"a": Range(low=0.0, high=1.0), "b": (0, 1, 2)}, options, tmp_path)
    by_state = {state: [trial for trial in trials if trial.state == state] for state in ("done", "stopped", "failed", "invalid")}
    assert len(trials) == 12 == sum(map(len, by_state.values()))
    assert by_state["done"] and all(trial.values["validation_error"] == trial.params["a"] for trial in by_state["done"])
    assert all("too large" in trial.because for trial in by_state["failed"])
    assert all("latency_ms is not a finite number" in trial.because and trial.params["b"] == 2 for trial in by_state["invalid"])
    assert all("stopped early" in trial.because for trial in by_state["stopped"])
    deadline = time.monotonic() + 30  # Ray takes groups down after the trial that held them
    while _placement_groups():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.cluster
def test_no_point_of_a_small_space_is_tried_twice_before_all_were(ray_cluster, tmp_path):
    space = {"a": (0.3, 0.1, 0.2), "b": (True, False), "c": ("only",)}

    def formula(params, report):
        assert params["c"] == "only"
        return {"validation_error": params["a"], "latency_ms": 1.0, "parameters": 1.0 + params["b"]}

    trials = search(formula, space, spec.Search(trials=6), tmp_path)
    assert {(trial.params["a"], trial.params["b"]) for trial in trials} == set(itertools.product(*list(space.values())[:2]))
    assert {trial.state for trial in search(formula, space, spec.Search(trials=7), tmp_path)} == {"done"}


@pytest.mark.cluster
def test_more_trials_at_once_than_the_cluster_can_hold_are_refused(ray_cluster, tmp_path):
    with pytest.raises(UserError, match=r"search\.max_concurrent: 64 trials at once need 64 CPUs and the cluster has 3"):
        search(make_formula(), {"a": Range(low=0.0, high=1.0), "b": (0, 1)}, spec.Search(max_concurrent=64), tmp_path)


DRIVER = """
import sys, time
from pathlib import Path
from portaisys import cluster, spec
from portaisys.trials import Range, search, trial_id
folder = Path(sys.argv[1])
def trial(params, report):
    (folder / "begun").mkdir(exist_ok=True)
    (folder / "begun" / f"{trial_id(params)}-{time.time_ns()}").touch()
    while not (folder / "go").exists() and len(list((folder / "begun").iterdir())) > 4:
        time.sleep(0.05)
    return {"validation_error": params["a"], "latency_ms": 1 - params["a"], "parameters": 1.0}
with cluster.on_ray(2):
    for ended in search(trial, {"a": Range(low=0.0, high=1.0)}, spec.Search(trials=8, max_concurrent=2), folder / "search"):
        print("ended", ended.id, ended.state)
"""


@pytest.mark.cluster
def test_a_killed_driver_is_gone_on_with_and_no_trial_is_lost_or_ended_twice(tmp_path):
    """The first driver is killed while two trials hang; the second runs those two again and what was still to come."""
    begun = tmp_path / "begun"
    first = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (begun.exists() and len(list(begun.iterdir())) >= 6):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {path.name.partition("-")[0] for path in begun.iterdir()}
    (tmp_path / "go").touch()
    second = subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path)], capture_output=True, text=True, timeout=300, check=True)
    ends = [line.split()[1:] for line in second.stdout.splitlines() if line.startswith("ended")]
    times_begun = [path.name.partition("-")[0] for path in begun.iterdir()]
    assert len(ends) == len({name for name, _ in ends}) == 8 and {state for _, state in ends} == {"done"}
    assert before <= {name for name, _ in ends}
    assert sum(times_begun.count(name) - 1 for name in set(times_begun)) == 2  # those that the killed driver had begun
