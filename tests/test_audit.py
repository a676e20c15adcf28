"""An audit: a published version is judged again from its files and rows, and what was forged, changed or swapped is found."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from published import make

from portaisys import artifact, gate, launch, spec
from portaisys.audit import Line, _other_devices, _spec, audit
from portaisys.cli import main
from portaisys.fetch import fetch
from portaisys.gate import Decision
from portaisys.registry import SPEC, UnreachableError, open_registry
from portaisys.spec import Storage, UserError

FASTER = Decision("pass", "latency ratio 0.500, planted: what is published must not depend on this machine's clock", {"ratio": 0.5, "low": 0.4, "high": 0.6, "rounds": 20})


def quiet(stage, text="", fraction=None, state="running"):
    pass


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A version of digits with an fp32 and an int8 engine, made by a whole run on a file of rows."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("audit")
    bunch = load_digits()
    np.savez(folder / "rows.npz", x=bunch.images[:, None].astype(np.float32), y=bunch.target)
    storage = Storage(path=str(folder / "runs"), cache=str(folder / "home/.cache/portaisys"))
    options = spec.parse(
        {
            "name": "audited", "data": {"source": "npz", "path": str(folder / "rows.npz"), "test_rows": 600}, "model": {"channels": [8, 16], "blocks": [1, 1]},
            "train": {"epochs": 6}, "compress": [{"quantize": {}}], "gate": {"max_accuracy_drop": 0.1, "max_class_recall_drop": 0.3, "latency_pairs": 20}, "storage": storage.model_dump(),
        }
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gate, "faster", lambda *_: FASTER)
        outcome = launch.run(options, quiet)
    assert set(outcome.artifacts["version"].scores["admitted"]) == {"dense fp32", "int8"}
    return SimpleNamespace(folder=folder, storage=storage, outcome=outcome, reference=str(outcome.version), rows=folder / "rows.npz")


def forged(published, change):
    """Another version of the name: the published folder with something changed, hashed and published as if a run had made it."""
    before = published.outcome.artifacts["version"]
    folder = Path(published.folder / f"forged-{len(list(published.folder.glob('forged-*')))}")
    with artifact.writing(folder, kind="version", key="forged", parents={}, spec={}) as draft:
        for name in before.files:
            shutil.copyfile(before.file(name), draft.path / name)
        about = json.loads((draft.path / "version.json").read_text())
        change(draft.path, about)
        (draft.path / "version.json").write_text(json.dumps(about))
    was = published.outcome.version
    opened = open_registry(published.storage)
    return str(opened.publish("audited", folder, was.run_id, was.lineage, {"action": "pass", "because": "planted"}))


def spoil(folder, about, file="int8.onnx", index=3):
    """A file that never answers one class; the verdicts in version.json say what they said of the good one."""
    model = onnx.load(folder / file)
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [10])
    values = numpy_helper.to_array(bias).copy()
    values[index] -= 1e3
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(model, folder / file)


def test_an_audit_reaches_the_same_verdict_from_the_files_and_the_rows(published, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(published.folder / "home"))
    looks = [entry for entry in open_registry(published.storage).ledger() if entry.event == "look"]
    assert main(["audit", "audited@candidate", "--storage", published.storage.path]) == 0
    said = capsys.readouterr()
    for words in ("dense fp32", "int8", "then", "now", "accuracy pass, class recall", "drop [bounds], points", "run again from its weights", "2 looks", "no look is counted", "the same verdict"):
        assert words in said.out, words
    assert said.err == "" and [entry for entry in open_registry(published.storage).ledger() if entry.event == "look"] == looks


def test_it_judges_with_the_figures_of_then(published):
    found = audit(published.reference, published.storage)
    assert not found.differs and not found.notes and (found.test_rows, found.looks) == (600, 2)
    line = next(line for line in found.lines if line.engine == "int8")
    for name in ("accuracy", "class recall"):
        assert dict(line.now[name].figures) == line.then["verdicts"][name]["figures"]
    assert line.accuracy == line.then["accuracy"] and line.latency_ms_p50 > 0


def test_without_the_dense_weights_the_answers_kept_in_the_version_stand_for_them(published):
    weights = published.folder / "runs/audited/train"
    weights.rename(published.folder / "away")
    try:
        found = audit(published.reference, published.storage)
    finally:
        (published.folder / "away").rename(weights)
    assert not found.differs and "as the version keeps them" in found.baseline and "logits of the first 64 rows" in found.baseline
    assert {line.engine: set(line.now) for line in found.lines} == {"dense fp32": {"parity"}, "int8": {"accuracy", "class recall"}}


def test_damaged_dense_weights_are_not_used_and_it_says_so(published):
    weights = published.folder / "runs/audited/train/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"?")
    try:
        found = audit(published.reference, published.storage)
    finally:
        weights.write_bytes(whole)
    assert not found.differs and "as the version keeps them" in found.baseline and "model.safetensors differs from its manifest" in found.notes[0]


def test_one_changed_byte_of_an_engines_file_is_refused(published, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(published.folder / "home"))
    changed = [file for file in (published.folder / "runs/mlartifacts").rglob("int8.onnx") if published.outcome.version.digest in str(file)]
    fetch(published.reference, published.storage, published.storage.cache_dir)  # a good copy, which is not what is audited
    whole = changed[0].read_bytes()
    for file in changed:
        file.write_bytes(whole[:-1] + b"?")
    try:
        assert main(["audit", published.reference, "--storage", published.storage.path]) == 2
    finally:
        for file in changed:
            file.write_bytes(whole)
    assert len(changed) == 1 and re.search(rf"error: {published.reference}: the registry's copy .*int8\.onnx differs from its manifest", capsys.readouterr().err)


def test_a_changed_ledger_is_refused(published):
    def replaced(old, new):
        with contextlib.closing(sqlite3.connect(published.folder / "runs/mlflow.db")) as database, database:
            database.execute("UPDATE model_version_tags SET value = replace(value, ?, ?) WHERE name = 'portaisys-ledger' AND key = 'entry'", (old, new))

    replaced('"event": "look"', '"event": "Look"')
    try:
        with pytest.raises(UserError, match=r"ledger: entry \d+ was changed"):
            audit(published.reference, published.storage)
    finally:
        replaced('"event": "Look"', '"event": "look"')


def test_a_forged_verdict_is_found_by_the_true_one(published, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(published.folder / "home"))
    reference = forged(published, spoil)
    assert main(["audit", reference, "--storage", published.storage.path]) == 1
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "int8 on onnxruntime: class recall was pass and is fail: worst class '3'" in said.err and "the verdict does not stand" in said.out


def test_a_file_passed_off_as_the_dense_one_is_not_at_parity(published):
    differs = audit(forged(published, partial(spoil, file="fp32.onnx")), published.storage).differs
    assert any("dense fp32 on onnxruntime: parity was pass and is fail" in text for text in differs)


def test_looks_that_were_made_fewer_and_verdicts_left_out_are_found(published):
    def change(folder, about):
        about["looks"] = 1
        about["verdicts"] = [{**row, "verdicts": {}} for row in about["verdicts"]]

    found = audit(forged(published, change), published.storage)
    assert "looks at the test split: the version says 1 and the ledger 2" in found.differs
    assert any("int8 on onnxruntime: accuracy was none and is pass" in text for text in found.differs) and found.looks == 2


def test_other_test_rows_are_refused_and_the_same_rows_elsewhere_are_not(published):
    with np.load(published.rows) as arrays:
        x, y = arrays["x"], arrays["y"]
    published.rows.rename(published.folder / "moved.npz")
    try:
        np.savez(published.rows, x=x[::-1], y=y[::-1])
        wanted = published.outcome.version.lineage["test"][:12]
        with pytest.raises(UserError, match=rf"was judged on the test split {wanted}, and data\.source=npz gives (?!{wanted})"):
            audit(published.reference, published.storage)
        assert not audit(published.reference, published.storage, str(published.folder / "moved.npz")).differs
    finally:
        (published.folder / "moved.npz").replace(published.rows)


def test_rows_that_are_gone_are_asked_for_by_the_option_that_names_them(published, monkeypatch):
    (published.rows).rename(published.folder / "gone.npz")
    try:
        with pytest.raises(UserError, match=rf"^{published.reference}: .* data\.path: no file .*rows\.npz; bring the data back, or say where it lies \(--data\)$"):
            audit(published.reference, published.storage)
    finally:
        (published.folder / "gone.npz").rename(published.rows)


def test_a_source_without_a_file_takes_no_data_option(published):
    tree = {"data": {"source": "digits", "test_rows": 600}}
    with pytest.raises(UserError, match=r"^digits@1: source digits reads no file; leave --data out$"):
        _spec(SimpleNamespace(spec_of=lambda version: tree), "digits@1", published.storage, "rows.npz")


def test_a_spec_that_is_no_json_is_said_to_be_damaged_and_no_registry_to_be_away(published):
    file = next((published.folder / "runs/mlartifacts").rglob(SPEC))
    whole = file.read_bytes()
    try:
        for damaged in (whole[:-9], b"", b"\xff"):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"^{published.reference}: spec\.json of its run {published.outcome.version.run_id} in the registry is damaged") as error:
                audit(published.reference, published.storage)
            assert not isinstance(error.value, UnreachableError) and "MLFLOW_TRACKING_URI" not in str(error.value)
    finally:
        file.write_bytes(whole)


def test_a_spec_with_a_wider_margin_than_was_judged_with_is_refused(published):
    file = next((published.folder / "runs/mlartifacts").rglob(SPEC))
    whole = file.read_text()
    file.write_text(json.dumps({**json.loads(whole), "gate": {**json.loads(whole)["gate"], "max_accuracy_drop": 0.9}}))
    try:
        with pytest.raises(UserError, match=r"is not the spec of its lineage .* it was changed"):
            audit(published.reference, published.storage)
    finally:
        file.write_text(whole)


def test_a_version_made_without_a_test_split_cannot_be_audited(published, tmp_path):
    opened = open_registry(published.storage)
    plain = opened.publish("plain", make(tmp_path / "made", "plain", 1).path, opened.log_run("plain", {}, {}, {}, {}), {"data": "d1"}, {"action": "pass", "because": "test"})
    with pytest.raises(UserError, match="made without a test split"):
        audit(str(plain), published.storage)


def test_another_device_is_said_since_verdicts_are_per_device():
    line = Line("int8", "onnxruntime", "int8", "cpu-avx2", {"device": "cpu-avx512", "verdicts": {}}, 0.9, 1.0, {})
    assert "judged on cpu-avx512 and ran on cpu-avx2: verdicts are per backend, precision and device" in _other_devices([line])[0]
