"""The store against a real S3 server: `rclone serve s3`, which keeps files on disk and checks signatures."""

import json
import os
import signal
import subprocess
import sys
import time

import boto3
import pytest
from conftest import free_port, until

from portaisys import artifact, store
from portaisys.spec import UserError


def make(folder, files):
    with artifact.writing(folder, kind="export", key="k", parents={}, spec={}) as draft:
        for name, data in files.items():
            (draft.path / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.path / name).write_bytes(data)
    return folder


def put(there, name, data):
    """Write an object as somebody else with access to the bucket would."""
    boto3.client("s3").put_object(Bucket="bucket", Key=f"{there.name}/{name}", Body=data)


def test_a_single_file_goes_and_comes_back(there, tmp_path):
    (tmp_path / "checkpoint").write_bytes(b"state")
    assert not store.fetch_file(f"s3://bucket/{there.name}/checkpoint", tmp_path / "back")
    store.send_file(tmp_path / "checkpoint", f"s3://bucket/{there.name}/checkpoint")
    assert store.fetch_file(f"s3://bucket/{there.name}/checkpoint", tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == b"state"


def test_a_pushed_artifact_comes_back_the_same(there, tmp_path):
    files = {"model.onnx": os.urandom(12 << 20), "sub/golden.npz": b"golden", "empty": b""}
    made = artifact.read(make(tmp_path / "here", files))
    store.push(tmp_path / "here", f"s3://bucket/{there.name}/runs/demo/export")
    assert store.pull(f"s3://bucket/{there.name}/runs/demo/export", tmp_path / "back") is True
    came = artifact.read(tmp_path / "back", verify=True)
    assert (came.digest, came.files) == (made.digest, made.files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "here"]


def test_where_nothing_was_pushed_there_is_nothing_to_pull(there, tmp_path):
    assert store.pull(f"s3://bucket/{there.name}/runs/nothing", tmp_path / "back") is False
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_folder_is_not_pushed(there, tmp_path):
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match=r"no finished artifact here"):
        store.push(tmp_path / "half", f"s3://bucket/{there.name}/half")
    assert not there.exists()


def test_a_push_that_is_killed_leaves_no_artifact_not_even_the_old_one(there, tmp_path):
    uri, remote = f"s3://bucket/{there.name}/runs/demo", there / "runs" / "demo"
    store.push(make(tmp_path / "old", {"000": b"old"}), uri)
    make(tmp_path / "new", {f"{number:03}": b"new" for number in range(200)})
    code = f"from pathlib import Path; from portaisys import store; store.push(Path({str(tmp_path / 'new')!r}), {uri!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: (remote / "005").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (remote / "199").exists(), "the push was over before it was killed"
    assert store.pull(uri, tmp_path / "back") is False
    store.push(tmp_path / "new", uri)
    assert store.pull(uri, tmp_path / "back") is True


def test_what_differs_from_its_manifest_is_refused_and_replaces_nothing(there, tmp_path):
    store.push(make(tmp_path / "here", {"model.onnx": b"model"}), f"s3://bucket/{there.name}/demo")
    make(tmp_path / "back", {"model.onnx": b"older"})
    put(there, "demo/model.onnx", b"malicious")
    with pytest.raises(UserError, match=r"^s3://.*/demo: model\.onnx differs from its manifest"):
        store.pull(f"s3://bucket/{there.name}/demo", tmp_path / "back")
    assert (tmp_path / "back" / "model.onnx").read_bytes() == b"older"


def test_a_newer_artifact_replaces_the_local_one(there, tmp_path):
    store.push(make(tmp_path / "here", {"a": b"new"}), f"s3://bucket/{there.name}/demo")
    make(tmp_path / "back", {"a": b"old", "b": b"old"})
    store.pull(f"s3://bucket/{there.name}/demo", tmp_path / "back")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["a", "manifest.json"]


@pytest.mark.parametrize("name", ["../outside", "/tmp/portaisys-outside", "sub/../../outside", ""])
def test_a_manifest_cannot_name_files_outside_the_artifact(there, tmp_path, name):
    store.push(make(tmp_path / "here", {"a": b"a"}), f"s3://bucket/{there.name}/deep/demo")
    put(there, "deep/outside", b"a")
    manifest = json.loads((tmp_path / "here" / "manifest.json").read_text())
    put(there, "deep/demo/manifest.json", json.dumps({**manifest, "files": {name: "0" * 64}}).encode())
    with pytest.raises(UserError, match=r"does not lie inside the artifact"):
        store.pull(f"s3://bucket/{there.name}/deep/demo", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_damaged_manifest_is_refused(there, tmp_path):
    store.push(make(tmp_path / "here", {"a": b"a"}), f"s3://bucket/{there.name}/demo")
    put(there, "demo/manifest.json", b"{")
    with pytest.raises(UserError, match=r"^s3://.*/demo/manifest\.json: damaged"):
        store.pull(f"s3://bucket/{there.name}/demo", tmp_path / "back")


def test_bad_credentials_are_refused_by_every_verb_with_the_reason(there, tmp_path, monkeypatch):
    make(tmp_path / "here", {"a": b"a"})
    store.push(tmp_path / "here", f"s3://bucket/{there.name}/demo")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "WRONG")
    for verb in (
        lambda: store.push(tmp_path / "here", f"s3://bucket/{there.name}/demo"),
        lambda: store.pull(f"s3://bucket/{there.name}/demo", tmp_path / "back"),
        lambda: store.reachable(f"s3://bucket/{there.name}/demo"),
    ):
        with pytest.raises(UserError, match=r"^storage\.path: s3://.*/demo cannot be used: .*SignatureDoesNotMatch.*_KEY$") as refused:
            verb()
        assert "WRONG" not in str(refused.value)


def test_a_reachable_bucket_is_silent_and_a_missing_one_is_named(there):
    store.reachable(f"s3://bucket/{there.name}/any/prefix")
    with pytest.raises(UserError, match=r"^storage\.path: s3://other/demo cannot be used: .*NoSuchBucket"):
        store.reachable("s3://other/demo")


def test_a_store_that_does_not_answer_is_given_up_soon(there, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^storage\.path: s3://.*/demo cannot be used: .*connect"):
        store.reachable(f"s3://bucket/{there.name}/demo")
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("uri", ["gs://bucket/demo", "s3://", "s3:///demo", "bucket/demo"])
def test_an_address_that_is_none_is_an_error_about_storage_path(uri):
    with pytest.raises(UserError, match=r"^storage\.path: .* is no store; write a folder or s3://bucket/prefix"):
        store.reachable(uri)
