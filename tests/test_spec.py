"""The spec: one door, strict keys, errors that name the path and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from portaisys import spec
from portaisys.spec import SpecError

ROOT = Path(__file__).parents[1]
SPECS = sorted((ROOT / "jobs" / "specs").glob("*.yaml"))

REFUSED = [
    ({"trian": {}}, "trian: unknown key; did you mean 'train'?"),
    ({"train": {"epoch": 3}}, "train.epoch: unknown key; did you mean 'epochs'?"),
    ({"data": {"path": "x.npz"}}, "data.path: source 'digits' has no such key; fashion_mnist, npz and text have; leave it out, or take another"),
    ({"model": {"name": "transformer", "stem": 8}}, "model.stem: name 'transformer' has no such key; convnet has; leave it out, or take another"),
    ({"compress": [{"distill": {"student": {"name": "convnet", "depth": 2}}}]}, "compress.0.distill.student.depth: name 'convnet' has no such key; transformer and text_transformer have"),
    ({"data": {"source": "text", "test_row": 9}}, "data.test_row: unknown key; did you mean 'test_rows'?"),
    ({"epochs": 3}, "epochs: unknown key; did you mean 'train.epochs'?"),
    ({"compress": [{"prune": {"mac_ct": 0.5}}]}, "compress.0.prune.mac_ct: unknown key; did you mean 'mac_cut'?"),
    ({"train": {"epochs": "many"}}, "train.epochs: 'many': should be a valid integer"),
    ({"train": {"precision": "fp8"}}, "train.precision: 'fp8': should be 'fp32', 'tf32', 'bf16', 'fp16' or 'auto'"),
    ({"data": {"task": "regression"}}, "data.task: 'regression': not supported yet; the only task is 'classification'"),
    ({"data": {"source": "npz"}}, "data.path: field required"),
    ({"data": {"source": "imagenet"}}, "'digits', 'fashion_mnist', 'npz', 'text', 'factory'"),
    ({"engine": {"precisions": ["fp16"]}}, "engine.precisions: 'fp16' is not one of fp32, int8, which onnxruntime has"),
    ({"engine": {"precisions": ["int8"]}}, "engine.precisions: 'int8' needs a quantize step"),
    ({"train": {"batch_size": 7, "num_workers": 2}}, "batch_size 7 is not a multiple of num_workers x accumulate_steps = 2; take 6 or 8"),
    ({"train": {"tokens_per_batch": 512, "micro_batch": 4}}, "train.tokens_per_batch: it says what is computed at once as well"),
    ({"train": {"tokens_per_batch": 512, "ddp": {"static_graph": True}}}, "train.tokens_per_batch: workers cut their rows into different numbers of micro-batches"),
    ({"compress": [{"quantize": {}}, {"prune": {}}]}, "must be the last step"),
    ({"compress": [{"prune": {}}, {"distill": {"student": {"name": "convnet"}}}]}, "compress.1.distill.student: it is another model"),
    ({"compress": [{"prune": {}, "distill": {}}]}, "exactly one of prune, sparsify, distill, quantize"),
    ({"compress": [{"sparsify": {}}, {"prune": {}}]}, "compress.1.prune: two of four weights are zero by then"),
    ({"model": {"channels": [8, 16], "blocks": [1]}}, "model.blocks: 1 values for 2 stages"),
    ({"model": {"name": "transformer", "dim": 30}}, "dim 30 is not a multiple of heads 4"),
    ({"export": {"opt_batch": 99}}, "opt_batch 99 exceeds max_batch 64"),
    ({"name": "../x"}, "name: '../x'"),
    ({"seed": -1}, "seed: -1"),
    ({"model": {"channels": [], "blocks": []}}, "model.channels"),
    ({"serve": {"max_batch": 128}}, "serve.max_batch: 128 exceeds export.max_batch 64"),
]


@pytest.mark.parametrize(("tree", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_a_wrong_spec_is_refused_with_its_path_and_the_fix(tree, message):
    with pytest.raises(SpecError) as error:
        spec.parse({"name": "x", **tree})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("tree", "start"),
    [({"compress": [{"quantize": {}}, {"prune": {}}]}, "compress: quantize works"), ({"serve": {"max_batch": 128}}, "serve.max_batch: "), ({"engine": {"precisions": ["int8"]}}, "engine.precisions: ")],
)  # fmt: skip
def test_what_is_wrong_between_sections_begins_with_the_section_that_is_to_be_changed(tree, start):
    with pytest.raises(SpecError) as error:
        spec.parse({"name": "x", **tree})
    assert str(error.value).startswith(start)


def test_every_error_of_a_spec_is_told_at_once():
    with pytest.raises(SpecError) as error:
        spec.parse({"name": "x", "train": {"epochs": 0}, "gate": {"confidence": 2}})
    assert {line.split(":")[0] for line in str(error.value).splitlines()} == {"train.epochs", "gate.confidence"}


def test_overrides_reach_sections_and_list_items_and_are_typed_by_yaml():
    loaded = spec.load(ROOT / "jobs/specs/digits.yaml", ["train.epochs=3", "compress.0.prune.mac_cut=0.25", "train.clip_norm=null", "storage.path=/tmp/x"])
    assert (loaded.train.epochs, loaded.compress[0].prune.mac_cut, loaded.train.clip_norm, loaded.storage.path) == (3, 0.25, None, "/tmp/x")


@pytest.mark.parametrize("override", ["train.epochs", "=3", "compress.9.prune.mac_cut=0.5", "name.first=x", "train.epochz=3", "model.channels=[16,"])
def test_a_wrong_override_is_refused(override):
    with pytest.raises(SpecError):
        spec.load(ROOT / "jobs/specs/digits.yaml", [override])


def test_torch_is_a_reference_and_no_engine_to_serve_with():
    with pytest.raises(SpecError, match=r"engine\.backend: 'torch': is the offline reference and is not served; write also_build: \[torch\]"):
        spec.parse({"name": "x", "engine": {"backend": "torch"}})
    assert spec.parse({"name": "x", "engine": {"also_build": ["torch", "openvino"], "precisions": ["bf16"]}}).engine.precisions == ("bf16",)


@pytest.mark.parametrize("text", ["", "- a list", "name: [unclosed", "\x00", "!!python/object/apply:os.system [id]"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(SpecError):
        spec.load(tmp_path / "spec.yaml")
    with pytest.raises(SpecError, match="no such spec file"):
        spec.load(tmp_path / "absent.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        spec.load(tmp_path)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_a_resolved_spec_reads_back_as_itself(path, tmp_path):
    loaded = spec.load(path)
    (tmp_path / "resolved.yaml").write_text(spec.to_yaml(loaded))
    assert spec.load(tmp_path / "resolved.yaml") == loaded
    assert "prune: null" not in (tmp_path / "resolved.yaml").read_text()


def test_a_spec_is_frozen():
    loaded = spec.parse({"name": "x"})
    with pytest.raises(ValueError, match="frozen"):
        loaded.train.epochs = 3


def test_the_schema_for_editors_is_the_one_of_the_code():
    assert (ROOT / "jobs/specs/schema.json").read_text() == spec.json_schema()
