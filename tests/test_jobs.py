"""Jobs as users submit them: a cluster of `ray start --head` with token authentication, `ray job submit`, the dashboard's APIs."""

from __future__ import annotations

import pytest
from head_node import Cluster

TINY = ["train.epochs=2", "model.channels=[8,16]", "model.blocks=[1,1]", "compress=[]", "engine.also_build=[]"]

pytestmark = pytest.mark.cluster


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
