"""The registry against real stores: sqlite in a folder, and an `mlflow server` process on 127.0.0.1."""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import until

from portaisys import artifact, registry, spec
from portaisys.fetch import fetch
from portaisys.spec import Storage, UserError

PASS = {"action": "pass", "because": "within the margin"}
FAIL = {"action": "reject", "because": "3 points lost"}


def make(folder, content="1"):
    """A finished artifact whose digest depends on `content`."""
    with artifact.writing(folder, kind="version", key=content, parents={}, spec={"name": "demo"}) as draft:
        (draft.path / "version.json").write_text(json.dumps({"content": content}))
        (draft.path / "fp32.onnx").write_bytes(content.encode() * 50_000)
        draft.scores["accuracy"] = 0.9
    return folder


def publish(open_one, tmp_path, content="1", verdict=PASS, name="demo"):
    run_id = open_one.log_run(name, {"name": name}, {}, {}, {})
    return open_one.publish(name, make(tmp_path / f"artifact-{content}", content), run_id, {"spec": "s" * 64, "data": "d" * 64}, verdict)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """Creating MLflow's tables takes seconds, so it is done once and copied."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry.open_registry(Storage(path=str(folder)))
    return folder / "mlflow.db"


@pytest.fixture
def storage(tmp_path, empty_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_database, tmp_path / "runs")
    return Storage(path=str(tmp_path / "runs"), cache=str(tmp_path / "cache"))


@pytest.fixture
def local(storage):
    return registry.open_registry(storage)


# --- opening and runs ---------------------------------------------------------------------------------------------


def test_importing_the_registry_does_not_import_mlflow():
    code = "import os, sys, portaisys.registry; assert 'mlflow' not in sys.modules and 'MLFLOW_HTTP_REQUEST_TIMEOUT' not in os.environ"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": os.environ["PATH"]})


def test_a_new_local_store_is_readable_by_its_owner_only(empty_database):
    assert stat.S_IMODE(empty_database.stat().st_mode) == 0o600
    assert stat.S_IMODE((empty_database.parent / "mlartifacts").stat().st_mode) == 0o700


def test_a_process_killed_while_it_creates_the_tables_leaves_no_half_database(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code = f"from portaisys import registry; from portaisys.spec import Storage; registry.open_registry(Storage(path={str(tmp_path)!r}))"
    for tables in (1, 12):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda wanted=tables: _tables(tmp_path) >= wanted, process)
        process.kill()
        process.wait()
        assert not (tmp_path / "mlflow.db").exists()
    assert registry.open_registry(Storage(path=str(tmp_path))).names() == []


def _tables(folder):
    """How many tables the databases in `folder` hold by now."""
    count = 0
    for path in (folder / "mlflow.db", folder / ".mlflow.db.draft"):
        if path.exists():
            with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                count = max(count, database.execute("select count(*) from sqlite_master where type = 'table'").fetchone()[0])
    return count


def test_a_remote_storage_path_needs_a_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"storage\.path: s3://bucket/x .*MLFLOW_TRACKING_URI"):
        registry.open_registry(Storage(path="s3://bucket/x"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"storage\.path: .*cannot hold a registry"):
        registry.open_registry(Storage(path=str(tmp_path / "file" / "runs")))


def test_a_run_keeps_its_parameters_and_its_finite_scores(local):
    many = {f"p{i}": i for i in range(150)}
    tree = {"train": {"epochs": 3, "sizes": [1, 2]}, "compress": [{"quantize": {"calibration": "minmax"}}], **many}
    scores = {"accuracy": 0.9, "loss": float("nan"), "latency": {"p99": 2, "max": float("inf")}, "fast": True, "device": "cpu"}
    run = local.client.get_run(local.log_run("demo", tree, {"train": "ab"}, scores, {"kind": "train"}))
    assert run.info.status == "FINISHED"
    kept = {"train.epochs": "3", "train.sizes": "[1, 2]", "compress.0.quantize.calibration": "minmax", "p149": "149"}
    assert run.data.params.items() >= kept.items()
    assert run.data.metrics == {"accuracy": 0.9, "latency.p99": 2.0}
    assert run.data.tags.items() >= {"digest.train": "ab", "kind": "train"}.items()


def test_curves_longer_than_a_call_takes_are_kept_point_by_point(local):
    curve = [(step, 1 / step) for step in range(1, 2502)]
    run_id = local.log_run("demo", {}, {}, {"accuracy": 0.9}, {}, {"train/loss": curve, "distill-2/loss": [(1, float("nan")), (2, 0.5)]})
    history = {name: sorted((point.step, point.value) for point in local.client.get_metric_history(run_id, name)) for name in ("train/loss", "distill-2/loss")}
    assert history == {"train/loss": curve, "distill-2/loss": [(2, 0.5)]}
    assert local.client.get_run(run_id).data.metrics == {"accuracy": 0.9, "train/loss": 1 / 2501, "distill-2/loss": 0.5}


# --- versions -----------------------------------------------------------------------------------------------------


def test_a_published_artifact_is_found_by_number_and_alias(local, tmp_path):
    first, second = publish(local, tmp_path, "1"), publish(local, tmp_path, "2")
    assert (first.version, second.version) == (1, 2)
    assert second.digest == artifact.read(tmp_path / "artifact-2").digest
    assert second.lineage == {"spec": "s" * 64, "data": "d" * 64}
    assert local.resolve("demo@candidate") == local.resolve("demo@2") == second
    assert local.resolve("demo@1").aliases == ()
    assert local.versions("demo") == [local.resolve("demo@1"), second]
    assert local.names() == ["demo"]
    assert local.of_digest("demo", second.digest) == second
    assert local.of_digest("demo", "0" * 64) is None


def test_the_same_artifact_again_is_the_version_it_already_is(local, tmp_path):
    first, second = publish(local, tmp_path, "1"), publish(local, tmp_path, "2")
    again = publish(local, tmp_path, "1")
    assert again.version == first.version
    assert local.resolve("demo@candidate") == again
    assert [version.version for version in local.versions("demo")] == [1, second.version]


def test_the_latest_verdict_on_an_artifact_holds_and_is_recorded(local, tmp_path):
    publish(local, tmp_path, "1", FAIL)
    assert publish(local, tmp_path, "1", PASS).verdict == "pass"
    assert [entry.details["verdict"] for entry in local.ledger("demo")] == ["reject", "pass"]


def test_a_damaged_artifact_is_not_published(local, tmp_path):
    (make(tmp_path / "artifact") / "fp32.onnx").write_bytes(b"other")
    with pytest.raises(UserError, match=r"fp32\.onnx differs from its manifest"):
        local.publish("demo", tmp_path / "artifact", "unused", {}, PASS)


def test_promotion_is_refused_without_a_passing_verdict(local, tmp_path):
    publish(local, tmp_path, "1", FAIL)
    with pytest.raises(UserError, match=r"demo@1: cannot be promoted, its verdict is 'reject' \(3 points lost\)"):
        local.promote("demo", 1)
    assert local.resolve("demo@1").aliases == ("candidate",)
    assert [entry.event for entry in local.ledger()] == ["publish"]


def test_rollback_steps_back_through_what_was_in_production(local, tmp_path):
    for content in "123":
        local.promote("demo", publish(local, tmp_path, content).version, because="better")
    assert local.rollback("demo", because="errors").version == 2
    assert local.rollback("demo").version == 1
    with pytest.raises(UserError, match=r"demo: no version was in production before 1"):
        local.rollback("demo")
    assert local.promote("demo", 3).aliases == ("candidate", "production")
    assert local.rollback("demo").version == 1
    assert local.resolve("demo@production").version == 1
    events = [(entry.event, entry.version, entry.details.get("was")) for entry in local.ledger("demo") if entry.event != "publish"]
    assert events == [
        ("promote", 1, None), ("promote", 2, 1), ("promote", 3, 2), ("rollback", 2, 3), ("rollback", 1, 2),
        ("promote", 3, 1), ("rollback", 1, 3),
    ]  # fmt: skip


def test_promoting_what_is_in_production_changes_nothing(local, tmp_path):
    local.promote("demo", publish(local, tmp_path).version)
    entries = local.ledger()
    local.promote("demo", 1)
    assert local.ledger() == entries


def test_an_unknown_name_alias_or_version_is_answered_with_what_there_is(local, tmp_path):
    publish(local, tmp_path)
    with pytest.raises(UserError, match=r"has no name 'other'; it has demo$"):
        local.resolve("other@production")
    with pytest.raises(UserError, match=r"demo: has no alias 'production'; it has candidate$"):
        local.resolve("demo@production")
    with pytest.raises(UserError, match=r"demo: has no version 7; it has 1$"):
        local.resolve("demo@7")
    with pytest.raises(UserError, match=r"has no name 'other'"):
        local.rollback("other")
    with pytest.raises(UserError, match=r"'demo': says neither alias nor version; write NAME@production or NAME@3"):
        local.resolve("demo")


BAD_NAMES = ["../x", "%2e%2e", "a/b", "a\0b", "a\n", "a" * 64, "a" * 10_000, "d\u0435mo", "Demo", "-a", "", "portaisys-ledger", "x' OR 'y"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:12])
def test_a_name_that_could_be_a_path_is_refused_before_anything_happens(storage, tmp_path, name):
    for reference in (f"{name}@production", f"demo@{name}"):
        with pytest.raises(UserError, match=r"^(name|alias) ") as refused:
            fetch(reference, storage, tmp_path / "copies")
        assert len(str(refused.value)) < 300
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize("name", ["../x", "portaisys-ledger"])
def test_every_verb_refuses_a_bad_name(local, tmp_path, name):
    for verb in (
        lambda: local.log_run(name, {}, {}, {}, {}), lambda: local.publish(name, make(tmp_path / "a"), "run", {}, PASS),
        lambda: local.promote(name, 1), lambda: local.rollback(name), lambda: local.versions(name),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"^name "):
            verb()


# --- fetching -----------------------------------------------------------------------------------------------------


def test_a_fetched_version_is_the_one_published_and_is_kept(local, storage, tmp_path):
    version = publish(local, tmp_path)
    fetched = fetch("demo@candidate", storage, tmp_path / "copies")
    assert (fetched.version, fetched.from_cache, fetched.note) == (version, False, "")
    assert artifact.read(fetched.path, verify=True).scores == {"accuracy": 0.9}
    again = fetch("demo@1", storage, tmp_path / "copies")
    assert (again.path, again.from_cache, again.note) == (fetched.path, True, "")
    assert stat.S_IMODE((tmp_path / "copies" / "versions").stat().st_mode) == 0o700


def test_one_replica_downloads_and_the_others_wait_for_it(local, storage, tmp_path):
    publish(local, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        fetched = list(pool.map(lambda _: fetch("demo@candidate", storage, tmp_path / "copies"), range(4)))
    assert sorted(one.from_cache for one in fetched) == [False, True, True, True]


def stored(storage, version, name):
    return next(Path(storage.path).glob(f"mlartifacts/*/*/artifacts/versions/{version.digest}/{name}"))


def test_a_file_changed_in_the_registry_is_not_served(local, storage, tmp_path):
    stored(storage, publish(local, tmp_path), "fp32.onnx").write_bytes(b"malicious")
    with pytest.raises(UserError, match=r"^demo@1: the registry's copy \(artifacts of run \w+\) is not what was published: fp32\.onnx differs from its manifest; put a good copy back") as error:
        fetch("demo@candidate", storage, tmp_path / "copies")
    assert str(tmp_path) not in str(error.value)  # of the folder it came to nothing is left
    assert not list((tmp_path / "copies").glob("*/*manifest*")) and not list((tmp_path / "copies").glob("versions/[!.]*"))


def test_a_file_changed_together_with_its_manifest_is_not_served(local, storage, tmp_path):
    version = publish(local, tmp_path)
    other = make(tmp_path / "other", "malicious")
    for name in ("fp32.onnx", "version.json", "manifest.json"):
        shutil.copy(other / name, stored(storage, version, name))
    with pytest.raises(UserError, match=r"^demo@1: the registry's copy .* the files, and their manifest with them, are not the ones published"):
        fetch("demo@candidate", storage, tmp_path / "copies")


def test_scores_changed_in_the_manifest_are_not_believed(local, storage, tmp_path):
    manifest = stored(storage, publish(local, tmp_path), "manifest.json")
    manifest.write_text(manifest.read_text().replace("0.9", "1.0"))
    with pytest.raises(UserError, match=r"^demo@1: the registry's copy .* manifest\.json is not the one published"):
        fetch("demo@candidate", storage, tmp_path / "copies")
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"^demo@1: the registry's copy .* manifest\.json is missing or damaged"):
        fetch("demo@candidate", storage, tmp_path / "copies")


def test_a_damaged_local_copy_is_fetched_again(local, storage, tmp_path, caplog):
    publish(local, tmp_path)
    path = fetch("demo@candidate", storage, tmp_path / "copies").path
    (path / "fp32.onnx").write_bytes(b"damaged")
    again = fetch("demo@candidate", storage, tmp_path / "copies")
    assert not again.from_cache
    assert artifact.read(again.path, verify=True).digest == again.version.digest
    assert "the local copy is not what was published" in caplog.text


def test_a_registry_that_is_gone_is_replaced_by_the_local_copy_and_this_is_said(local, storage, tmp_path, caplog):
    version = publish(local, tmp_path)
    fetch("demo@candidate", storage, tmp_path / "copies")
    Path(storage.path).rename(tmp_path / "moved")
    with caplog.at_level(logging.WARNING, logger="portaisys.fetch"):
        fetched = fetch("demo@candidate", storage, tmp_path / "copies")
    assert (fetched.version, fetched.from_cache) == (version, True)
    assert "no registry at" in fetched.note and "Using the local copy of demo@1" in fetched.note
    assert fetched.note in caplog.text
    assert not Path(storage.path).exists()


def test_without_registry_a_damaged_or_missing_copy_is_an_error(local, storage, tmp_path):
    publish(local, tmp_path)
    path = fetch("demo@candidate", storage, tmp_path / "copies").path
    Path(storage.path).rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"demo@1: .*no registry at .*there is no local copy"):
        fetch("demo@1", storage, tmp_path / "copies")
    (path / "fp32.onnx").write_bytes(b"malicious")
    with pytest.raises(UserError, match=r"the local copy of demo@1 is gone or damaged"):
        fetch("demo@candidate", storage, tmp_path / "copies")


def test_a_damaged_database_counts_as_a_registry_that_does_not_answer(local, storage, tmp_path):
    publish(local, tmp_path)
    fetch("demo@candidate", storage, tmp_path / "copies")
    other = Storage(path=str(tmp_path / "other"))
    Path(other.path).mkdir()
    (Path(other.path) / "mlflow.db").write_bytes(b"not a database" * 1000)
    assert "Using the local copy" in fetch("demo@candidate", other, tmp_path / "copies").note


# --- the ledger ---------------------------------------------------------------------------------------------------


def sql(storage, statement, *values):
    with sqlite3.connect(Path(storage.path) / "mlflow.db") as database:
        assert database.execute(statement, values).rowcount > 0


@pytest.fixture
def three_entries(local, tmp_path):
    publish(local, tmp_path)
    local.promote("demo", 1, because="first")
    local.record_looks("t" * 64, ["a" * 64])
    assert local.verify_ledger()
    return local


CHANGE = "UPDATE model_version_tags SET value = replace(value, ?, ?) WHERE name = 'portaisys-ledger' AND version = ? AND key = ?"


def test_the_ledger_says_who_did_what_when_and_why(three_entries):
    assert three_entries.ledger()[0].previous == ""
    assert [entry.event for entry in three_entries.ledger()] == ["publish", "promote", "look"]
    promotion = three_entries.ledger("demo")[1]
    assert (promotion.name, promotion.version, promotion.because) == ("demo", 1, "first")
    assert promotion.who.endswith(f"@{socket.gethostname()}")
    assert promotion.when.startswith("20") and promotion.when.endswith("Z")


def test_a_changed_entry_is_found(three_entries, storage):
    sql(storage, CHANGE, "first", "forged", 2, "entry")
    with pytest.raises(UserError, match=r"^ledger: entry 2 was changed\. "):
        three_entries.verify_ledger()


def test_a_changed_entry_with_its_hash_changed_too_is_found(three_entries, storage):
    sql(storage, CHANGE, "first", "forged", 2, "entry")
    sql(storage, "UPDATE model_version_tags SET value = ? WHERE name = 'portaisys-ledger' AND version = 2 AND key = 'sha256'", "0" * 64)
    with pytest.raises(UserError, match=r"the entry before 3 was changed or removed"):
        three_entries.verify_ledger()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_removed_entry_is_found(three_entries, number):
    three_entries.client.delete_model_version(registry.LEDGER, str(number))
    with pytest.raises(UserError, match=rf"entry {number} was removed" if number < 3 else "last entry was removed"):
        three_entries.verify_ledger()


def test_an_unreadable_entry_is_found_and_does_not_stop_a_rollback(local, storage, tmp_path):
    for content in "12":
        local.promote("demo", publish(local, tmp_path, content).version)
    sql(storage, CHANGE, "{", "", 3, "entry")
    reopened = registry.open_registry(storage)
    with pytest.raises(UserError, match=r"entry 3 is not readable"):
        reopened.verify_ledger()
    assert reopened.rollback("demo").version == 1


def test_looks_at_the_test_split_count_candidates_once(local):
    assert local.record_looks("t" * 64, ["a" * 64, "b" * 64, "a" * 64]) == 2
    assert local.record_looks("t" * 64, ["b" * 64]) == 2
    assert local.record_looks("t" * 64, ["c" * 64, "a" * 64]) == 3
    assert local.record_looks("u" * 64, ["a" * 64]) == 1
    assert (local.looks("t" * 64), local.looks("v" * 64)) == (3, 0)
    assert local.ledger("t" * 64)[-1].details == {"candidates": ["c" * 64], "reused": ["a" * 64]}


PUBLISHER = """
import sys
from pathlib import Path
from portaisys import registry
from portaisys.spec import Storage
opened = registry.open_registry(Storage(path=sys.argv[1]))
run_id = opened.log_run("demo", {}, {}, {}, {})
print("ready", flush=True)
sys.stdin.readline()
for folder in sys.argv[2:]:
    opened.publish("demo", Path(folder), run_id, {}, {"action": "pass", "because": "within the margin"})
"""


def test_two_processes_publishing_at_once_make_one_version_an_artifact(local, storage, tmp_path):
    folders = [make(tmp_path / f"artifact-{content}", content) for content in "abcd"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", PUBLISHER, storage.path, *map(str, folders)], **pipes)
    run_id = local.log_run("demo", {}, {}, {}, {})
    assert other.stdout.readline() == "ready\n"
    other.stdin.write("go\n")
    other.stdin.flush()
    for folder in folders:
        local.publish("demo", folder, run_id, {}, PASS)
    assert (*other.communicate(timeout=60), other.returncode) == ("", "", 0)  # and MLflow was silent
    assert [version.version for version in local.versions("demo")] == [1, 2, 3, 4]
    assert [entry.event for entry in local.ledger()] == ["publish"] * 4
    assert local.verify_ledger()


# --- against a server ---------------------------------------------------------------------------------------------


class Server:
    """An `mlflow server` of our own, on a free port."""

    def __init__(self, folder, database):
        self.folder, self.process = folder, None
        shutil.copy(database, folder)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.uri = f"http://127.0.0.1:{free.getsockname()[1]}"

    def start(self):
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", self.uri.rpartition(":")[2], "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", str(self.folder / "files"),
        ]  # fmt: skip
        # Job execution is nine more processes and 20 s of start-up on two cores; the registry uses none of it.
        env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        env.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        deadline = time.monotonic() + 60
        while not self._healthy():
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def _healthy(self):
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # the session it leads: itself and its worker
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def one_server(tmp_path_factory, empty_database):
    server = Server(tmp_path_factory.mktemp("server"), empty_database)
    yield server
    server.kill()


@pytest.fixture
def server(one_server, monkeypatch):
    """The module's server, running, whatever the test before did to it."""
    if one_server.process is None:
        one_server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_server.uri)
    return one_server


def test_a_server_takes_a_version_from_publication_to_rollback(server, tmp_path):
    storage = Storage(path=str(tmp_path / "runs"), cache=str(tmp_path / "cache"))
    remote = registry.open_registry(storage)
    for content in "12":
        remote.promote("life", publish(remote, tmp_path, content, name="life").version, because="better")
    assert remote.rollback("life", because="worse").version == 1
    fetched = fetch("life@production", storage, tmp_path / "copies")
    assert (fetched.version.version, fetched.from_cache) == (1, False)
    with pytest.raises(UserError, match=r"has no alias 'nope'; it has candidate, production"):
        remote.resolve("life@nope")
    assert remote.verify_ledger()
    assert not (tmp_path / "runs").exists()


def test_writers_that_share_no_lock_keep_one_chain(server, tmp_path):
    hosts = [registry.Registry(server.uri, "", tmp_path / f"lock-{host}") for host in range(3)]
    split = "race" * 16
    together = threading.Barrier(3)

    def look(host):
        together.wait()
        return [hosts[host].record_looks(split, [f"{host}-{number}"]) for number in range(5)]

    with ThreadPoolExecutor(3) as pool:
        counts = [count for host in pool.map(look, range(3)) for count in host]
    assert max(counts) == 15
    assert len(hosts[0].ledger(split)) == 15
    assert hosts[0].verify_ledger() == hosts[1].verify_ledger()


def test_publishers_that_share_no_lock_make_one_version_an_artifact(server, tmp_path):
    folder = make(tmp_path / "artifact", "same")
    hosts = [registry.Registry(server.uri, "", tmp_path / f"lock-{host}") for host in range(3)]
    runs = [host.log_run("shared", {}, {}, {}, {}) for host in hosts]
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda host: host[0].publish("shared", folder, host[1], {}, PASS), zip(hosts, runs, strict=True)))
    assert {version.version for version in made} == {version.version for version in hosts[0].versions("shared")}
    assert len(hosts[0].versions("shared")) == 1
    assert [entry.event for entry in hosts[0].ledger("shared")] == ["publish"]


def test_serving_starts_from_its_copy_when_the_server_dies(server, tmp_path, caplog):
    storage = Storage(path=str(tmp_path / "runs"), cache=str(tmp_path / "cache"))
    version = publish(registry.open_registry(storage), tmp_path, "dying", name="dying")
    fetch("dying@candidate", storage, tmp_path / "copies")
    server.kill()
    started = time.monotonic()
    fetched = fetch("dying@candidate", storage, tmp_path / "copies")
    assert time.monotonic() - started < 20
    assert (fetched.version, fetched.from_cache) == (version, True)
    assert "not reachable" in fetched.note and fetched.note in caplog.text
    with pytest.raises(UserError, match=r"dying@1: .*not reachable.*there is no local copy"):
        fetch("dying@1", storage, tmp_path / "copies")


def test_a_password_in_the_address_is_not_repeated(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(registry.UnreachableError) as refused:
        registry.open_registry(spec.Storage(cache=str(tmp_path))).resolve("demo@production")
    assert "hunter2" not in str(refused.value) and f"127.0.0.1:{port}" in str(refused.value)
