"""Benchmarks that measure what this machine has not: their small mode runs here, so that they are ready where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from portaisys import spec
from portaisys.engine import tensorrt

ROOT = Path(__file__).parents[1]
FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(tensorrt.device() != "none", reason="this machine has a GPU")
def test_the_gpu_benchmark_runs_its_cpu_engines_builds_its_plans_and_trains_where_there_is_no_gpu(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--small", "--model", "cnn", "--json", "--out", str(tmp_path / "gpu.md")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
    found = json.loads(said[-1])
    assert found["benchmark"] == "gpu" and found["figures"]["cnn_parity_error"]["value"] < 1e-4 and found["figures"]["cnn_b1_speedup"]["value"] > 0
    text = (tmp_path / "gpu.md").read_text()
    assert found["figures"]["cnn_train_fp32_over_fp32"]["value"] > 0 and "## Training: cnn" in text
    assert all(f"fp32, {means} " in text or f"any, {means}: not run: left out of --small" in text or f"fp32, {means}: not run: " in text for means in spec.SPEED)
    for precision in ("fp32", "tf32", "fp16", "bf16", "int8", "int8+fp16", "fp8", "fp8+fp16"):
        assert f"- tensorrt {precision}: not run: built but not run: this machine has no NVIDIA driver" in text
    assert all(f"{arm} " in text for arm in ("eager fp32", "torch.compile fp32", "onnxruntime int8", "openvino fp32")) and "EngineValidity.INVALID" in text


@pytest.mark.skipif(tensorrt.device() != "none", reason="this machine has a GPU")
@pytest.mark.skipif(not FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_gpu_benchmark_compresses_a_model_that_it_trained_and_builds_every_plan_of_it(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--small", "--part", "compression", "--data", str(FASHION), "--json", "--out", str(tmp_path / "gpu.md")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
    figures = json.loads(said[-1])["figures"]
    assert figures["compressed_int8_drop_points"]["low"] < figures["compressed_int8_drop_points"]["value"] and figures["compressed_b1_speedup"]["value"] > 0
    built = [line for line in said if line.endswith("not run: built but not run: this machine has no NVIDIA driver with a GPU (libcuda.so.1)")]
    assert len(built) == 8 and "small int8, onnxruntime: " in (tmp_path / "gpu.md").read_text()


def test_the_benchmark_of_compression_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, "benchmarks/compress_fashion_mnist.py", "--small", "--json", "--folder", str(tmp_path / "runs")]
    first, again = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines() for _ in range(2))
    before, now = (json.loads(said[-1])["figures"] for said in (first, again))
    assert before["teacher_accuracy"] == now["teacher_accuracy"] and before["int8_drop_points"] == now["int8_drop_points"] and before["mac_cut"]["value"] > 1
    assert sum("finished before" in line for line in again) >= 12 > sum("finished before" in line for line in first)


def test_an_exchange_that_fits_into_the_backward_pass_costs_what_its_core_works_and_one_that_does_not_its_rest(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_scaling

    assert train_scaling.tail([100.0], [30.0], [2.0], 100.0) == 30.0  # one bucket: nothing overlaps
    assert train_scaling.tail([20.0, 50.0], [10.0, 10.0], [2.0, 2.0], 100.0) == 4.0
    assert train_scaling.tail([20.0, 50.0], [100.0, 100.0], [0.0, 0.0], 100.0) == 120.0  # from 20 to 220, one after the other
