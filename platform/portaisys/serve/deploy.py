"""`serve deploy` with the file checked first: Ray ignores keys it does not know at the top, and says so to nobody.

Submits what `serve deploy` submits, waits until every application runs, and says why one does not. Knows the file's
shape and Ray's REST API; what an application is made of is app.py's.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import RayError
from ray.serve.schema import HTTPOptionsSchema, LoggingConfig, ServeApplicationSchema, ServeDeploySchema, gRPCOptionsSchema

from portaisys import cluster
from portaisys.cluster import Node
from portaisys.serve.app import ServeArgs
from portaisys.spec import UserError

BUILDER = "portaisys.serve.app:build_app"
_SECTIONS = {"http_options": HTTPOptionsSchema, "grpc_options": gRPCOptionsSchema, "logging_config": LoggingConfig}


@dataclass(frozen=True)
class Deployed:
    """An application that runs. `route`: its prefix on the HTTP port of every node with a proxy."""

    name: str
    status: str
    route: str


def check(path: Path) -> dict[str, Any]:
    """The tree of a Serve config file. Raises UserError naming the first key or value that cannot be meant."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("applications"), list):
        raise UserError(f"{path}: a Serve config is a mapping with a list of applications")
    _known(tree, ServeDeploySchema, str(path), "")
    for section, schema in _SECTIONS.items():
        _known(tree.get(section) or {}, schema, str(path), f"{section}.")
    for index, application in enumerate(tree["applications"]):
        _check_application(application, str(path), f"applications.{index}.")
    try:
        ServeDeploySchema.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(path, "", error)) from None
    return tree


def _check_application(application: Any, path: str, where: str) -> None:
    if not isinstance(application, dict):
        raise UserError(f"{path}: {where[:-1]}: an application is a mapping")
    _known(application, ServeApplicationSchema, path, where)
    if application.get("import_path") == BUILDER:
        try:
            ServeArgs.model_validate(application.get("args") or {})
        except ValidationError as error:
            raise UserError(_explain(path, f"{where}args.", error)) from None


def _known(tree: Mapping[str, Any], schema: Any, path: str, where: str) -> None:
    for key in tree:
        if key not in schema.model_fields:
            near = difflib.get_close_matches(str(key), schema.model_fields, n=1)
            raise UserError(f"{path}: {where}{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(schema.model_fields)}"))


def _explain(path: Any, where: str, error: ValidationError) -> str:
    return "\n".join(f"{path}: {where}{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())


def deploy(path: Path, address: str, tell: Callable[[str], None], *, timeout_s: float = 600.0) -> list[Deployed]:
    """Check, submit, wait until all applications of the file run. `address`: of the dashboard, http://host:8265.

    Raises UserError for a wrong file, a dashboard that does not answer, or an application that does not start, with its own reason.
    """
    tree = check(path)
    try:
        client = ServeSubmissionClient(address)
        _tell_unplaceable(client, tree, path, tell)
        client.deploy_applications(tree)
    except (RayError, ConnectionError, RuntimeError, OSError) as error:
        raise UserError(f"deploy: {address} did not take the file: {str(error).strip().splitlines()[0]}") from None
    return _wait(client, [application["name"] for application in tree["applications"]], tell, timeout_s)


def _tell_unplaceable(client: Any, tree: Mapping[str, Any], path: Path, tell: Callable[[str], None]) -> None:
    """Replicas that no node of now can hold are waited for: said at once, refused not, since an autoscaler may still bring nodes."""
    answer = client._do_request("GET", "/api/v0/nodes?detail=1&limit=1000")
    answer.raise_for_status()
    found = [Node(node["resources_total"], node["labels"]) for node in answer.json()["data"]["result"]["result"] if node["state"] == "ALIVE"]
    for index, application in enumerate(tree["applications"]):
        if application.get("import_path") == BUILDER:
            args = ServeArgs.model_validate(application["args"])
            need = {kind: each for kind, each in (("CPU", args.num_cpus), ("GPU", args.num_gpus)) if each}
            key, replicas = ("autoscale.min_replicas", args.autoscale.min_replicas) if args.autoscale else ("num_replicas", args.num_replicas)
            try:
                cluster.refuse_unplaceable(f"{path}: applications.{index}.args.{key}", "replicas", replicas, need, args.label_selector, found, {})
            except UserError as error:
                tell(f"waiting for nodes: {error}")


def _wait(client: Any, names: list[str], tell: Callable[[str], None], timeout_s: float) -> list[Deployed]:
    deadline = time.monotonic() + timeout_s
    said = ""
    while True:
        found = {name: about for name, about in client.get_serve_details()["applications"].items() if name in names}
        states = ", ".join(f"{name} {about['status']}" for name, about in found.items())
        if states != said:
            tell(states)
            said = states
        for name, about in found.items():
            if about["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise UserError(f"deploy: {name} did not start: {_reason(about)}")
        if len(found) == len(names) and all(about["status"] == "RUNNING" for about in found.values()):
            return [Deployed(name, about["status"], about["route_prefix"]) for name, about in found.items()]
        if time.monotonic() > deadline:
            raise UserError(f"deploy: after {timeout_s:.0f} s: {states or 'nothing'}; see `serve status` and the dashboard's Serve tab")
        time.sleep(0.5)


def _reason(about: Mapping[str, Any]) -> str:
    """The innermost error in what Ray says of an application: the replica's own."""
    texts = [about.get("message", ""), *(deployment.get("message", "") for deployment in about.get("deployments", {}).values())]
    lines = [line.strip() for text in texts for line in text.splitlines() if "Error" in line]
    return lines[-1] if lines else " ".join(texts).strip()
