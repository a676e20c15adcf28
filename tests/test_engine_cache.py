"""The engine cache: one build a key, nothing stale, nothing foreign, nothing damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import free_port
from filelock import FileLock
from onnx import numpy_helper
from onnx_graphs import cnn, rows

from portaisys import artifact, engine, store
from portaisys.cli import main
from portaisys.engine import CannotExecute, Options, cache
from portaisys.engine import onnxruntime as cpu
from portaisys.engine.cache import Cache, get_or_build, load
from portaisys.spec import UserError

FP32 = Options("fp32")


@pytest.fixture
def source(tmp_path):
    return cnn(tmp_path / "cnn.onnx")


@pytest.fixture
def build(source, tmp_path):
    return lambda options=FP32, onnx=source, backend="onnxruntime": get_or_build(onnx, backend, options, Cache(tmp_path / "cache"))


def test_the_second_time_the_engine_is_there(build):
    first, second = build(), build()
    assert (first.reused, second.reused) == (False, True)
    assert (first.path, first.key, first.sha256, first.build_s) == (second.path, second.key, second.sha256, second.build_s)
    assert (first.backend, first.precision, first.device, first.notes) == ("onnxruntime", "fp32", cpu.device(), ())


def test_the_cached_engine_answers(build, source):
    build()
    loaded, direct = load(build(), FP32), cpu.load(source, FP32)
    np.testing.assert_array_equal(*loaded.run({"x": rows(3)}).values(), *direct.run({"x": rows(3)}).values())


def test_notes_of_the_build_are_told_again_when_it_is_reused(build):
    first = build(backend="tensorrt")
    assert first.notes == build(backend="tensorrt").notes
    if first.device == "none":
        assert "no GPU here" in first.notes[0]
        with pytest.raises(CannotExecute):
            load(first, FP32)


def test_a_model_changed_by_one_weight_is_built_anew(build, source):
    first = build()
    model = onnx.load(source)
    weights = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weights.flat[0] = np.nextafter(weights.flat[0], np.float32(9))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, model.graph.initializer[0].name))
    onnx.save(model, source)
    second = build()
    assert not second.reused
    assert second.key != first.key
    assert first.path.exists()


def test_every_option_that_decides_the_file_is_in_the_key_and_the_threads_are_not(build):
    keys = {build(options).key for options in (FP32, Options(opt_batch=4), Options(max_batch=32))}
    assert len(keys) == 3
    assert build(Options(threads=2)).reused


@pytest.mark.parametrize("name", ["version", "device"])
def test_another_library_or_device_is_another_key(build, monkeypatch, name):
    first = build()
    monkeypatch.setattr(cpu, name, lambda: "other")
    assert build().key != first.key


# --- what must never be loaded ------------------------------------------------------------------------------------


def test_a_damaged_engine_is_built_again_and_noted(build):
    first = build()
    first.path.write_bytes(first.path.read_bytes()[:-1] + b"?")
    second = build()
    assert not second.reused
    assert second.sha256 == first.sha256 == artifact.hash_file(second.path)
    assert "the cached engine was not used, and built again: " in second.notes[0]
    assert "engine differs from its manifest" in second.notes[0]
    assert build().notes == ()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_an_engine_without_sound_metadata_is_built_again(build, content):
    manifest = build().path.with_name("manifest.json")
    manifest.unlink() if content is None else manifest.write_text(content)
    second = build()
    assert not second.reused
    assert "built again" in second.notes[0]


def test_an_entry_put_under_another_key_is_not_used(build, source, tmp_path):
    mine, foreign = build(), build(onnx=cnn(tmp_path / "other.onnx", seed=5))
    for path in foreign.path.parent.iterdir():
        mine.path.with_name(path.name).write_bytes(path.read_bytes())
    again = build()
    assert not again.reused
    assert again.sha256 == mine.sha256
    assert "holds an entry of another key" in again.notes[0]


def test_a_file_in_the_place_of_an_entry_is_replaced(build):
    first = build()
    shutil.rmtree(first.path.parent)
    first.path.parent.write_text("no entry")
    second = build()
    assert not second.reused
    assert second.path == first.path
    assert build().reused


def test_an_entry_that_names_another_hash_than_its_bytes_is_not_used(build):
    first = build()
    manifest = first.path.with_name("manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": {"engine": "0" * 64}}))
    assert not build().reused


def test_a_file_that_changed_after_it_was_found_is_not_loaded(build):
    built = build()
    built.path.write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the file that was built"):
        load(built, FP32)


# --- what is refused ----------------------------------------------------------------------------------------------


# --- size and soundness of the folder -------------------------------------------------------------------------------


def test_beyond_its_bound_the_cache_loses_what_was_used_longest_ago(source, tmp_path):
    folder = tmp_path / "cache"
    built = [get_or_build(source, "onnxruntime", Options("fp32", max_batch=size), Cache(folder)) for size in (8, 16, 32)]
    for age, one in zip((30, 20, 10), built, strict=True):
        os.utime(folder / one.key, (time.time() - age,) * 2)
    get_or_build(source, "onnxruntime", Options("fp32", max_batch=8), Cache(folder))  # used again: now the second is the oldest
    assert [entry.key for entry in cache.entries(folder)] == [built[0].key, built[2].key, built[1].key]
    each = cache.entries(folder)[0].size_bytes
    last = get_or_build(source, "onnxruntime", Options("fp32", max_batch=64), Cache(folder, max_bytes=int(2.5 * each)))
    assert {entry.key for entry in cache.entries(folder)} == {built[0].key, last.key}
    assert {entry.key for entry in cache.prune(folder, 0)} == {built[0].key, last.key} and cache.entries(folder) == []


def test_what_is_being_built_is_not_pruned_and_the_newest_stays_however_small_the_bound(build, source, tmp_path):
    first = build()
    with FileLock(tmp_path / "cache" / f"{first.key}.lock"):
        assert cache.prune(tmp_path / "cache", 0) == []
    second = get_or_build(source, "onnxruntime", Options("fp32", max_batch=16), Cache(tmp_path / "cache", max_bytes=1))
    assert [entry.key for entry in cache.entries(tmp_path / "cache")] == [second.key]


def test_an_engine_of_a_folder_that_cannot_be_written_is_used(build, source, tmp_path, monkeypatch):
    first = build()

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    for target, name in ((cache, "FileLock"), (os, "utime")):
        monkeypatch.setattr(target, name, refuse)
    assert build().path == first.path
    with pytest.raises(UserError, match=r"storage\.cache: .* cannot be written \(Read-only file system\)"):
        build(Options("fp32", max_batch=16))


def test_the_command_lists_verifies_and_prunes(build, tmp_path, capsys):
    folder = tmp_path / "home"
    built = get_or_build(tmp_path / "cnn.onnx", "onnxruntime", FP32, Cache(folder / "engines"))
    assert main(["cache", "list", "--cache", str(folder)]) == 0
    assert built.key[:12] in (said := capsys.readouterr().out) and "1 engines" in said
    built.path.write_bytes(built.path.read_bytes()[:-1])
    assert main(["cache", "verify", "--cache", str(folder)]) == 0
    assert f"removed {built.key[:12]}" in (said := capsys.readouterr().out) and "differs from its manifest" in said and "0 engines" in said
    assert main(["cache", "prune", "--max-gib", "0", "--cache", str(folder)]) == 0
    assert main(["cache", "prune", "--max-gib", "-1", "--cache", str(folder)]) == 2
    assert main(["cache", "list", "--cache", str(tmp_path / "nowhere")]) == 2


def test_an_unknown_backend_is_refused(build):
    with pytest.raises(UserError, match=r"engine\.backend: 'tvm' is not one of onnxruntime, openvino, tensorrt"):
        build(backend="tvm")


def test_a_precision_the_backend_lacks_is_refused(build):
    with pytest.raises(UserError, match=r"engine\.precisions: 'int4' is not one of fp32, tf32, fp16, bf16, int8, fp8, which backend 'tensorrt' has"):
        build(Options("int4"), backend="tensorrt")


def test_a_missing_library_leaves_no_entry(build, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UserError, match=r"portaisys\[tensorrt-rtx\]"):
        build(backend="tensorrt")
    assert not (tmp_path / "cache").exists()


def test_a_failed_build_leaves_no_entry(build, source, tmp_path):
    source.write_bytes(source.read_bytes()[:5000])
    with pytest.raises(UserError, match="not an ONNX file, or a damaged one"):
        build()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_missing_onnx_file_is_named(build, tmp_path):
    with pytest.raises(UserError, match=r"none\.onnx: cannot be read"):
        build(onnx=tmp_path / "none.onnx")


def test_a_cache_folder_that_cannot_be_written_is_named(build, tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    with pytest.raises(UserError, match=r"storage\.cache: .*cache cannot be written"):
        build()


# --- several processes ----------------------------------------------------------------------------------------------

CODE = """
import sys, time
from pathlib import Path
from portaisys.engine import Options, tensorrt
from portaisys.engine.cache import Cache, get_or_build
here, number = Path(sys.argv[1]), sys.argv[2]
slow = tensorrt.build
tensorrt.build = lambda *given: (time.sleep(float(sys.argv[3])), slow(*given))[1]
(here / f"ready{number}").touch()
while not (here / "go").exists():
    time.sleep(0.005)
print(get_or_build(here / "cnn.onnx", "tensorrt", Options(), Cache(here / "cache")).reused)
"""


def _asks(folder, number, build_s):
    return subprocess.Popen([sys.executable, "-c", CODE, str(folder), str(number), str(build_s)], stdout=subprocess.PIPE, text=True)


def _wait(path):
    deadline = time.monotonic() + 60
    while not list(path.parent.glob(path.name)):
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


def test_four_processes_that_ask_at_once_make_one_build(source, tmp_path):
    asking = [_asks(tmp_path, number, 0.5) for number in range(4)]
    for number in range(4):
        _wait(tmp_path / f"ready{number}")
    (tmp_path / "go").touch()
    answers = [process.communicate(timeout=60)[0].strip() for process in asking]
    assert [process.returncode for process in asking] == [0] * 4
    assert sorted(answers) == ["False", "True", "True", "True"]


def test_a_killed_builder_frees_the_way_and_leaves_no_rubbish(source, tmp_path):
    (tmp_path / "go").touch()
    builder = _asks(tmp_path, 0, 60)
    _wait(tmp_path / "cache" / ".*")  # its draft
    os.kill(builder.pid, signal.SIGKILL)
    builder.wait()
    built = get_or_build(source, "tensorrt", FP32, Cache(tmp_path / "cache"))
    assert not built.reused
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {built.key, f"{built.key}.lock"}


def test_a_builder_that_hangs_is_not_waited_for_for_ever(build, source, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WAIT_S", 0.2)
    (tmp_path / "go").touch()
    builder = _asks(tmp_path, 0, 60)
    try:
        _wait(tmp_path / "cache" / ".*")
        with pytest.raises(UserError, match=r"another process has been building this engine for 0\.2 s"):
            build(backend="tensorrt")
    finally:
        builder.kill()
        builder.wait()


def test_the_key_covers_the_code_that_builds(build, monkeypatch, tmp_path):
    first = build()
    changed = tmp_path / "onnxruntime.py"
    changed.write_text(Path(cpu.__file__).read_text() + "# changed\n")
    monkeypatch.setattr(engine.backend("onnxruntime"), "__file__", str(changed))
    assert build().key != first.key


# --- several machines -----------------------------------------------------------------------------------------------


@pytest.fixture
def machines(source, there, tmp_path):
    """Two machines' caches in front of one store; and the store's folder on its server's disk."""
    shared = f"s3://bucket/{tmp_path.name}/engines"
    return [Cache(tmp_path / name, shared=shared) for name in ("one", "two")], there / "engines"


def test_what_one_machine_built_the_next_finds_in_the_store(source, machines):
    (one, two), there = machines
    first, second = (get_or_build(source, "onnxruntime", FP32, cache) for cache in (one, two))
    assert (first.reused, second.reused, first.sha256) == (False, True, second.sha256) and second.path != first.path
    assert {path.name for path in there.iterdir()} == {first.key}  # no claim is left behind
    np.testing.assert_array_equal(*(next(iter(load(built, FP32).run({"x": rows(2)}).values())) for built in (first, second)))


def test_a_damaged_engine_of_the_store_is_built_again_and_put_right(source, machines, tmp_path):
    (one, two), there = machines
    first = get_or_build(source, "onnxruntime", FP32, one)
    engine_file = there / first.key / "engine"
    engine_file.write_bytes(engine_file.read_bytes()[:-1] + b"?")
    second = get_or_build(source, "onnxruntime", FP32, two)
    assert not second.reused and second.sha256 == first.sha256 == artifact.hash_file(engine_file)


def test_while_another_machine_builds_this_one_waits_and_takes_what_came_of_it(source, machines, monkeypatch):
    (one, two), _ = machines
    key, looked = get_or_build(source, "onnxruntime", FP32, Cache(two.folder)).key, []
    shutil.rmtree(two.folder)
    assert store.claim(f"{one.shared}/{key}.claim", "another machine")

    def finished(seconds):  # the other machine is done while this one waits
        looked.append(seconds)
        if len(looked) == 2:
            store.push(get_or_build(source, "onnxruntime", FP32, Cache(one.folder)).path.parent, f"{one.shared}/{key}")

    monkeypatch.setattr(cache.time, "sleep", finished)
    assert get_or_build(source, "onnxruntime", FP32, two).reused and len(looked) == 2


def test_the_claim_of_a_machine_that_died_is_taken_over(source, machines, monkeypatch):
    (one, two), there = machines
    key = get_or_build(source, "onnxruntime", FP32, Cache(two.folder)).key
    assert store.claim(f"{one.shared}/{key}.claim", "dead") and not store.claim(f"{one.shared}/{key}.claim", "late")
    monkeypatch.setattr(cache, "CLAIM_S", -1.0)
    assert not get_or_build(source, "onnxruntime", FP32, one).reused and (there / key / "engine").exists()


def test_without_the_store_the_engine_is_built_here_and_the_notes_say_so(source, tmp_path, there, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    built = get_or_build(source, "onnxruntime", FP32, Cache(tmp_path / "cache", shared="s3://bucket/engines"))
    assert not built.reused and "the shared cache was not used: " in built.notes[0]


# --- what is remembered ---------------------------------------------------------------------------------------------


def test_a_file_that_lies_untouched_is_hashed_once_and_one_that_changed_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED_S", -1.0)  # as if the file had lain there for long
    hashed = []
    real = artifact.hash_file
    monkeypatch.setattr(artifact, "hash_file", lambda path: hashed.append(path) or real(path))
    first = cache.digest_of(source, tmp_path / "memory")
    assert cache.digest_of(source, tmp_path / "memory") == first and len(hashed) == 1
    data, about = bytearray(source.read_bytes()), source.stat()
    data[-1] ^= 1
    source.write_bytes(data)
    os.utime(source, ns=(about.st_atime_ns, about.st_mtime_ns))  # who sets the time back does not deceive it
    assert cache.digest_of(source, tmp_path / "memory") == real(source) != first


def test_a_file_that_was_just_written_is_not_remembered(source, tmp_path):
    cache.digest_of(source, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("backend", ["openvino", "tensorrt"])
def test_a_damaged_engine_of_any_backend_is_built_again(build, backend):
    first = build(backend=backend)
    damaged = bytearray(first.path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    first.path.write_bytes(damaged)
    second = build(backend=backend)
    assert not second.reused and "engine differs from its manifest" in second.notes[0] and artifact.hash_file(second.path) == second.sha256


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_under_the_cache_is_said_and_leaves_what_was_there(source, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        small = cnn(tmp_path / "small.onnx", width=4)
        first = get_or_build(small, "onnxruntime", FP32, Cache(disk / "cache"))
        assert source.stat().st_size < 400_000
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
        with pytest.raises(UserError, match=r"storage\.cache: .* cannot be written \(No space left on device\)"):
            get_or_build(source, "onnxruntime", FP32, Cache(disk / "cache"))
        again = get_or_build(small, "onnxruntime", FP32, Cache(disk / "cache"))
        assert again.reused and load(again, FP32).run({"x": rows(2)})
        assert [path.name for path in (disk / "cache").iterdir() if path.name.startswith(f".{first.key[:4]}")] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
