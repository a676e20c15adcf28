"""Texts through everything: a .tsv becomes a trained, quantized, judged and served version whose requests are ids of any length."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tritonclient.http import InferenceServerClient, InferInput

from portaisys import launch, spec
from portaisys.serve.core import Core, Listen
from portaisys.serve.model import Limits, open_reference
from portaisys.serve.repository import of_storage

WORDS = {"sea": ["ship", "wave", "harbour", "sail", "tide"], "sky": ["cloud", "wing", "star", "wind", "moon"], "land": ["stone", "field", "road", "tree", "hill"]}
MOST = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    lines = ["text\tlabel"]
    for number in range(900):
        label = list(WORDS)[number % 3]
        lines.append(" ".join(rng.choice(WORDS[label], rng.integers(1, 6))) + f"\t{label}")
    (folder / "rows.tsv").write_text("\n".join(lines))
    rows = {"validation_rows": 60, "calibration_rows": 60, "test_rows": 200}
    options = spec.parse({
        "name": "words", "data": {"source": "text", "kind": "file", "path": str(folder / "rows.tsv"), "max_tokens": MOST, "vocabulary": 300, **rows},
        "model": {"name": "text_transformer", "dim": 32, "depth": 1, "heads": 2},
        "train": {"epochs": 4, "tokens_per_batch": 400, "optimizer": "adamw", "learning_rate": 0.005},
        "compress": [{"quantize": {}}], "export": {"max_batch": 8, "opt_batch": 4}, "gate": {"max_accuracy_drop": 0.05, "latency_pairs": 20},
        "engine": {"also_build": ["tensorrt", "openvino"]}, "storage": {"path": str(folder / "runs"), "cache": str(folder / "cache")},
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield options, launch.run(options, lambda *args, **kwargs: None)


def test_texts_are_told_apart_and_every_backend_builds_their_engine(run: Any) -> None:
    _, outcome = run
    dense = next(row for row in outcome.rows if row["engine"] == "dense torch")
    built = {(row["backend"], row["precision"]) for row in outcome.rows}
    assert dense["accuracy"] > 0.95 and outcome.version.verdict == "pass"
    assert {(backend, precision) for backend in ("onnxruntime", "openvino", "tensorrt") for precision in ("fp32", "int8")} <= built


def test_the_version_serves_ids_of_any_length_and_says_how_text_becomes_them(run: Any) -> None:
    options, _ = run
    core = Core(of_storage(options.storage, Limits()), ("words@production",), Listen(http_port=0)).start()
    try:
        kept = next(Path(options.storage.path).rglob("tokenizer.json"))
        tokenizer, client = Tokenizer.from_file(str(kept)), InferenceServerClient(f"127.0.0.1:{core.ports['http']}")
        labels = client.get_model_metadata("words")["outputs"][0]["parameters"]["labels"]
        for text, label in (("ship", "sea"), ("moon star wind cloud", "sky"), ("tree tree road", "land")):
            ids = np.array([tokenizer.encode(text).ids], np.int64)[:, :MOST]
            x = InferInput("x", list(ids.shape), "INT64")
            x.set_data_from_numpy(ids)
            assert labels[int(client.infer("words", [x]).as_numpy("logits").argmax())] == label
        assert json.loads((kept.parent / "version.json").read_text())["dims"] == [["tokens", 1, 3, MOST]]
    finally:
        core.stop(drain_s=1)


def test_requests_of_different_lengths_share_a_batch_and_get_the_answers_they_get_alone(run: Any) -> None:
    options, _ = run
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, 300, (1, length)) for length in rng.integers(1, MOST + 1, 32)]

    async def ask() -> tuple[list[Any], list[Any], int]:
        model = open_reference("words@production", options.storage, Limits())
        alone = [(await model.infer({"x": row}))["logits"] for row in rows]
        before = model.stats.batches
        together = await asyncio.gather(*(model.infer({"x": row}) for row in rows))
        await model.close()
        return alone, [one["logits"] for one in together], model.stats.batches - before

    alone, together, batches = asyncio.run(ask())
    assert len({row.shape for row in rows}) > 8 and batches <= 8  # 32 rows of at most 8 a batch, in two buckets of length
    np.testing.assert_allclose(np.concatenate(together), np.concatenate(alone), atol=0.02)
    assert (np.concatenate(together).argmax(1) == np.concatenate(alone).argmax(1)).mean() > 0.9
