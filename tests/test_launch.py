"""The spine: a whole run in this process, what it leaves, what it reuses, what it refuses before any work is spent."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from test_report import CHROMIUM, measured, screenshot

from portaisys import artifact, data, launch, metrics, spec
from portaisys.cli import main
from portaisys.fetch import fetch
from portaisys.registry import open_registry
from portaisys.rehearsal import rehearse_steps
from portaisys.spec import UserError

ROOT = Path(__file__).parents[1]


def quiet(stage, text="", fraction=None, state="running"):
    pass


def short(folder, *overrides):
    """digits, in this process, in seconds."""
    return spec.load(
        ROOT / "jobs/specs/digits.yaml",
        [
            "train.num_workers=0", "train.epochs=6", "compress.1.distill.epochs=6", "model.channels=[16,32]", "model.blocks=[1,1]",
            "compress.0.prune.round_to=4", "gate.max_accuracy_drop=0.04", "gate.latency_pairs=40", "train.checkpoint_every_steps=10",
            "engine.also_build=[]", f"storage.path={folder / 'runs'}", f"storage.cache={folder / 'cache'}", *overrides,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spine")
    return folder, launch.run(short(folder), quiet)


def test_every_stage_leaves_an_artifact_with_parameters_and_macs(finished):
    _, outcome = finished
    assert list(outcome.artifacts) == ["train", "prune-1", "distill-2", "export-dense", "export-small", "quantize", "judge", "version"]
    for name in list(outcome.artifacts)[:6]:
        assert outcome.artifacts[name].scores["parameters"] > 0
        assert outcome.artifacts[name].scores["macs"] > 0
    assert outcome.artifacts["train"].scores["validation_accuracy"] > 0.85
    assert outcome.artifacts["distill-2"].scores["macs"] <= 0.5 * outcome.artifacts["train"].scores["macs"]


def test_the_table_holds_every_candidate_with_its_verdict(finished):
    _, outcome = finished
    rows = {row["engine"]: row for row in outcome.rows}
    assert list(rows) == ["dense torch", "dense fp32", "small fp32", "int8"]
    assert rows["dense fp32"]["admissible"]
    assert rows["dense fp32"]["accuracy"] == rows["dense torch"]["accuracy"]
    for name in ("small fp32", "int8"):
        assert rows[name]["verdicts"]["accuracy"]["action"] in ("pass", "fail", "inconclusive")
        assert rows[name]["verdicts"]["latency"]["figures"]["low"] <= rows[name]["verdicts"]["latency"]["figures"]["ratio"]
    assert all(row["status"] == "executed" for row in rows.values())


def test_the_kept_answers_reach_the_same_accuracy(finished):
    _, outcome = finished
    with np.load(outcome.artifacts["judge"].file("answers.npz")) as answers:
        for row in outcome.rows:
            assert (answers[row["engine"].replace(" ", "_")] == answers["y"]).mean() == pytest.approx(row["accuracy"])


def test_the_version_is_published_promoted_and_traceable(finished):
    folder, outcome = finished
    options = short(folder)
    got = fetch("digits@production", options.storage, folder / "replica")
    about = json.loads((got.path / "version.json").read_text())
    assert got.version.version == outcome.version.version
    assert about["lineage"]["reference"] == outcome.artifacts["train"].digest
    assert about["labels"] == list("0123456789")
    assert {path.name for path in got.path.glob("*.onnx")} == {f"{precision}.onnx" for precision in about["precisions"]}
    events = [entry.event for entry in open_registry(options.storage).ledger()]
    assert events.count("look") == 1
    assert events[-2:] == ["publish", "promote"]


def test_the_report_is_one_page_with_curves_and_verdicts(finished):
    _, outcome = finished
    page = outcome.report.read_text()
    assert page.count("<svg") == 3
    for text in ("small fp32", "accuracy", "paired rounds", "Bonferroni", outcome.artifacts["train"].digest[:12]):
        assert text in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")


@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")
def test_the_plots_of_a_run_are_there_in_a_browser(finished, tmp_path):
    _, outcome = finished
    found = {name: (width, height, paths) for name, width, height, paths in measured(outcome.report, tmp_path)}
    assert found.keys() == {"pareto", "intervals", "curves"}
    assert all(width > 400 and height > 100 and paths > 10 for width, height, paths in found.values()), found
    picture = screenshot(outcome.report, tmp_path)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


def test_a_second_run_only_reads(finished):
    folder, outcome = finished
    again = launch.run(short(folder), quiet)
    assert again.reused == tuple(outcome.artifacts)
    assert again.version == outcome.version
    assert [entry.event for entry in open_registry(short(folder).storage).ledger()].count("look") == 1


def test_the_curves_of_the_trainings_are_in_mlflow_once_as_they_are_in_the_step_logs(finished):
    folder, outcome = finished
    client = open_registry(short(folder).storage).client
    launch.run(short(folder), quiet)  # it only reads, and adds nothing
    experiment = client.get_experiment_by_name("digits").experiment_id
    assert [run.info.run_id for run in client.search_runs([experiment])] == [outcome.version.run_id]
    for stage in ("train", "distill-2"):
        rows = metrics.read(launch.left_by(outcome.artifacts[stage])["log"])
        for column in ("loss", "validation_accuracy", "samples_per_s", "checkpoint_s"):
            history = client.get_metric_history(outcome.version.run_id, f"{stage}/{column}")
            kept = [(row["step"], row[column]) for row in rows if column in row]
            assert sorted((point.step, point.value) for point in history) == kept and len(kept) > 3


def test_a_changed_option_runs_only_what_depends_on_it(finished):
    folder, outcome = finished
    again = launch.run(short(folder, "compress.2.quantize.calibration=percentile"), quiet, resume=True)
    assert set(outcome.artifacts) - set(again.reused) == {"quantize", "judge", "version"}


def test_a_changed_gate_makes_a_new_version_though_every_answer_is_the_same(finished):
    folder, _ = finished
    outcome = launch.run(short(folder), quiet, resume=True)
    again = launch.run(short(folder, "gate.max_accuracy_drop=0.039"), quiet, resume=True)
    assert set(outcome.artifacts) - set(again.reused) == {"judge", "version"}
    assert again.version.version > outcome.version.version
    assert again.rows[2]["verdicts"]["accuracy"]["figures"]["margin"] == 0.039


def test_a_run_that_only_reads_does_not_undo_a_rollback(finished, capsys):
    folder, _ = finished
    changed = short(folder, "gate.max_accuracy_drop=0.039")
    launch.run(changed, quiet, resume=True)
    assert main(["rollback", "digits", "--because", "a test", "--storage", str(folder / "runs")]) == 0
    back = open_registry(changed.storage).resolve("digits@production")
    launch.run(changed, quiet)
    assert open_registry(changed.storage).resolve("digits@production") == back
    assert "in production again" in capsys.readouterr().out


def test_a_damaged_stage_is_told_and_nothing_else_is_touched(finished):
    folder, _ = finished
    model = folder / "runs/digits/export-dense/model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"model\.onnx differs from its manifest"):
        launch.run(short(folder), quiet, resume=True)
    model.write_bytes(whole)


def _hold(folder, ready, done):
    with artifact.locked(Path(folder)):
        ready.set()
        done.wait()


def test_two_runs_into_one_folder_at_once_are_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path / "runs/digits"), ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match="another run is writing"):
        launch.run(short(tmp_path), quiet)
    done.set()
    other.join()


# --- refused before training ------------------------------------------------------------------------------------

REFUSED = [
    pytest.param(["engine.backend=tensorrt"], r"engine\.backend: tensorrt cannot run on this machine", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="GPU")),
    (["gate.max_accuracy_drop=0.001"], r"gate\.max_accuracy_drop: 0\.001 cannot be decided with 600 test rows"),
    (["model={name: factory, factory: 'nowhere:Net'}"], r"model\.factory: nowhere:Net does not import"),
    (["model={name: factory, factory: 'collections:OrderedDict'}"], r"model\.factory: .* not a torch\.nn\.Module"),
    (["model={name: factory, factory: 'torch.nn:Flatten'}"], r"the data has 10 classes"),
    (["data={source: fashion_mnist, path: /nowhere}"], r"data\.path: no folder /nowhere"),
    (["data.test_rows=1790"], r"data\.test_rows"),
    (["data={source: npz, path: FLAT, test_rows: 150}", "gate.max_accuracy_drop=0.2", "model={name: factory, factory: 'torch.nn:Flatten'}"], r"train\.augment: 'shift' moves pictures"),
    (["storage.path=FILE"], r"storage\.path: .* cannot be written"),
    (["compress.0.prune.mac_cut=0.99"], r"compress\.prune: mac_cut 0\.99.* cannot be met; this model reaches at most mac_cut 0\.9\d+"),
    (["compress.0.prune.keep=[net.1.conv]"], r"compress\.prune\.keep: 'net\.1\.conv' is no layer of this model; the nearest are net\."),
    (["compress=[{prune: {ratios: [0.5]}}]"], r"compress\.prune\.ratios: 1 ratios for a model of 2 stages"),
    (["compress=[{sparsify: {keep: [nope]}}]"], r"compress\.sparsify\.keep: 'nope' is none of the layers"),
    (["compress=[{quantize: {keep: [net.9]}}]"], r"compress\.quantize\.keep: 'net\.9' is no module of this model; nearest: net\."),
    (["compress=[{distill: {student: {name: convnet, channels: [8], blocks: [1]}}}, {distill: {features: {layers: [net.2.conv1]}}}]"], r"'net\.2\.conv1'"),
    ]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_cannot_end_well_is_refused_before_training(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    np.savez(tmp_path / "flat.npz", x=np.random.default_rng(0).normal(size=(700, 7)), y=np.arange(700) % 10)
    (tmp_path / "file").touch()
    overrides = [text.replace("FLAT", str(tmp_path / "flat.npz")).replace("FILE", str(tmp_path / "file")) for text in overrides]
    with pytest.raises(UserError, match=message):
        launch.run(short(tmp_path, *overrides), quiet)
    assert not list(tmp_path.glob("runs/*/train*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.use_gpu: torch sees no GPU"):
        launch.run(short(tmp_path, "train.use_gpu=true"), quiet)


def test_a_target_that_only_measuring_finds_out_of_reach_keeps_what_was_trained(tmp_path):
    with pytest.raises(UserError, match=r"compress\.prune: .*latency_cut 0\.99"):
        launch.run(short(tmp_path, "train.epochs=1", "compress=[{prune: {mac_cut: 0, latency_cut: 0.99, steps: 1}}]"), quiet)
    assert artifact.read(tmp_path / "runs/digits/train", verify=True).kind == "train"


def test_layers_are_looked_for_in_the_student_that_a_step_before_it_made(tmp_path):
    student = "{name: convnet, channels: [8, 8, 8], blocks: [1, 1, 1]}"
    options = short(tmp_path, "compress=[{distill: {student: " + student + "}}, {distill: {features: {layers: {net.5.conv1: net.4.conv1}}}}]")
    rehearse_steps(options, data.load(options.data))


def test_a_run_that_was_killed_while_it_was_judged_goes_on_though_its_own_looks_are_counted(tmp_path, monkeypatch):
    # A margin that 600 rows decide at one look, and not at two.
    options = short(tmp_path, "train.epochs=1", "compress=[{quantize: {}}]", "gate.max_accuracy_drop=0.0074")

    def killed(*_, **__):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("portaisys.stages.judge", killed)
        launch.run(options, quiet)
    splits = data.load(options.data)
    assert open_registry(options.storage).looks(splits.test_digest) == 2
    assert {"train", "export-dense", "quantize"} <= {*launch.run(options, quiet).reused}
    # Of another spec's candidates they are looks like any other's.
    with pytest.raises(UserError, match=r"gate\.max_accuracy_drop: 0\.0074 cannot be decided .*looks at this test split: 4"):
        launch.run(short(tmp_path, "train.epochs=2", "compress=[{quantize: {}}]", "gate.max_accuracy_drop=0.0074"), quiet, resume=True)


def test_a_run_without_candidates_publishes_the_dense_engine_and_its_look_is_counted(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.{}(), nn.Linear(32, 10))\n"
    (tmp_path / "own_net.py").write_text(code.format("ReLU"))
    options = short(tmp_path, "compress=[]", "model={name: factory, factory: 'own_net:net'}", "train.epochs=1", "train.learning_rate=0.01")
    first = launch.run(options, quiet)
    assert first.artifacts["version"].scores["admitted"] == ["dense fp32"]
    assert open_registry(options.storage).looks(first.version.lineage["test"]) == 1
    # The same spec, but the code behind its factory has changed: nothing of the old model may be reused.
    (tmp_path / "own_net.py").write_text(code.format("GELU"))
    sys.modules.pop("own_net")
    assert "train" not in launch.run(options, quiet).reused


def test_an_unfinished_run_of_another_spec_is_not_resumed(tmp_path):
    work = tmp_path / "runs/digits/train.work"

    class Stop(Exception):
        pass

    def stop_half_way(stage, text="", fraction=None, state="running"):
        if stage == "train" and fraction and fraction > 0.5:
            raise Stop

    with pytest.raises(Stop):
        launch.run(short(tmp_path), stop_half_way)
    before = artifact.hash_files(work)
    with pytest.raises(UserError, match="another spec, data or parent"):
        launch.run(short(tmp_path, "train.learning_rate=0.05"), quiet, resume=True)
    assert artifact.hash_files(work) == before
    # Nor without being asked for; the same spec goes on, and says from where.
    with pytest.raises(UserError, match=r"name: 'digits' was used by another spec \(train\.learning_rate was 0\.05 and is"):
        launch.run(short(tmp_path), quiet)
    said = []
    launch.run(short(tmp_path), lambda stage, text="", fraction=None, state="running": said.append(text), resume=True)
    assert any(re.fullmatch(r"goes on from step \d+0, where an earlier run stopped", text) for text in said)


def test_a_name_used_by_another_spec_is_refused_with_what_differs_and_nothing_changes(finished):
    folder, _ = finished
    launch.run(short(folder), quiet, resume=True)
    before = artifact.hash_files(folder / "runs/digits")
    for function in (launch.run, launch.train):
        with pytest.raises(UserError, match=r"name: 'digits' was used by another spec \(train\.epochs was 6 and is 7\); .* --resume"):
            function(short(folder, "train.epochs=7"), quiet)
    assert artifact.hash_files(folder / "runs/digits") == before
    # What is computed is the same: another number of trials, retries or replicas is no other spec.
    launch.run(short(folder, "search.trials=3", "train.max_failures=7", "serve.num_replicas=2"), quiet)


# --- storage beyond this machine ----------------------------------------------------------------------------------


def test_a_run_on_s3_is_found_again_by_a_machine_that_has_nothing(there, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # where MLflow puts a sqlite server's artifacts
    changes = ["train.epochs=1", "compress=[]", f"storage.path=s3://bucket/{there.name}"]
    first = launch.run(short(tmp_path, *changes), quiet)
    assert (there / "digits/train/manifest.json").exists()
    shutil.rmtree(tmp_path / "cache")
    again = launch.run(short(tmp_path, *changes), quiet)
    assert set(again.reused) == set(first.artifacts)
    assert again.version == first.version


def test_s3_without_a_registry_server_is_refused_with_what_to_use(there, tmp_path):
    with pytest.raises(UserError, match=r"mlflow server .* MLFLOW_TRACKING_URI"):
        launch.run(short(tmp_path, f"storage.path=s3://bucket/{there.name}"), quiet)


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_ends_with_code_2_and_one_line_on_a_users_error(capsys, tmp_path):
    assert main(["run", str(ROOT / "jobs/specs/digits.yaml"), "train.epoch=3"]) == 2
    assert capsys.readouterr().err == "error: train.epoch: unknown key; did you mean 'epochs'?\n"
    assert main(["promote", "digits@1", "--storage", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_command_shows_versions_ledger_and_rolls_back(finished, capsys):
    folder, _ = finished
    storage = ["--storage", str(folder / "runs")]
    assert main(["versions", "digits", *storage]) == 0
    assert "production" in capsys.readouterr().out
    assert main(["promote", "digits@nobody", *storage]) == 2
    assert "nobody" in capsys.readouterr().err
    assert main(["promote", "digits@candidate", "--because", "a test", *storage]) == 0
    assert main(["ledger", *storage]) == 0
    assert "chain intact" in capsys.readouterr().out


def test_every_verb_has_help_with_an_example(capsys):
    for verb in ("run", "train", "tune", "demo", "spec", "versions", "audit", "promote", "rollback", "ledger", "serve", "deploy", "cache"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert f"example:\n  portaisys {verb}" in capsys.readouterr().out


def test_openvino_is_judged_and_published_with_bf16_where_the_cpu_has_it(tmp_path):
    import openvino

    has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    changes = ["engine.backend=openvino", "train.epochs=1", "compress=[{quantize: {}}]", f"engine.precisions=[fp32, {'bf16, ' * has_bf16}int8]", "gate.max_accuracy_drop=0.1"]
    outcome = launch.run(short(tmp_path, *changes), quiet)
    assert [(row["engine"], row["backend"]) for row in outcome.rows[1:]] == [(name, "openvino") for name in ("dense fp32", *["bf16"] * has_bf16, "int8")]
    assert "accuracy" in outcome.rows[2]["verdicts"] and open_registry(short(tmp_path).storage).looks(outcome.version.lineage["test"]) == 2 + has_bf16


def test_every_precision_that_only_another_backend_has_is_built_there_and_not_judged_and_torch_compile_is_timed(tmp_path):
    changes = ["engine.also_build=[tensorrt, torch]", "train.epochs=1", "compress=[{quantize: {}}]", "engine.precisions=[fp16, bf16, int8, fp8]", "gate.max_accuracy_drop=0.1"]
    outcome = launch.run(short(tmp_path, *changes), quiet)
    judged = [(row["engine"], row["backend"]) for row in outcome.rows if row["status"] == "executed"]
    assert judged == [("dense torch", "torch"), ("dense torch.compile", "torch"), ("dense fp32", "onnxruntime"), ("int8", "onnxruntime")]
    eager, compiled = outcome.rows[:2]
    assert compiled["accuracy"] == eager["accuracy"] and compiled["latency_ms_p50"] > 0 and not compiled["admissible"] and "not served" in compiled["because"]
    built = {row["engine"]: row for row in outcome.rows if row["backend"] == "tensorrt"}
    assert [*built] == ["dense fp32", "bf16", "fp16", "int8", "fp8"]
    assert all("built but not run" in row["because"] and not row["admissible"] for row in built.values())
    assert open_registry(short(tmp_path).storage).looks(outcome.version.lineage["test"]) == 2
    # Between Q and DQ the int8 engine of TensorRT is fp16, since fp16 was asked for; what ONNX Runtime serves is not.
    for stage, low in (("cast-int8", True), ("cast-fp8", True), ("cast-fp16", True), ("quantize", False)):
        kinds = {tensor.data_type for tensor in onnx.load(outcome.artifacts[stage].file("model.onnx")).graph.initializer}
        assert (onnx.TensorProto.FLOAT16 in kinds) is low, stage
    assert outcome.artifacts["cast-fp16"].scores["islands"] == [] and outcome.artifacts["cast-fp16"].scores["error"] < 0.02


def test_a_sparsified_model_is_distilled_with_its_zeros_and_built_for_sparse_kernels(tmp_path):
    recipe = "compress=[{sparsify: {}}, {distill: {epochs: 1}}]"
    outcome = launch.run(short(tmp_path, recipe, "train.epochs=1", "engine.also_build=[tensorrt]", "engine.sparse=true", "gate.max_accuracy_drop=0.1"), quiet)
    assert list(outcome.artifacts)[:3] == ["train", "sparsify-1", "distill-2"]
    weights = {name: safetensors.torch.load_file(outcome.artifacts[name].file("model.safetensors")) for name in ("sparsify-1", "distill-2")}
    wide = [name for name, weight in weights["sparsify-1"].items() if weight.ndim > 1 and weight.shape[1] % 4 == 0]
    assert len(wide) == outcome.artifacts["sparsify-1"].scores["sparse_layers"]
    for name in wide:
        before, after = (weights[stage][name] for stage in ("sparsify-1", "distill-2"))
        assert bool((after[before == 0] == 0).all()) and not torch.equal(before, after), name
    assert [row["engine"] for row in outcome.rows if row["backend"] == "tensorrt"] == ["dense fp32", "small fp32"]


def test_auto_serves_with_the_backend_it_chose_and_keeps_the_table(tmp_path):
    changes = ["engine.backend=auto", "train.epochs=1", "compress=[{quantize: {}}]", "gate.max_accuracy_drop=0.1"]
    outcome = launch.run(short(tmp_path, *changes), quiet)
    scores = outcome.artifacts["choose"].scores
    best = min((line for line in scores["table"] if line["ms"]), key=lambda line: line["ms"]["1"][0])
    assert (scores["backend"], scores["precision"]) == (best["backend"], best["precision"]) and "ms at batch 1" in outcome.artifacts["choose"].notes[0]
    fastest = {precision: min((line["ms"]["1"][0], line["backend"]) for line in scores["table"] if line["ms"] and line["precision"] == precision)[1] for precision in ("fp32", "int8")}
    assert all(row["backend"] == fastest[row["precision"]] for row in outcome.rows[1:])
    about = json.loads((outcome.artifacts["version"].path / "version.json").read_text())
    assert about["backends"].items() <= fastest.items() and f"chosen by speed: {scores['precision']}" in outcome.report.read_text()
    assert launch.run(short(tmp_path, *changes), quiet).reused == tuple(outcome.artifacts)


def test_the_template_spec_runs_on_a_users_own_arrays(tmp_path, monkeypatch):
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez(tmp_path / "mine.npz", x=digits.images[:, None].astype(np.float32) / 16, y=digits.target)
    monkeypatch.setenv("HOME", str(tmp_path))
    changes = ["data.path=~/mine.npz", "data.test_rows=600", "train.epochs=1", "compress=[]", "model.channels=[8,16,16]"]
    outcome = launch.run(spec.load(ROOT / "jobs/specs/template.yaml", [*changes, f"storage.path={tmp_path}/runs", f"storage.cache={tmp_path}/cache"]), quiet)
    assert str(outcome.version) == "mine@1"
