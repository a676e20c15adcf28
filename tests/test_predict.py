"""Offline batch inference: every row answered once, as the engine answers it, also when the job was killed in between."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from test_serve import offline_answers
from test_serving_alone import LABELS, make_version, publish, storage_in

from portaisys.serve.predict import predict, read_rows
from portaisys.spec import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    storage = storage_in(folder)
    version = make_version(folder / "version", storage.cache_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        publish(version, storage)
        yield version, storage


def rows_file(folder, rows=20, **changes):
    x = np.random.default_rng(0).normal(size=(rows, 8, 8)).astype(np.float32)
    np.savez(folder / "rows.npz", **({"x": x} | changes))
    return folder / "rows.npz"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": np.zeros((4, 7, 8), np.float32)}, r"rows have shape \[7, 8\], digits takes \[8, 8\]"),
        ({"x": np.where(np.arange(640).reshape(10, 8, 8) == 130, np.nan, 0)}, r"1 rows hold NaN or infinity, the first are \[2\]"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_any_cluster(published, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        predict("digits@production", rows_file(tmp_path, **changes), tmp_path / "out", published[1])
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_named(published, tmp_path):
    with pytest.raises(UserError, match=r"has no array 'y'; it has x \(--key\)"):
        predict("digits@production", rows_file(tmp_path), tmp_path / "out", published[1], key="y")
    with pytest.raises(UserError, match="No such file"):
        predict("digits@production", tmp_path / "none.npz", tmp_path / "out", published[1])
    with pytest.raises(UserError, match="rows are read from"):
        predict("digits@production", tmp_path / "rows.csv", tmp_path / "out", published[1])
    with pytest.raises(UserError, match="digits"):
        predict("digits@9", rows_file(tmp_path), tmp_path / "out", published[1])


def test_parquet_holds_rows_as_lists(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    pyarrow.parquet.write_table(pa.table({"x": x.tolist(), "id": [1, 2, 3]}), tmp_path / "rows.parquet")
    np.testing.assert_array_equal(read_rows(tmp_path / "rows.parquet", "x"), x)


def command(storage, source, out, *more):
    arguments = ["digits@production", source, out, "--storage", storage.path, *more]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")} | {"HOME": str(Path(storage.path).parent)}
    return [sys.executable, str(ROOT / "jobs/predict.py"), *map(str, arguments)], environment


def answers(out):
    return pa.concat_tables([pyarrow.parquet.read_table(path) for path in sorted(out.glob("part-*.parquet"))])


@pytest.mark.cluster
def test_100_000_rows_are_answered_once_each_also_after_a_kill(published, tmp_path):
    version, storage = published
    source, out = rows_file(tmp_path, rows=100_000), tmp_path / "out"
    argv, environment = command(storage, source, out, "--rows-per-part", 2000)
    first = subprocess.Popen(argv, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("part-*.parquet"))) < 3:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    second = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stderr[-3000:]
    said = re.search(r"100,000 rows, (\d+) of 50 parts were there, ([\d,]+) rows/s", second.stdout)
    assert said and 3 <= int(said[1]) <= 50 and int(said[2].replace(",", "")) > 0
    finished = {name: when for name, when in before.items() if (out / name).stat().st_mtime_ns == when}
    assert len(finished) == len(before)
    found = answers(out)
    assert found["row"].to_pylist() == list(range(100_000))
    logits = np.array(found["logits"].combine_chunks().flatten()).reshape(-1, 10)
    sample = np.random.default_rng(1).integers(0, 100_000, 2000)
    expected = offline_answers(version, storage.cache_dir, "int8", read_rows(source, "x")[sample])
    np.testing.assert_allclose(logits[sample], expected, atol=1e-5)
    assert (logits[sample].argmax(1) == expected.argmax(1)).all()
    assert found["label"].to_pylist()[:5] == [LABELS[index] for index in logits[:5].argmax(1)]
    # Nothing is left to do, and other rows do not mix with these.
    assert "50 of 50 parts were there" in subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=240).stdout
    other, _ = command(storage, rows_file(tmp_path / "..", rows=10), out, "--rows-per-part", 2000)
    refused = subprocess.run(other, env=environment, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "holds answers of another job (source_key, rows differ)" in refused.stderr
