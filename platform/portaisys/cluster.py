"""What of a Ray cluster a piece of work needs: to be connected to one, and to know before it queues that it fits.

Knows Ray's nodes, their resources and labels; not what the work is.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from portaisys.spec import UserError

_log = logging.getLogger(__name__)

# Ray Train reports at most once per health check: at its default of 2 s a short epoch would wait for it.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # Later than train.hang_timeout_s by default, whose watch can tell which worker it is.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "900",
    # Ray writes its own files through pyarrow, whose checksum trailers some of S3's work-alikes answer with 411.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
}


def is_there() -> bool:
    """Whether this process is connected to a Ray cluster."""
    import ray

    return bool(ray.is_initialized())


@contextlib.contextmanager
def on_ray(num_cpus: int) -> Iterator[None]:
    """The Ray cluster that is there (RAY_ADDRESS, or a job's own), or one of our own for the time of the block."""
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {} if address else {"num_cpus": num_cpus + 1, "include_dashboard": False}
    root = logging.getLogger()
    handlers = list(root.handlers)
    ray.init(address=address or "local", log_to_driver=False, configure_logging=False, **own)
    try:
        yield
    finally:
        ray.shutdown()
        root.handlers = handlers  # Ray adds one (RAY_LOGGING_CONFIG_ENCODING) with each connection and takes none away


def submission_id() -> str:
    """Name of the submitted job that this process is the driver of; empty elsewhere."""
    told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return str(told.get("metadata", {}).get("job_submission_id", ""))


def note_in_job(values: Mapping[str, str]) -> None:
    """Add to the metadata of the job this process drives, which the dashboard and `ray job list` show; nothing outside of a job."""
    if not submission_id():
        return
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.dashboard.modules.job.common import JobInfoStorageClient  # no public way to change a job's metadata from within

    async def note() -> None:
        jobs = JobInfoStorageClient(GcsClient(address=os.environ["RAY_ADDRESS"]))
        info = await jobs.get_info(submission_id())
        if info:
            await jobs.put_info(submission_id(), dataclasses.replace(info, metadata={**(info.metadata or {}), **values}))

    try:
        asyncio.run(note())
    except Exception as error:  # a link for people to follow: the run does not depend on it
        _log.warning("the metadata of job %s could not be written: %s", submission_id(), error)


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: what it has in all, busy or not."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]


def nodes() -> list[Node]:
    """The nodes that are alive. Needs a connection."""
    import ray

    return [Node(node["Resources"], node.get("Labels", {})) for node in ray.nodes() if node["Alive"]]


def grows_to() -> Mapping[str, float]:
    """The most of each resource that the autoscaler may bring the cluster to; empty without one."""
    from ray._private.state import state  # what Ray Train asks itself; private, hence the bound on ray's version

    return state.get_max_resources_from_cluster_config() or {}


def refuse_unplaceable(
    where: str,
    what: str,
    count: int,
    need: Mapping[str, float],
    selector: Mapping[str, str],
    found: Sequence[Node],
    most: Mapping[str, float],
    or_else: str = "",
) -> None:
    """Refuse `count` workers (or replicas, or trials) of `need` each that the cluster can never hold: Ray would leave them pending without a word.

    `where`: the spec path to change; `selector`: labels a node must have; `most`: what `grows_to` says; `or_else`: what might be done besides. Raises UserError.
    """
    right = [node for node in found if matches(node.labels, selector)]
    among = f"the cluster's nodes with {_words(selector)} have" if selector else "the cluster has"
    for kind, each in need.items():
        have = sum(node.resources.get(kind, 0) for node in right)
        if have < each * count and most.get(kind, 0) < each * count:
            raise UserError(
                f"{where}: {count} {what} need {each * count:g} {kind}s and {among} {have:g}; lower it or add nodes{_seen(found, selector)}{or_else}"
            )
    places = sum(_places(node.resources, need) for node in right)
    if places < count and not all(most.get(kind, 0) >= each * count for kind, each in need.items()):
        sizes = ", ".join(sorted(_amounts({kind: node.resources.get(kind, 0) for kind in need}) for node in right))
        raise UserError(
            f"{where}: {count} {what} of {_amounts(need)} each, and {among} room for {places}, since none is split over nodes ({sizes}); lower it or add nodes{or_else}"
        )


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether Ray would place work with this label selector on a node with these labels: `a`, `!a`, `in(a,b)`, `!in(a,b)`."""
    for key, wanted in selector.items():
        text = wanted.removeprefix("!")
        values = [value.strip() for value in text[3:-1].split(",")] if text.startswith("in(") else [text]
        if (labels.get(key) in values) == wanted.startswith("!"):
            return False
    return True


def _places(have: Mapping[str, float], need: Mapping[str, float]) -> int:
    return int(min((have.get(kind, 0) // each for kind, each in need.items() if each), default=10**9))


def _seen(found: Sequence[Node], selector: Mapping[str, str]) -> str:
    """The labels there are, for the keys that were asked for: a misspelt role is found by reading them."""
    if not selector:
        return ""
    there = sorted({_words({key: node.labels.get(key, "(none)") for key in selector}) for node in found})
    return f" (nodes there: {'; '.join(there)})"


def _words(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{count:g} {kind}{'' if count == 1 else 's'}" for kind, count in resources.items())
