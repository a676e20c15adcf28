"""Training under Ray Train: real workers, DDP over gloo, and what happens when one is killed."""

from __future__ import annotations

import os
import re
import signal
import urllib.request
from pathlib import Path

import psutil
import pytest

from portaisys import cluster, launch, metrics, spec
from portaisys.spec import UserError

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.cluster


def short(folder, *overrides):
    return spec.load(
        ROOT / "jobs/specs/digits.yaml",
        [
            "train.epochs=4", "model.channels=[8,16]", "model.blocks=[1,1]", "compress=[]", "train.checkpoint_every_steps=4", "gate.latency_pairs=20",
            "engine.also_build=[]", f"storage.path={folder / 'runs'}", f"storage.cache={folder / 'cache'}", *overrides,
        ],
    )  # fmt: skip


def workers():
    """Processes of Ray Train workers below this one: Ray names them after their actor class."""
    return [child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())]


class KillOne:
    """A `Tell` that kills a worker, once, when training is some steps old."""

    def __init__(self):
        self.killed = 0

    def __call__(self, stage, text="", fraction=None, state="running"):
        if stage == "train" and fraction and fraction >= 0.25 and not self.killed:
            victim = workers()[-1]
            os.kill(victim.pid, signal.SIGKILL)
            self.killed = victim.pid


def quiet(stage, text="", fraction=None, state="running"):
    pass


def test_several_nodes_need_shared_storage_and_a_registry_server(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        with pytest.raises(UserError, match=r"storage\.path: .* is a folder of this machine and the cluster has 2 nodes; use s3://bucket"):
            launch.run(short(tmp_path), quiet)
        with pytest.raises(UserError, match=r"the registry is a sqlite file .* MLFLOW_TRACKING_URI"):
            launch.run(short(tmp_path, "storage.shared=true"), quiet)
    finally:
        nodes.shutdown()


@pytest.fixture(scope="module")
def ray_cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")  # at Ray's 10 s these trainings end before they are heard of
        with cluster.on_ray(2):
            yield


def test_a_run_whose_worker_was_killed_ends_as_an_undisturbed_one(ray_cluster, tmp_path):
    whole = launch.run(short(tmp_path / "whole"), quiet)
    kill = KillOne()
    cut = launch.run(short(tmp_path / "cut", "train.epochs=4"), kill)
    assert kill.killed
    assert cut.artifacts["train"].digest == whole.artifacts["train"].digest
    assert cut.artifacts["export-dense"].digest == whole.artifacts["export-dense"].digest
    # With nothing to compress the dense engine is what is published.
    assert cut.artifacts["version"].scores["admitted"] == ["dense fp32"]


class Scrape:
    """A `Tell` that reads what Prometheus would, each time a row is shown."""

    def __init__(self):
        self.pages = []

    def __call__(self, stage, text="", fraction=None, state="running"):
        if stage == "train" and fraction and state == "running":
            import ray

            (node,) = ray.nodes()
            with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
                self.pages.append(answer.read().decode())

    def series(self, run):
        """Name -> values seen, of this run's training. Workers that have ended, those of other tests too, are told of for a while."""
        found = {}
        for page in self.pages:
            for name, tags, value in re.findall(r"^(?:ray_)?portaisys_train_(\w+){(.*?)} (\S+)$", page, re.MULTILINE):
                if f'run="{run}"' in tags:
                    assert 'stage="train"' in tags
                    found.setdefault(name, []).append(float(value))
        return found


def test_prometheus_reads_of_a_training_what_its_step_log_says(ray_cluster, tmp_path):
    scrape = Scrape()
    made = launch.train(short(tmp_path, "name=scraped", "train.epochs=24", "train.checkpoint_every_steps=100"), scrape)  # half a minute, of which Ray exports each half second
    rows = metrics.read(launch.left_by(made)["log"])
    assert rows[-1]["samples"] == rows[-1]["attempt_samples"] == 24 * 797 and any("eta_s" in row for row in rows)
    found = scrape.series("scraped")
    for name, column in (("samples_total", "attempt_samples"), ("steps_total", "attempt_steps"), ("loss", "loss"), ("samples_per_s", "samples_per_s"), ("checkpoint_s", "checkpoint_s")):
        assert {*found[name]} <= {row[column] for row in rows if column in row}, name
    assert found["samples_total"] == sorted(found["samples_total"]) and found["samples_total"][-1] > 797
    assert {*found["precision_fallbacks"]} == {*found["steps_skipped"]} == {0.0} and "mfu" not in found


def test_a_users_error_in_a_worker_reaches_the_user(ray_cluster, tmp_path):
    with pytest.raises(UserError, match=r"lower train\.learning_rate"):
        launch.run(short(tmp_path, "train.learning_rate=1e20", "train.clip_norm=null", "train.max_failures=0"), quiet)


def test_more_workers_than_the_cluster_has_are_refused_with_what_is_there(ray_cluster, tmp_path):
    with pytest.raises(UserError, match=r"train\.num_workers: 16 workers need 16 CPUs and the cluster has 3"):
        launch.run(short(tmp_path, "train.num_workers=16"), quiet)
