"""KServe's client and perf_analyzer, unmodified, in environments of their own that the first run makes (minutes)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from conformance import clients
from conformance.models import Model
from conformance.wire import Target

pytestmark = pytest.mark.slow


def validated(model: Model, folder: Path) -> Path:
    """Inputs for perf_analyzer, each with the output that it must get whatever batch it comes into."""
    data, expected = [], []
    for seed in range(32):
        feeds = model.rows(1, seed)
        outputs = model.infer(feeds).outputs
        data.append({name: {"content": values[0].ravel().tolist(), "shape": list(values.shape[1:])} for name, values in feeds.items()})
        expected.append({name: {"content": values[0].ravel().tolist(), "shape": list(values.shape[1:])} for name, values in outputs.items()})
    path = folder / "inputs.json"
    path.write_text(json.dumps({"data": data, "validation_data": expected}))
    return path


HTTP = {"sync": ["--sync"], "async": ["--async"]}
GRPC = {"sync": ["--sync"], "async": ["--async"], "streaming": ["--async", "--streaming"]}


@pytest.mark.parametrize(("protocol", "mode"), [*(("http", mode) for mode in HTTP), *(("grpc", mode) for mode in GRPC)])
@pytest.mark.parametrize("batch", [1, 4])
def test_perf_analyzer_completes_with_right_outputs(first: Model, protocol: str, mode: str, batch: int, tmp_path: Path) -> None:
    if first.largest < batch or any(tensor.datatype not in ("FP32", "FP64") for tensor in (*first.inputs, *first.outputs)):
        pytest.skip("made for a model of reals in batches")
    target = first.target
    if protocol == "grpc" and not target.grpc:
        pytest.skip("no --grpc HOST:PORT")
    if protocol == "http" and target.prefix:
        pytest.skip("perf_analyzer takes no path")
    # It validates outputs of batch 1 only.
    inputs = ["--input-data", str(validated(first, tmp_path))] if batch == 1 else []
    address = str(target.grpc) if protocol == "grpc" else f"{target.host}:{target.port}"
    done = clients.perf_analyzer(address, first.name, "-i", protocol, *{"http": HTTP, "grpc": GRPC}[protocol][mode], "-b", str(batch), "--concurrency-range", "8", *inputs)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and re.search(r"Throughput: [1-9][\d.]* infer/sec", said), said[-2000:]
    assert "error" not in said.lower(), said[-2000:]


def test_perf_analyzer_itself_finds_a_wrong_output(first: Model, tmp_path: Path) -> None:
    """That it validates at all."""
    if first.target.prefix or any(tensor.datatype != "FP32" for tensor in (*first.inputs, *first.outputs)):
        pytest.skip("made for a model of reals")
    path = validated(first, tmp_path)
    tree = json.loads(path.read_text())
    for row in tree["validation_data"]:
        row[first.outputs[0].name]["content"][0] += 1.0
    path.write_text(json.dumps(tree))
    assert clients.perf_analyzer(f"{first.target.host}:{first.target.port}", first.name, "-i", "http", "--sync", "--input-data", str(path)).returncode != 0


def test_kserves_client_gets_every_answer(first: Model, target: Target) -> None:
    if [(tensor.name, tensor.datatype, tensor.shape) for tensor in first.inputs] != [("x", "FP32", (-1, 2, 3))]:
        pytest.skip("made for our own model: x [-1, 2, 3] FP32")
    done = clients.kserve(target.url, target.grpc or "", first.name)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert all(told[name] is True for name in told if name.endswith(("live", "ready")))
    for index, x in enumerate(told["x"]):
        expected = first.infer({"x": np.array(x, np.float32)}).outputs[first.outputs[0].name]
        for way in ("rest_json", "rest_binary", *(["grpc"] if target.grpc else [])):
            np.testing.assert_array_equal(np.array(told[way][index], np.float32).reshape(expected.shape), expected, err_msg=way)
