"""Jobs as users submit them: a cluster of `ray start --head` with token authentication, `ray job submit`, the dashboard's APIs."""

from __future__ import annotations

import json
import os
import signal
import time

import psutil
import pytest
from head_node import Cluster

from portaisys.registry import open_registry
from portaisys.spec import Storage

TINY = ["train.epochs=2", "train.label_selector={role: train}", "model.channels=[8,16]", "model.blocks=[1,1]", "compress=[]", "engine.also_build=[]"]

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(num_cpus=3, arguments=["--labels", "role=train"])
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


def logged(cluster):
    """The JSON lines of all processes of the cluster."""
    lines = (line for log in (cluster.folder / "ray/session_latest/logs").rglob("*.???") if log.suffix in (".log", ".err") for line in log.read_text(errors="replace").splitlines())
    return [json.loads(line) for line in lines if line.startswith('{"asctime"')]


def test_a_job_of_a_whole_spec_reuses_the_training_and_links_its_mlflow_run(cluster):
    done = cluster.submit("python", "jobs/run.py", "jobs/specs/digits.yaml", *TINY)
    assert done.returncode == 0 and "= train          finished before" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    (job,) = [job for job in cluster.get("/api/jobs/") if "jobs/run.py" in job["entrypoint"]]
    version = open_registry(Storage(path=str(cluster.folder / "portaisys/runs")), create=False).resolve("digits@production")
    assert job["status"] == "SUCCEEDED" and job["metadata"]["mlflow_run"] == version.run_id and job["metadata"]["portaisys_run"] == "digits"


def test_the_logs_are_json_and_name_run_stage_and_ray_job(cluster):
    lines = [line for line in logged(cluster) if line.get("run") == "digits"]
    begun = [line for line in lines if line["message"] == "worker begins"]
    assert {line["rank"] for line in begun} == {0, 1} and all(line["stage"] == "train" and line["job_id"] and line["node_id"] for line in begun)


def test_the_same_job_again_says_that_it_was_finished(cluster):
    again = cluster.submit("python", "jobs/train.py", "jobs/specs/digits.yaml", *TINY)
    assert again.returncode == 0 and "= train          finished before" in again.stdout, again.stdout[-3000:]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.num_workers=64", "train.batch_size=64"], "error: train.num_workers: 64 workers need 64 CPUs and the cluster's nodes with role=train have 3"),
        (["train.label_selector={role: nowhere}"], "and the cluster's nodes with role=nowhere have 0; lower it or add nodes (nodes there: role=train)"),
        (["train.use_gpu=true"], "workers need 2 GPUs and the cluster's nodes with role=train have 0"),
        (["model={name: factory, factory: 'no_such_package:model'}"], "error: model.factory"),
    ],
    ids=["cpus", "labels", "gpus", "package"],
)
def test_a_job_that_can_never_run_ends_at_once_with_one_line(cluster, overrides, says):
    failed = cluster.submit("python", "jobs/train.py", "jobs/specs/digits.yaml", "name=other", *TINY, *overrides)
    assert failed.returncode != 0 and says in failed.stdout, failed.stdout[-3000:]
    assert "Traceback" not in failed.stdout


SHORT = ["search.trials=8", "search.latency_rounds=20", "train.epochs=2", "compress.1.distill.epochs=1", "model.channels=[8,16,16]", "model.blocks=[1,1,1]"]
SEARCH = ["python", "jobs/tune.py", "tune_spaces/prune_digits.yaml", "name=searched", "data.validation_rows=100", *SHORT]


def driver(cluster):
    """The process of jobs/tune.py itself, not the shell that Ray started it with."""
    of_ours = [process for process in psutil.Process(cluster.process.pid).children(recursive=True) if process.name().startswith("python") and "jobs/tune.py" in process.cmdline()]
    return of_ours[0] if of_ours else None


def ended(folder):
    """Ids of the trials that the study holds as ended."""
    journal = folder / "study.journal"
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")] if journal.exists() else []
    return [line["trial_id"] for line in lines if "ended" in line.get("user_attr", {})]


def alive(cluster):
    """Actors and placement groups, but for the supervisors of jobs, which are Ray's own and live a moment longer than their job."""
    found = {what: cluster.get(f"/api/v0/{what}?limit=1000&detail=1")["data"]["result"]["result"] for what in ("actors", "placement_groups")}
    actors = {one["actor_id"] for one in found["actors"] if one["state"] != "DEAD" and one["class_name"] != "JobSupervisor"}
    return actors | {one["placement_group_id"] for one in found["placement_groups"] if one["state"] != "REMOVED"}


def test_a_search_killed_once_and_submitted_again_loses_no_trial_and_leaves_nothing_behind(cluster):
    folder, there_before = cluster.folder / "portaisys/runs/searched/search", alive(cluster)
    first = cluster.begin(*SEARCH)
    deadline = time.monotonic() + 200
    while len(ended(folder)) < 3:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.05)
    os.kill(driver(cluster).pid, signal.SIGKILL)
    assert "' failed" in first.communicate(timeout=60)[0]  # Job '...' failed
    before = len(ended(folder))

    done = cluster.submit(*SEARCH)
    assert done.returncode == 0 and f"{before} of 8 trials ended before" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert 3 <= before < 8 == len(trials) == len(ended(folder)) == len(set(ended(folder))) and {trial["state"] for trial in trials} == {"done"}
    assert sorted(job["status"] for job in cluster.get("/api/jobs/") if "jobs/tune.py" in job["entrypoint"]) == ["FAILED", "SUCCEEDED"]
    assert {line["trial"] for line in logged(cluster) if line["message"] == "trial ended" and line["run"] == "searched"} == {trial["id"] for trial in trials}
    assert alive(cluster) <= there_before


def test_a_search_whose_trials_can_be_placed_nowhere_is_refused(cluster):
    refused = cluster.submit(*SEARCH, "name=other", "train.label_selector={role: nowhere}")
    assert refused.returncode != 0 and "search.max_concurrent: " in refused.stdout and "nodes with role=nowhere have 0" in refused.stdout, refused.stdout[-3000:]


def test_a_working_directory_above_the_upload_limit_is_refused_before_it_queues(cluster, tmp_path):
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(101 * 2**20)
    refused = cluster.submit("python", "-c", "print('ran')", folder=tmp_path)
    assert refused.returncode != 0 and "Maximum request body size 104857600 exceeded" in refused.stderr
    assert not [job for job in cluster.get("/api/jobs/") if "print('ran')" in job["entrypoint"]]
