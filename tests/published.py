"""Tiny versions in a real registry, each with weights of its own, for tests of whole replicas. Answers are those of numpy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from portaisys import artifact, registry
from portaisys.serve.core import Core, Listen
from portaisys.serve.model import Limits
from portaisys.serve.repository import of_storage
from portaisys.spec import Storage

FEATURES, CLASSES, MAX_BATCH = 6, 4, 16


_REPLICA = """
import json, sys
from portaisys.serve.core import Core, Listen
from portaisys.serve.model import Limits
from portaisys.serve.repository import of_storage
from portaisys.spec import Storage

core = Core(of_storage(Storage.model_validate_json(sys.argv[1]), Limits()), sys.argv[2:], Listen(http_port=0, grpc_port=0)).start()
print(json.dumps(core.ports), flush=True)
sys.stdin.read()
core.stop(drain_s=1)
"""


@dataclass(frozen=True)
class Process:
    """A replica in a process of its own, whose memory is nobody else's. `ports`: by protocol."""

    pid: int
    ports: dict[str, int]


def weights_of(seed: int) -> np.ndarray:
    """float32 [FEATURES, CLASSES]"""
    return np.random.default_rng(seed).normal(size=(FEATURES, CLASSES)).astype(np.float32)


def linear(weights: np.ndarray) -> onnx.ModelProto:
    """x [-1, FEATURES] -> logits [-1, CLASSES]"""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])], "linear", [x], [logits], [numpy_helper.from_array(weights, "w")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def make(folder: Path, name: str, seed: int, change: Callable[[Path], None] = lambda folder: None) -> artifact.Artifact:
    """A finished version. `change`: what somebody who means harm does to its files before they are hashed."""
    weights, x = weights_of(seed), np.random.default_rng(0).normal(size=(20, FEATURES)).astype(np.float32)
    about = {
        "name": name, "labels": [], "backends": {"fp32": "onnxruntime"}, "precisions": ["fp32"], "opt_batch": 4, "max_batch": MAX_BATCH,
        "tolerance": 1e-4, "verdicts": [{"precision": "fp32", "action": "pass"}], "lineage": {"run_id": "r1", "data": "d1"},
    }  # fmt: skip
    with artifact.writing(folder, kind="version", key=f"{name}{seed}", parents={}, spec={}) as draft:
        onnx.save(linear(weights), draft.path / "fp32.onnx")
        for file in ("golden.npz", "calibration.npz"):
            np.savez(draft.path / file, x=x, logits_fp32=x @ weights)
        (draft.path / "version.json").write_text(json.dumps(about))
        change(draft.path)
    return artifact.read(folder)


class Shelf:
    """A registry below a folder. `numbers` are given in the order of publishing, from 1 on, for each name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = Storage(path=str(folder / "runs"), cache=str(folder / "cache"))
        self.registry = registry.open_registry(self.storage)

    def publish(
        self, name: str, seed: int, verdict: str = "pass", change: Callable[[Path], None] = lambda folder: None
    ) -> registry.Version:
        made = make(self.folder / f"made-{name}-{seed}", name, seed, change)
        run_id = self.registry.log_run(name, {}, {}, {}, {})
        version = self.registry.publish(name, made.path, run_id, {"data": "d1"}, {"action": verdict, "because": "test"})
        shutil.rmtree(made.path)
        return version

    def damage(self, version: registry.Version) -> None:
        """Change a byte of its graph wherever it lies, so that neither the local copy nor the registry's own is what was published."""
        for root in (self.folder / "cache" / "versions", self.folder / "runs" / "mlartifacts"):
            for file in root.rglob("fp32.onnx"):
                if version.digest in str(file):
                    file.write_bytes(file.read_bytes()[:-1] + b"?")

    @contextmanager
    def served(self, *references: str, **listen: Any) -> Iterator[Core]:
        """A replica of these versions on free ports."""
        core = Core(of_storage(self.storage, Limits()), references, Listen(http_port=0, grpc_port=0, **listen)).start()
        try:
            yield core
        finally:
            core.stop(drain_s=1)

    @contextmanager
    def apart(self, *references: str) -> Iterator[Process]:
        """The same in a process of its own."""
        with subprocess.Popen(
            [sys.executable, "-c", _REPLICA, self.storage.model_dump_json(), *references],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            said = process.stdout.readline()
            assert said, "the replica did not start"
            try:
                yield Process(process.pid, json.loads(said))
            finally:
                process.stdin.close()
                assert process.wait(60) == 0


def rss_kib(pid: int | str = "self", peak: bool = False) -> int:
    """Memory of a process; `peak`: the most since `reset_peak`."""
    field = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def reset_peak(pid: int | str = "self") -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def descriptors(pid: int | str = "self") -> list[str]:
    """What a process has open."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:  # the one that listed them
            continue
    return sorted(found)


def threads(pid: int | str = "self") -> int:
    """Threads of a process, those of libraries included."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
