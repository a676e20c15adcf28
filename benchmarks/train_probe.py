"""What the benchmarks of distributed training share: a model that notes its steps, a cluster of their own, and the CPU time of processes.

A residual CNN writes, as each training pass begins, a record into `FOLDER/RANK-PID`: the time (of the monotonic clock, which all processes
of a machine share), the CPU seconds its process has used, which step it is, and which rows it was given. The step is the count of the first batch norm, which a checkpoint holds,
so a step that is repeated after a restart has its old number. Rows are known by a second channel of the pictures that holds their number.
So what is noted is what a worker computed on, whoever started it, and no part of the platform has to know.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from portaisys import spec
from portaisys.models.convnet import convnet

ROOT = Path(__file__).parents[1]
CLUSTER_CPUS = 3  # two workers, and one to spare: the driver and the controllers take none
OTHER_CPUS = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


# --- the model, imported by workers -----------------------------------------------------------------------------------


class Probed(nn.Module):
    """`net` of one channel, and a note of each training pass. `rows`: how many it is given, of which channel 1 holds the number; 0: there is no such channel.

    `mean`, `std`: that channel's, by which it is normalised before it gets here.
    """

    def __init__(self, net: nn.Sequential, folder: str, rows: int, mean: float, std: float) -> None:
        super().__init__()
        self.net, self.folder, self.rows, self.mean, self.std = net, Path(folder), rows, mean, std
        self.file = -1

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.training:
            self._note(x_BCHW)
        logits: Tensor = self.net(x_BCHW[:, :1] if self.rows else x_BCHW)
        return logits

    def _note(self, x_BCHW: Tensor) -> None:
        record = np.zeros((), record_of(self.rows))
        record["at"], record["cpu"], record["step"] = time.monotonic(), time.process_time(), int(self.net[1].num_batches_tracked)
        if self.rows:
            record["rows"] = (x_BCHW[:, 1, 0, 0].double() * self.std + self.mean).round().numpy()
        if self.file < 0:
            rank = dist.get_rank() if dist.is_initialized() else 0
            self.file = os.open(self.folder / f"{rank}-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self.file, record.tobytes())


def probed(channels: Sequence[int], shape: Sequence[int], classes: int, folder: str, rows: int = 0, mean: float = 0.0, std: float = 1.0) -> Probed:
    """The factory that a spec names: a convnet of one block a stage."""
    net = convnet(spec.ConvNet(channels=tuple(channels), blocks=(1,) * len(channels)), tuple(shape), classes)
    assert isinstance(net, nn.Sequential)
    return Probed(net, folder, rows, mean, std)


# --- reading what it wrote --------------------------------------------------------------------------------------------


def record_of(rows: int) -> np.dtype[Any]:
    return np.dtype([("at", "f8"), ("cpu", "f8"), ("step", "i8"), ("rows", "i4", (rows,))])


def passes(folder: Path, rank: int, rows: int = 0) -> np.ndarray:
    """The training passes of a rank, through all its processes, in order of time: records of `at` and `cpu` in seconds, `step`, `rows`. A torn last one is none."""
    found = [np.fromfile(file, record_of(rows)) for file in folder.glob(f"{rank}-*")]
    return np.sort(np.concatenate(found), order="at") if found else np.empty(0, record_of(rows))


def begun(folder: Path, rank: int = 0, rows: int = 0) -> tuple[int, int, float]:
    """Of the last pass of a rank: its process, its step and its time; (0, -1, 0.0) before there is one."""
    files = [(file.stat().st_mtime_ns, file) for file in folder.glob(f"{rank}-*")]
    if not files:
        return 0, -1, 0.0
    _, file = max(files)
    record, size = np.dtype(record_of(rows)), file.stat().st_size
    if size < record.itemsize:
        return 0, -1, 0.0
    last = np.fromfile(file, record, 1, offset=(size // record.itemsize - 1) * record.itemsize)[0]
    return int(file.name.partition("-")[2]), int(last["step"]), float(last["at"])


# --- running ----------------------------------------------------------------------------------------------------------


def write_spec(path: Path, *, data: Mapping[str, Any], model: Mapping[str, Any], train: Mapping[str, Any]) -> Path:
    """A spec of two workers of one thread; `model`: options of `probed`, which has its notes in path.parent / "passes"."""
    (path.parent / "passes").mkdir(parents=True)
    tree = {
        "name": "bench",
        "data": dict(data),
        "model": {"name": "factory", "factory": "train_probe:probed", "options": {**model, "folder": str(path.parent / "passes")}},
        "train": {"num_workers": 2, "cpus_per_worker": 1, **train},
        "storage": {"path": str(path.parent / "runs"), "cache": str(path.parent / "cache")},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def command(*words: str | Path, log: Path) -> subprocess.Popen[bytes]:
    """`python WORDS`, its output in a file."""
    with log.open("wb") as stream:
        return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)


def ended(process: subprocess.Popen[bytes], log: Path, each: Callable[[], None] = lambda: None, every_s: float = 0.2, limit_s: float = 3600) -> None:
    """Wait for a command, calling `each` meanwhile. Raises RuntimeError with the end of its output when it fails or takes too long."""
    deadline = time.monotonic() + limit_s
    try:
        while process.poll() is None and time.monotonic() < deadline:
            each()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(every_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{' '.join(process.args)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")  # type: ignore[arg-type]


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """A Ray cluster with its dashboard, of which this process is the handle; commands find it by RAY_ADDRESS, its workers this file by PYTHONPATH."""
    import ray

    temp = tempfile.TemporaryDirectory(prefix="train", dir="/tmp", ignore_cleanup_errors=True)  # Ray's sockets need a short path
    before = dict(os.environ)
    os.environ.pop("RAY_ADDRESS", None)
    paths = [str(ROOT / "platform"), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {**OTHER_CPUS, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        told = ray.init(address="local", num_cpus=CLUSTER_CPUS, include_dashboard=True, log_to_driver=False, _temp_dir=temp.name)
        os.environ["RAY_ADDRESS"] = told.address_info["gcs_address"]
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{told.dashboard_url}"
        yield
    finally:
        ray.shutdown()
        temp.cleanup()
        os.environ.clear()
        os.environ.update(before)


# --- processes ----------------------------------------------------------------------------------------------------------


def processes() -> dict[int, tuple[int, str, float]]:
    """Parent, command line and CPU seconds so far of every process there is (proc(5))."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # it ended meanwhile
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found[int(folder.name)] = int(fields[1]), name, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def below(found: Mapping[int, tuple[int, str, float]], root: int) -> set[int]:
    """All descendants of a process, without it."""
    level, everyone = {root}, set[int]()
    while level:
        level = {pid for pid, (parent, _, _) in found.items() if parent in level}
        everyone |= level
    return everyone


def daemons(without: int) -> dict[int, tuple[str, float]]:
    """Name and CPU seconds of Ray's own processes below this one: all but its training workers and what the command of pid `without` started."""
    found = processes()
    mine = below(found, os.getpid()) - below(found, without) - {without}
    return {pid: found[pid][1:] for pid in mine if "RayTrainWorker" not in found[pid][1]}
