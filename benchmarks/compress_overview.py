"""Every compression technique alone, and the chosen combination, on one dense model: accuracy, parameters, multiply-accumulates, bytes, latency.

    python benchmarks/compress_overview.py --json [--folder runs/compress_overview]        (an hour or so on two cores; --small: minutes, digits)

A residual CNN of six blocks, trained once as jobs/specs/fashion_mnist.yaml says; each technique is a run of its own, judged by
the gate at half a point. A row is the engine that the technique is about: its int8 file, or the fp32 one of the smaller model. ONNX Runtime, one thread, one row at a
time, in turns with the dense fp32 engine in the same rounds.

Figures, of the combination: `parameters_cut`, `macs_cut`, `latency_cut` (percent of the dense fp32 engine's; the requirement asks for 10, 15 and 30), `accuracy_gained_points` over the dense
model (kept or better: low above minus the margin; Tango's bounds, 95 % to either side), `rows_admitted` of how many techniques. The combination was fixed before, not chosen by these test rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from compress_runs import exact, right, row, run, share, show
from gpu_compress import drop

from portaisys import launch, spec
from portaisys.engine.cpu import device

ROOT = Path(__file__).parents[1]
TAYLOR = {"importance": "taylor", "scope": "global"}
INT8, FP32 = "int8", "small fp32"


def techniques(small: bool) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Name -> the engine that is looked at, and the steps. Each trains for as long as any other."""
    epochs = 1 if small else 5
    teach = {"distill": {"epochs": epochs, "learning_rate": 0.05}}
    student = {"name": "convnet", "channels": [8, 16], "blocks": [1, 1]} if small else {**DENSE, "channels": [32, 64, 128], "blocks": [1, 1, 1]}
    return {
        "int8, calibrated": (INT8, [{"quantize": {"calibration": "auto"}}]),
        "int8, trained with rounding": (INT8, [{"quantize": {"method": "qat", "epochs": 1 if small else 2}}]),
        "int8 weights alone": (INT8, [{"quantize": {"method": "weight_only"}}]),
        "channels pruned": (FP32, [{"prune": {"mac_cut": 0.5, **TAYLOR}}, {"distill": {"epochs": epochs, "learning_rate": 0.05, "alpha": 0.0}}]),
        "blocks pruned": (FP32, [{"prune": {"what": ["blocks"], "mac_cut": 0.1}}, {"distill": {"epochs": epochs, "learning_rate": 0.05, "alpha": 0.0}}]),
        "a smaller student, distilled": (FP32, [{"distill": {"student": student, "epochs": epochs, "learning_rate": 0.1}}]),
        "distilled from itself": (FP32, [teach]),
        "2:4 sparse": (FP32, [{"sparsify": {}}, teach]),
        "pruned, distilled, int8": (INT8, [{"prune": {"mac_cut": 0.5, "parameter_cut": 0.1, **TAYLOR}}, teach, {"quantize": {"calibration": "auto"}}]),
    }


# Blocks can leave only where a stage has several.
DENSE = {"name": "convnet", "stem": 32, "stem_stride": 2, "channels": [48, 96, 192], "blocks": [2, 2, 2], "strides": [2, 2, 2]}
COMBINATION = "pruned, distilled, int8"


def base_of(small: bool) -> dict[str, Any]:
    file = "digits" if small else "fashion_mnist"
    tree = spec.dump(spec.load(ROOT / f"jobs/specs/{file}.yaml"))
    train = {**tree["train"], "num_workers": 0, **({"epochs": 3} if small else {"precision": "auto"})}
    return {"data": tree["data"], "model": {"name": "convnet", "channels": [16, 32], "blocks": [2, 2]} if small else DENSE, "train": train, "gate": {"max_accuracy_drop": 0.3 if small else 0.005}}


def line(outcome: launch.Outcome, engine: str, name: str) -> str:
    found, dense = row(outcome, engine), row(outcome, "dense fp32")
    accuracy, lost = share(right(outcome)[engine]), drop(right(outcome)["dense fp32"], right(outcome)[engine])
    cells = [
        name, f"{accuracy['value']:.2f} ({accuracy['low']:.2f} to {accuracy['high']:.2f})", f"{-lost['value']:+.2f} ({-lost['high']:+.2f} to {-lost['low']:+.2f})", f"{found['parameters']:,}",
        f"{found['macs']:,}", f"{found['size_bytes'] / 1024:,.0f}", f"{found['latency_ms_p50']:.3f}", f"{found['latency_ms_p50'] / dense['latency_ms_p50']:.2f}", "admitted" if found["admissible"] else "refused",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--small", action="store_true", help="digits, an epoch: whether it runs, not how good it is")
    parser.add_argument("--folder", type=Path, help="where everything is left and looked for (default: runs/compress_overview, small: a temporary one)")
    asked = parser.parse_args()
    folder, base = asked.folder or (Path(tempfile.mkdtemp()) if asked.small else Path("runs/compress_overview")), base_of(asked.small)
    torch.set_num_threads(base["train"]["cpus_per_worker"])
    print(f"{device()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, python {platform.python_version()}", flush=True)
    found = {name: (engine, run(base, f"technique-{number}", folder, steps)) for number, (name, (engine, steps)) in enumerate(techniques(asked.small).items())}
    engine, outcome = found[COMBINATION]
    print("| technique | accuracy % | against dense, points | parameters | MACs | KiB | ms | of dense | the gate |\n|---|---|---|---|---|---|---|---|---|")
    print(line(outcome, "dense fp32", "dense fp32"))
    for name, (shown, made) in found.items():
        print(line(made, shown, name))
    for name, (shown, made) in found.items():
        print(f"{name}: {row(made, shown)['because']}; {sum(one.seconds for stage, one in made.artifacts.items() if stage != 'train'):.0f} s")
    dense, chosen = row(outcome, "dense fp32"), row(outcome, engine)
    lost = drop(right(outcome)["dense fp32"], right(outcome)[engine])
    figures = {f"{name}_cut": exact(100 * (1 - chosen[key] / dense[key])) for name, key in (("parameters", "parameters"), ("macs", "macs"), ("latency", "latency_ms_p50"))}
    figures["accuracy_gained_points"] = {"value": -lost["value"], "low": -lost["high"], "high": -lost["low"]}
    figures["rows_admitted"] = exact(sum(row(made, shown)["admissible"] for shown, made in found.values()))
    told = show("compress_overview", figures)
    if asked.json:
        print(json.dumps(told))


if __name__ == "__main__":
    main()
