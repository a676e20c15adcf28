"""The whole job in one go: run a spec, serve what it published, ask it real requests over HTTP, stop, show it all."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from portaisys import cluster, data, evaluate, launch
from portaisys.screen import Screen, closing_table, console
from portaisys.serve.app import ServeArgs
from portaisys.serve.local import serving
from portaisys.spec import Spec, UserError

REQUESTS = 200


def run(options: Spec, *, resume: bool = False) -> None:
    """Run the stages (reusing finished ones), serve NAME@VERSION, score it through HTTP on the validation split."""
    started = time.monotonic()
    cpus = max(options.train.num_workers * options.train.cpus_per_worker, options.serve.num_replicas)
    with Screen() as tell:
        with cluster.on_ray(cpus):
            outcome = launch.run(options, tell, resume=resume)
            tell("serve", "starting Ray Serve")
            arguments = ServeArgs(model=str(outcome.version), storage=options.storage, threads=options.engine.threads, **options.serve.model_dump(exclude={"port"}))
            with serving(arguments, port=options.serve.port) as url:
                tell("serve", f"{REQUESTS} requests to {url}")
                served = _ask(url, options)
        tell("serve", "stopped", 1.0, "done")
    closing_table(outcome)
    console.print(
        f"Served {served['requests']} requests over HTTP by {outcome.version}: accuracy {served['accuracy']:.2%} on validation rows, "
        f"p50 {served['latency_ms_p50']:.2f} ms, p99 {served['latency_ms_p99']:.2f} ms a request through Ray Serve",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(f"{time.monotonic() - started:.0f} s in all. Serve it yourself: portaisys serve {options.name}@production --storage {options.storage.path}", soft_wrap=True)


def _ask(url: str, options: Spec) -> dict[str, Any]:
    """One row a request, on one connection, in JSON as a stranger would write it."""
    rows = data.load(options.data).validation
    x, y = rows.take(np.arange(REQUESTS) % len(rows))
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    logits, ms = [], []
    for row in x:
        started = time.perf_counter()
        logits.append(_infer(connection, options.name, row[None]))
        ms.append((time.perf_counter() - started) * 1e3)
    connection.close()
    return {"requests": len(ms), "accuracy": evaluate.accuracy(np.concatenate(logits), y), **evaluate.summarize(np.array(ms))}


def _infer(connection: http.client.HTTPConnection, name: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    body = json.dumps({"inputs": [{"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}]})
    connection.request("POST", f"/v2/models/{name}/infer", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    if reply.status != 200:
        raise UserError(f"serve: a request was refused ({reply.status}): {answer.get('error')}")
    output = answer["outputs"][0]
    return np.array(output["data"], np.float32).reshape(output["shape"])
