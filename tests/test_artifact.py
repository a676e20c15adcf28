"""Artifacts: complete or absent, verified, never half."""

from __future__ import annotations

import subprocess
import sys

import pytest

from portaisys import artifact
from portaisys.spec import UserError


def write(folder, content="hello", key="k"):
    with artifact.writing(folder, kind="test", key=key, parents={"a": "1"}, spec={"s": 1}) as draft:
        (draft.path / "file.txt").write_text(content)
        draft.scores["accuracy"] = 0.5
        draft.notes.append("fell back")
    return artifact.read(folder)


def test_an_artifact_reads_back_with_scores_and_notes(tmp_path):
    made = write(tmp_path / "stage")
    assert made.scores == {"accuracy": 0.5}
    assert made.notes == ("fell back",)
    assert made.file("file.txt").read_text() == "hello"


def test_the_digest_is_of_the_content_alone(tmp_path):
    assert write(tmp_path / "a", key="1").digest == write(tmp_path / "b", key="2").digest
    assert write(tmp_path / "a").digest != write(tmp_path / "c", "other").digest


def test_an_exception_leaves_the_old_artifact_and_no_draft(tmp_path):
    old = write(tmp_path / "stage")
    with pytest.raises(RuntimeError), artifact.writing(tmp_path / "stage", kind="t", key="k", parents={}, spec={}) as draft:
        (draft.path / "file.txt").write_text("half")
        raise RuntimeError
    assert artifact.read(tmp_path / "stage", verify=True).digest == old.digest
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_a_changed_file_is_noticed(tmp_path):
    made = write(tmp_path / "stage")
    made.file("file.txt").write_text("tampered")
    with pytest.raises(UserError, match=r"file\.txt differs"):
        artifact.read(tmp_path / "stage", verify=True)
    with pytest.raises(UserError, match="differs"):
        artifact.find(tmp_path / "stage", "k")


def test_an_artifact_of_another_key_is_not_found(tmp_path):
    write(tmp_path / "stage", key="old")
    assert artifact.find(tmp_path / "stage", "new") is None
    assert artifact.find(tmp_path / "absent", "new") is None


def test_a_damaged_manifest_is_an_error_that_says_what_to_do(tmp_path):
    write(tmp_path / "stage")
    (tmp_path / "stage" / artifact.MANIFEST).write_text('{"kind": "te')
    with pytest.raises(UserError, match="delete the folder"):
        artifact.read(tmp_path / "stage")


def test_a_folder_is_held_by_one_process_and_free_when_it_dies(tmp_path):
    code = f"from portaisys import artifact; from pathlib import Path\nwith artifact.locked(Path({str(tmp_path)!r})):\n print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run is writing"), artifact.locked(tmp_path):
        pass
    other.kill()
    other.wait()
    with artifact.locked(tmp_path):
        artifact.sweep(tmp_path)
