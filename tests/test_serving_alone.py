"""Serving stands alone: with training libraries and the offline rooms made unimportable, a published version still answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from portaisys import artifact, registry
from portaisys.engine import Options, cache
from portaisys.spec import Storage

LABELS = [f"digit {index}" for index in range(10)]


def make_onnx(path: Path, weights: np.ndarray, precision: str) -> None:
    """x [-1, 8, 8] -> logits [-1, 10], a linear classifier; int8 with Q/DQ pairs around the matrix product."""
    node, constants = helper.make_node, {"w": weights.astype(np.float32)}
    nodes = [node("Flatten", ["x"], ["flat"]), node("MatMul", ["flat", "w"], ["logits"])]
    if precision == "int8":
        constants = {"wq": np.clip(np.round(weights * 32), -127, 127).astype(np.int8), "w_scale": np.float32(1 / 32), "x_scale": np.float32(0.04)}
        constants["zero"] = np.int8(0)
        nodes = [
            node("Flatten", ["x"], ["flat"]), node("QuantizeLinear", ["flat", "x_scale", "zero"], ["xq"]),
            node("DequantizeLinear", ["xq", "x_scale", "zero"], ["xd"]), node("DequantizeLinear", ["wq", "w_scale", "zero"], ["w"]),
            node("MatMul", ["xd", "w"], ["logits"]),
        ]  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])
    graph = helper.make_graph(nodes, "digits", [x], [logits], [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def make_version(folder: Path, cache_dir: Path, *, spoil: str = "", tolerance: float = 1e-4) -> artifact.Artifact:
    """A small version of two precisions. `spoil` names one whose golden answers are not its engine's."""
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=(64, 10)), rng.normal(size=(20, 8, 8)).astype(np.float32)
    about = {
        "name": "digits", "labels": LABELS, "backends": {"int8": "onnxruntime", "fp32": "onnxruntime"}, "precisions": ["int8", "fp32"], "opt_batch": 4, "max_batch": 8,
        "tolerance": tolerance, "verdicts": [{"precision": "int8", "action": "pass"}], "lineage": {"run_id": "r1", "data": "d1"},
    }  # fmt: skip
    golden = {"x": x}
    with artifact.writing(folder, kind="version", key="k", parents={}, spec={}) as draft:
        for precision in about["precisions"]:
            make_onnx(draft.path / f"{precision}.onnx", weights, precision)
            options = Options(precision, opt_batch=4, max_batch=8)
            engine = cache.load(cache.get_or_build(draft.path / f"{precision}.onnx", "onnxruntime", options, cache.Cache(cache_dir)), options)
            parts = [engine.run({"x": x[start : start + 8]})["logits"] for start in range(0, len(x), 8)]
            golden[f"logits_{precision}"] = np.concatenate(parts) + (1.0 if precision == spoil else 0.0)
            engine.close()
        np.savez(draft.path / "golden.npz", **golden)
        np.savez(draft.path / "calibration.npz", **golden)
        (draft.path / "version.json").write_text(json.dumps(about))
    return artifact.read(folder)


def publish(version: artifact.Artifact, storage: Storage) -> registry.Version:
    """Into the sqlite registry below storage.path, promoted."""
    opened = registry.open_registry(storage)
    run_id = opened.log_run("digits", {}, {}, {}, {})
    made = opened.publish("digits", version.path, run_id, {"data": "d1"}, {"action": "pass", "because": "test"})
    return opened.promote("digits", made.version, "test")


def storage_in(folder: Path) -> Storage:
    return Storage(path=str(folder / "runs"), cache=str(folder / "cache"))


_ALONE = """
    import asyncio, json, sys
    absent = {"torch", "torchvision", "torch_pruning", "onnxscript", "sklearn", "optuna", "matplotlib",
              *(f"portaisys.{room}" for room in ("data", "models", "train", "compress", "export"))}

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name in absent:
                raise ModuleNotFoundError(f"{name} is not there", name=name)

    sys.meta_path.insert(0, Absent())
    import portaisys.serve.app
    from portaisys.serve import model, protocol, repository
    from portaisys.spec import Storage

    async def main():
        served = model.open_reference("digits@production", Storage.model_validate_json(sys.argv[1]), model.Limits())
        request = {"inputs": [{"name": "x", "shape": [2, 8, 8], "datatype": "FP32", "data": [1.0] * 128}]}
        reply = await protocol.handle("POST", "/v2/models/digits/infer", {}, json.dumps(request).encode(), repository.of_models(served))
        await served.close()
        return reply

    reply = asyncio.run(main())
    assert reply.status == 200, reply.body
    assert not absent & set(sys.modules)
    print(json.loads(reply.body)["outputs"][0]["shape"])
"""


def test_a_published_version_answers_without_training_libraries_and_offline_rooms(tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    publish(make_version(tmp_path / "version", storage.cache_dir), storage)
    command = [sys.executable, "-c", textwrap.dedent(_ALONE), storage.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "MLFLOW_TRACKING_URI": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[2, 10]"
