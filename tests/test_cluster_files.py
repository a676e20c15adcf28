"""cluster.yaml: valid for `ray up`, and, with only its provider and commands swapped, a cluster on which work lands where it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import free_port

ROOT = Path(__file__).parents[1]
HEAD = "f" * 51 + "00000"


def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_up_takes_the_file_and_it_has_the_machines():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(cluster())
    validate_config(config)
    kinds = {name: (kind["min_workers"], kind["max_workers"], kind["resources"]["GPU"], kind["labels"]["role"]) for name, kind in config["available_node_types"].items()}
    assert kinds == {"head": (0, 0, 0, "head"), "train": (4, 4, 4, "train"), "inference": (2, 2, 2, "inference"), "test": (1, 1, 2, "test")}


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_starts_with_the_token_the_same_ingress_and_a_known_metrics_port(commands):
    start = cluster()[commands][-1]
    for words in ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=", "RAY_SERVE_ENABLE_HA_PROXY=1", "RAY_TRAIN_ENABLE_STATE_TRACKING=1", "--metrics-export-port=8090"):
        assert words in start
    assert "chmod 600 ~/.portaisys/ray-token" in cluster()["setup_commands"]


# --- the same file on pretended machines --------------------------------------------------------------------------


def pretended(address):
    """cluster.yaml with provider and commands swapped, and CPUs that fit many nodes into one; types, counts, GPUs and labels stay."""
    tree = cluster()
    provider = {"type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider", "launch_multiple": True}
    tree["provider"] = provider | {"head_node_id": HEAD, "gcs_address": address}
    tree["auth"], tree["file_mounts"], tree["rsync_exclude"] = {}, {}, []
    tree |= {"cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_filter": [], "docker": {}, "upscaling_speed": 1.0, "metadata": {}, "no_restart": False}
    for name in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"):
        tree[f"{name}_commands"] = []
    kinds = tree["available_node_types"]
    kinds["ray.head.default"] = kinds.pop("head")  # the name that the pretended provider knows
    tree["head_node_type"] = "ray.head.default"
    for kind in kinds.values():
        kind["node_config"] = {}
    return tree


CHECK = """
import json, sys, time, ray
from portaisys import cluster, spec
from ray.util.placement_group import placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)

def roles():
    return sorted(node["Labels"].get("role", "?") for node in ray.nodes() if node["Alive"])

deadline = time.monotonic() + 120
while roles() != ["head"] + ["inference"] * 2 + ["test"] + ["train"] * 4:
    assert time.monotonic() < deadline, roles()
    time.sleep(0.5)
role_of = {node["NodeID"]: node["Labels"]["role"] for node in ray.nodes()}

def landed(group):
    return [role_of[node] for node in placement_group_table(group)["bundles_to_node_id"].values()]

workers = placement_group([{"CPU": 1, "GPU": 1}] * 16, bundle_label_selector=[{"role": "train"}] * 16)
assert workers.wait(60), "16 workers"
replicas = placement_group([{"CPU": 1, "GPU": 1}] * 4, bundle_label_selector=[{"role": "inference"}] * 4)
assert replicas.wait(60), "replicas"
trials = placement_group([{"CPU": 1, "GPU": 1}] * 2, bundle_label_selector=[{"role": "test"}] * 2)
assert trials.wait(60), "trials"
found = {"workers": landed(workers), "replicas": landed(replicas), "trials": landed(trials)}
ray.util.remove_placement_group(replicas)
ray.util.remove_placement_group(trials)
more = placement_group([{"CPU": 1, "GPU": 1}], bundle_label_selector=[{"role": "train"}])
found["one more worker"] = more.wait(5)  # six GPUs are free, and none of them is a training node's
def refused(count):
    try:
        cluster.refuse_unplaceable("train.num_workers", "workers", count, {"CPU": 1.0, "GPU": 1.0}, {"role": "train"}, cluster.nodes(), cluster.grows_to())
    except spec.UserError as error:
        return str(error)

found["refused"] = refused(16), refused(23)
free = ray.available_resources()
found["free GPUs"] = free.get("GPU", 0)
print(json.dumps(found))
"""


@pytest.mark.cluster
def test_16_workers_replicas_and_trials_land_on_their_nodes_and_training_never_takes_another_gpu(tmp_path):
    import ray
    from head_node import Cluster

    port = free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    config = tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump(pretended(address)))
    settings = {
        "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
    }  # fmt: skip
    head = Cluster(num_cpus=1, port=port, settings=settings, arguments=["--autoscaling-config", config, "--labels", "role=head", "--num-gpus", 0])
    try:
        done = subprocess.run([sys.executable, "-c", CHECK, address], env=head.environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
    finally:
        head.stop()
    assert found["workers"] == ["train"] * 16 and found["replicas"] == ["inference"] * 4 and found["trials"] == ["test"] * 2
    assert found["one more worker"] is False and found["free GPUs"] == 6
    # The platform asks before it queues; of 22 GPUs in all an autoscaler's file tells the number, not the labels.
    assert found["refused"][0] is None and "23 workers need 23 GPUs and the cluster's nodes with role=train have 16" in found["refused"][1]


# --- the same roles elsewhere ---------------------------------------------------------------------------------------


def test_kuberay_has_the_machines_of_the_cluster_file_and_the_token():
    tree = yaml.safe_load((ROOT / "deploy/kuberay.yaml").read_text())["spec"]
    groups = {}
    for group in tree["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_SERVE_ENABLE_HA_PROXY"} <= {setting["name"] for setting in container["env"]}
        assert container["resources"]["limits"]["nvidia.com/gpu"] == group["rayStartParams"]["num-gpus"]
        groups[group["rayStartParams"]["labels"].removeprefix("role=")] = (group["replicas"], int(group["rayStartParams"]["num-gpus"]))
    kinds = cluster()["available_node_types"]
    assert groups == {name: (kind["min_workers"], kind["resources"]["GPU"]) for name, kind in kinds.items() if name != "head"}


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").glob("Dockerfile.*")), ids=lambda path: path.name)
def test_what_an_image_copies_is_there(path):
    copied = [word for line in path.read_text().splitlines() if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied and all((ROOT / word).exists() for word in copied)
