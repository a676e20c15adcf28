"""What interrupts training, without Ray: a signal to leave, rows that cannot be loaded, a group that stands still, and what is kept of it all."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import free_port, until
from test_train_ranks import Net, group

from portaisys import artifact, checkpoint, cluster, data, distributed, metrics, spec, store
from portaisys.checkpoint import Writer
from portaisys.data import Split
from portaisys.distributed import Place
from portaisys.fits import kept_notes
from portaisys.spec import Stopped, UserError
from portaisys.train import fit
from portaisys.watch import Watch, Word, blame

ROOT = Path(__file__).parents[1]


# --- asked to leave -----------------------------------------------------------------------------------------------


def command(folder, *overrides):
    return [
        sys.executable, "-m", "portaisys.cli", "train", str(ROOT / "jobs/specs/digits.yaml"), "train.num_workers=0", "train.epochs=20", "model.channels=[8]", "model.blocks=[1]",
        "compress=[]", "engine.also_build=[]", "train.checkpoint_every_steps=100000", f"storage.path={folder / 'runs'}", f"storage.cache={folder / 'cache'}", *overrides,
    ]  # fmt: skip


def test_sigterm_lets_the_step_end_writes_a_checkpoint_and_the_same_command_goes_on_to_the_same_bits(tmp_path):
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: [*tmp_path.glob("runs/digits/logs/*.jsonl")], process, 120)  # written after the first epoch
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    step = checkpoint.steps(tmp_path / "runs/digits/train.work")
    assert process.returncode == 143 and f"stopped as asked; the same command goes on from step {step}" in said and step % 100000
    again = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=300)
    whole = subprocess.run(command(tmp_path / "whole"), capture_output=True, text=True, timeout=300)
    assert again.returncode == whole.returncode == 0 and f"goes on from step {step}" in again.stdout, again.stderr
    made, undisturbed = (artifact.read(folder / "runs/digits/train") for folder in (tmp_path, tmp_path / "whole"))
    assert made.digest == undisturbed.digest
    assert made.notes == (f"trained in 2 attempts: from step 0 with 1 worker, from step {step} with 1 worker",) and undisturbed.notes == ()


SLEEPER = "from portaisys.watch import notice\nwith notice() as asked:\n    print('ready', flush=True)\n    while not asked(): pass\n    print('asked', flush=True)\n    while True: pass\n"


def test_a_second_sigterm_ends_at_once():
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for word in ("ready", "asked"):
        assert process.stdout.readline() == f"{word}\n"
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM


NOTICED = """
import os, signal, threading
from portaisys.watch import notice
before = signal.getsignal(signal.SIGTERM)
with notice() as asked:
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked() and signal.getsignal(signal.SIGTERM) is before
assert signal.getsignal(signal.SIGTERM) is before
heard = []
thread = threading.Thread(target=lambda: heard.append(notice().__enter__()()))
thread.start()
thread.join()
assert heard == [False]
"""


def test_a_notice_is_forgotten_after_its_block_and_other_threads_are_asked_nothing():
    """In a process of its own: what other tests have loaded into this one may not bear the signal."""
    subprocess.run([sys.executable, "-c", NOTICED], check=True, timeout=60)


def left_and_resumed(rank, world, *, folder, ask_at):
    """Rank 1 is asked to leave in the middle of an epoch; both leave, go on, and say which rows they took."""
    digits = data.load(spec.Digits())
    options = spec.Train(epochs=3, batch_size=64, learning_rate=0.02, checkpoint_every_steps=1000)
    place, seen, steps = Place(rank, world, prepare=functools.partial(distributed.ddp, options=spec.Ddp())), [], []
    told = threading.Event()
    distributed.Agreed = functools.partial(distributed.Agreed, every_s=1e-3)  # the whole run takes less than a second

    def audit(step, rows):
        seen.append((step, rows.tolist()))
        if step == ask_at and rank == 1:
            told.set()

    while len(steps) < 3:
        model = Net()
        try:
            fit(model, digits.train, options, folder=folder, key="k", seed=1, audit=audit, leave=lambda: told.is_set() and not steps, report=lambda *told: dist.barrier(), place=place)
            break
        except Stopped as stopped:
            steps.append(stopped.step)
    return {"weights": {name: tensor.tolist() for name, tensor in model.state_dict().items()}, "rows": seen, "steps": steps}


def test_ranks_leave_after_the_same_step_though_one_was_asked_and_go_on_to_the_same_bits(tmp_path):
    ranks = group(2, tmp_path / "store", functools.partial(left_and_resumed, folder=tmp_path / "left", ask_at=16))
    whole = group(2, tmp_path / "store2", functools.partial(left_and_resumed, folder=tmp_path / "whole", ask_at=-1))
    (step,) = ranks[0]["steps"]
    assert ranks[1]["steps"] == [step] and step > 16 and whole[0]["steps"] == []
    assert [rank["rows"] for rank in ranks] == [rank["rows"] for rank in whole]
    assert ranks[0]["weights"] == ranks[1]["weights"] == whole[0]["weights"]


def agreed(rank, world):
    """How often ranks asked each other, and what they were told, over steps of next to no time and of long ones."""
    sums = []
    plain, distributed.total = distributed.total, lambda value: sums.append(1) or plain(value)
    short = distributed.Agreed(lambda: False, "cpu", every_s=1000.0)
    quick = [short.after(done) for done in range(1, 1001)]
    asked, seldom = len(sums), distributed.Agreed(lambda: rank == 1, "cpu", every_s=1e-9)
    return {"quick": any(quick), "asked": asked, "slow": seldom.after(1)}


def test_ranks_ask_each_other_seldom_when_steps_are_short_and_at_every_step_when_they_are_long(tmp_path):
    for rank in group(2, tmp_path / "store", agreed):
        assert rank == {"quick": False, "asked": 1, "slow": True}


# --- rows that cannot be loaded -----------------------------------------------------------------------------------


class Torn(Split):
    """Rows of which some cannot be read."""

    def take(self, rows):
        if 5 in rows:
            raise OSError("row 5 is torn\nand more")
        return super().take(rows)


def test_a_loader_that_raises_ends_with_the_step_and_the_cause_in_one_line(digits, tmp_path):
    torn = Torn(**{name: getattr(digits.train, name) for name in digits.train.__dataclass_fields__})
    marks = []
    with pytest.raises(UserError, match=r"^train: rows of step 2 could not be loaded: OSError: row 5 is torn$"):
        fit(Net(), torn, spec.Train(epochs=1), folder=tmp_path, key="k", batches=lambda epoch: [np.arange(6, 40), np.arange(6)], mark=lambda *said: marks.append(said))
    assert marks == [(-1, "loading"), (-1, "exchanging"), (0, "computing"), (0, "loading"), (0, "exchanging")]


# --- a group that stands still ------------------------------------------------------------------------------------


def test_the_rank_that_the_others_wait_for_is_named():
    def word(step, phase, moves=1):
        return Word(1, moves, step, phase, "node a")

    behind = {0: word(7, "computing"), 1: word(6, "loading"), 2: word(7, "computing")}
    assert blame(behind, set()) == "rank 1 (node a) is loading the rows of step 8, the others are computing step 8"
    assert blame(behind, {2}) == "rank 2 does not answer (node a; its last word: it is computing step 8)"
    assert blame({0: word(3, "computing"), 1: word(3, "computing")}, set()) == "every rank is computing step 4, and none is behind"
    assert blame(dict.fromkeys(range(5)), {0, 1, 2, 3, 4}).endswith("rank 2 does not answer and 2 more")


WORKER = """
import sys
import torch.distributed as dist
from datetime import timedelta
from portaisys.watch import Watch
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=60), wait_for_workers=False)
def hung(text):
    print(text, flush=True)
with Watch(store, rank, 2, 5.0, hung, f"process {rank}") as watch:
    watch.mark(4, "loading" if rank == 1 else "computing")
    print("ready", flush=True)
    for line in sys.stdin:
        watch.mark(4, "validating")
"""


@pytest.fixture
def two():
    """Two processes that watch each other and have stopped moving."""
    port = free_port()
    processes = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_ranks_that_all_wait_say_which_of_them_is_behind(two):
    for process in two:
        assert process.stdout.readline() == "no worker has moved for 5 s: rank 0 (process 0) is computing step 5, the others are loading the rows of step 6\n"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named_by_the_other_though_it_may_be_the_one_that_keeps_the_store(two, victim):
    os.kill(two[victim].pid, signal.SIGSTOP)
    said = two[1 - victim].stdout.readline()
    assert said.startswith(f"no worker has moved for 5 s: rank {victim} does not answer"), said


def test_a_rank_that_validates_for_long_is_not_taken_for_hung(tmp_path):
    """The other waits all the while for longer than the time-out; its watch is looked at while marks come."""
    store, hung = dist.HashStore(), threading.Event()
    with Watch(store, 0, 2, 3.0, lambda text: hung.set()) as waits, Watch(store, 1, 2, 3.0, lambda text: hung.set()) as busy:
        waits.mark(3, "reporting")
        for _ in range(50):
            busy.mark(3, "validating")
            assert not hung.wait(0.1)
        assert hung.wait(30)


# --- what is kept -------------------------------------------------------------------------------------------------


def test_notes_of_attempts_before_are_kept_once_each_and_another_keys_are_not(tmp_path):
    file = tmp_path / "notes.jsonl"
    for row in ({"from": 0, "world": 2}, {"note": "fell back"}, {"from": 3, "world": 1}, {"note": "fell back"}, {"note": "later"}):
        metrics.append(file, {"key": "k", **row})
    metrics.append(file, {"key": "other", "note": "not ours"})
    with file.open("a") as stream:
        stream.write('{"key": "k", "no')
    assert kept_notes(file, "k") == ["fell back", "later", "trained in 2 attempts: from step 0 with 2 workers, from step 3 with 1 worker"]
    assert kept_notes(tmp_path / "none", "k") == []


def test_of_two_checkpoints_written_between_reports_the_newer_is_told_and_never_pushed_over_the_newest_in_a_store(there, tmp_path):
    folder, uri = tmp_path / "work", f"s3://bucket/{there.name}"
    turns = iter(checkpoint.by_turn(folder) * 2)
    with Writer(folder, "k", {}) as writer:
        for step in (1, 2, 3):
            writer.save({"step": step}, {"w": torch.full((3,), float(step))})
            writer.wait()
            if step != 2:  # the report after step 2 came late
                store.push(writer.written(), f"{uri}/{next(turns)}")
    assert sorted(checkpoint._step(there / slot) for slot in checkpoint.SLOTS) == [1, 3]


# --- fewer workers ------------------------------------------------------------------------------------------------


def test_fewer_workers_are_allowed_only_where_any_number_of_them_can_share_a_batch():
    assert spec.Train(num_workers=4, min_workers=1, micro_batch=8).min_workers == 1
    assert spec.Train(num_workers=2, min_workers=0, batch_size=64).min_workers == 0
    for changes, message in (
        ({"min_workers": 5}, r"min_workers: 5 are more than num_workers 4"),
        ({"min_workers": 0, "batch_size": 64}, r"min_workers: batch_size 64 is not a multiple of 3 workers x accumulate_steps, and so many there may be; set micro_batch"),
    ):
        with pytest.raises(ValueError, match=message):
            spec.Train(num_workers=4, **changes)


def test_a_cluster_without_room_offers_fewer_workers():
    node = cluster.Node({"CPU": 3.0}, {})
    with pytest.raises(UserError, match=r"16 CPUs and the cluster has 3; lower it or add nodes, or allow fewer"):
        cluster.refuse_unplaceable("train.num_workers", "workers", 16, {"CPU": 1.0}, {}, [node], {}, ", or allow fewer")
