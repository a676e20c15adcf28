"""Clients that need an environment of their own: KServe's and perf_analyzer. test_peers.py runs them against a server.

    python clients.py kserve URL GRPC MODEL    in the environment that has KServe; asks and compares, prints what it did

Imports nothing but the standard library until a client is named: it runs where neither the suite nor the platform is installed.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / ".venvs"
SETUP_S = 600.0
# perf_analyzer 2.51 is the last one that runs on a glibc of 2.34; on the CPU too it wants CUDA's runtime to be there.
PACKAGES = {"kserve": ["kserve>=0.21,<0.22"], "perf_analyzer": ["tritonclient==2.51.0", "nvidia-cuda-runtime-cu12>=12,<13"]}


def environment(name: str) -> Path:
    """Folder of the environment `name`, made if it is not there. Raises CalledProcessError or TimeoutExpired."""
    folder = FOLDER / name
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES[name]], check=True, timeout=SETUP_S)
        if name == "perf_analyzer":
            _add_b64(folder)
        (folder / "ready").touch()
    return folder


def _add_b64(folder: Path) -> None:
    """A library of Debian's that no wheel has, unpacked into the environment so that nothing is installed."""
    kept = folder / "debian"
    kept.mkdir(exist_ok=True)
    subprocess.run(["apt-get", "download", "libb64-0d"], cwd=kept, check=True, capture_output=True, timeout=120)
    for package in kept.glob("libb64-0d_*.deb"):
        subprocess.run(["dpkg", "-x", package.name, "."], cwd=kept, check=True)


def perf_analyzer(address: str, model: str, *options: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run it; its report is in `stdout`. Wrong outputs and failed requests make it return other than 0."""
    folder = environment("perf_analyzer")
    libraries = [*(folder / "debian/usr/lib").glob("*"), *folder.glob("lib/python*/site-packages/nvidia/cuda_runtime/lib")]
    command = [str(folder / "bin/perf_analyzer"), "-m", model, "-u", address, "--measurement-interval", "1000", "--stability-percentage", "100", "--max-trials", "3", *options]
    return subprocess.run(command, env={**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, libraries))}, capture_output=True, text=True, timeout=timeout_s)


def kserve(url: str, grpc: str, model: str, timeout_s: float = 180.0) -> subprocess.CompletedProcess[str]:
    """Run `ask_as_kserve` where KServe is."""
    command = [str(environment("kserve") / "bin/python"), __file__, "kserve", url, grpc, model]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


async def ask_as_kserve(url: str, grpc: str, model: str) -> dict[str, Any]:
    """Everything that KServe's clients do, over HTTP and gRPC; the model takes x [-1, 2, 3] FP32. Returns what was answered."""
    import numpy as np
    from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

    def request(x: Any, binary: bool) -> Any:
        tensor = InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x, binary_data=binary)
        return InferRequest(model_name=model, infer_inputs=[tensor], request_id="k", parameters={"binary_data_output": True} if binary else None)

    xs = [np.random.default_rng(batch).normal(size=(batch, 2, 3)).astype(np.float32) for batch in (1, 2, 16)]
    rest = InferenceRESTClient(RESTConfig(protocol="v2", timeout=20, retries=0))
    told: dict[str, Any] = {"live": await rest.is_server_live(url), "ready": await rest.is_server_ready(url), "model_ready": await rest.is_model_ready(url, model)}
    for binary in (False, True):
        told[f"rest_{'binary' if binary else 'json'}"] = [(await rest.infer(url, request(x, binary), model_name=model)).outputs[0].as_numpy().tolist() for x in xs]
    await rest.close()
    if grpc:
        client = InferenceGRPCClient(grpc, timeout=20)
        told |= {"grpc_live": await client.is_server_live(), "grpc_ready": await client.is_server_ready(), "grpc_model_ready": await client.is_model_ready(model)}
        told["grpc"] = [(await client.infer(request(x, False))).outputs[0].as_numpy().tolist() for x in xs]
        await client.close()
    return {**told, "x": [x.tolist() for x in xs]}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask_as_kserve(*sys.argv[2:5]))))
