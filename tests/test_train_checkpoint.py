"""Checkpoints: written beside the training, and what is left when the disk, the file or the spec is not what it was."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import signal
import threading

import pytest
import torch

from portaisys import artifact, checkpoint, data, spec
from portaisys.checkpoint import SLOTS, TENSORS, Writer
from portaisys.spec import UserError
from portaisys.train import fit

STEPS = 13  # of an epoch of digits


pytestmark = pytest.mark.usefixtures("one_thread")


def train(digits, folder, key="k", width=16, **arguments):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
    options = spec.Train(epochs=1, batch_size=64, checkpoint_every_steps=4)
    return fit(model, digits.train, options, folder=folder, key=key, seed=1, **arguments)


class Killed(Exception):
    pass


def killed_at(step):
    def report(metrics, saved):
        if metrics["step"] >= step:
            raise Killed

    return report


@pytest.fixture
def cut(digits, tmp_path):
    """A run that died at step 8: its folder holds the checkpoints of steps 4 and 8."""
    with pytest.raises(Killed):
        train(digits, tmp_path, report=killed_at(8), about={"spec": {"train": {"learning_rate": 0.1, "epochs": 1}}, "data": "abc"})
    return tmp_path


def slot_of(folder, step):
    return next(folder / slot for slot in SLOTS if artifact.read(folder / slot).scores["step"] == step)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_newest_two_are_kept_with_a_digest_of_each_file_and_the_cursor(cut):
    found = artifact.read(slot_of(cut, 8), verify=True)
    assert found.files[TENSORS] == artifact.hash_file(found.path / TENSORS)
    assert {name: found.scores[name] for name in ("step", "epoch", "batch", "samples", "world")} == {"step": 8, "epoch": 0, "batch": 8, "samples": 492, "world": 1}
    assert slot_of(cut, 4).exists()
    assert not list(cut.glob(".*"))


def damage_a_byte(slot):
    content = bytearray((slot / TENSORS).read_bytes())
    content[len(content) // 2] ^= 1
    (slot / TENSORS).write_bytes(content)


DAMAGE = {
    "a byte": damage_a_byte,
    "half": lambda slot: (slot / TENSORS).write_bytes((slot / TENSORS).read_bytes()[:500]),
    "no file": lambda slot: (slot / TENSORS).unlink(),
    "manifest": lambda slot: (slot / artifact.MANIFEST).write_text("{"),
    "empty manifest": lambda slot: (slot / artifact.MANIFEST).write_text("{}"),
    "no manifest": lambda slot: (slot / artifact.MANIFEST).unlink(),
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it_and_said_so(digits, cut, harm, caplog):
    harm(slot_of(cut, 8))
    steps = []
    with caplog.at_level(logging.WARNING):
        again = train(digits, cut, audit=lambda step, rows: steps.append(step))
    assert steps == list(range(4, STEPS))
    assert "the newest checkpoint is damaged, so training goes on from the one before it, of step 4" in caplog.text
    assert same(again, train(digits, cut / "whole"))


def test_when_all_are_damaged_the_user_is_asked(digits, cut):
    for step in (8, 4):
        damage_a_byte(slot_of(cut, step))
    with pytest.raises(UserError, match=r"no checkpoint is whole \(.*\); delete .* to train from the start"):
        train(digits, cut)


def test_a_checkpoint_of_another_spec_or_data_is_refused_with_what_differs(digits, cut):
    before = artifact.hash_files(cut)
    with pytest.raises(UserError, match=r"data was 'abc' and is 'xyz', spec\.train\.learning_rate was 0\.1 and is 0\.2; go on with those"):
        train(digits, cut, key="other", about={"spec": {"train": {"learning_rate": 0.2, "epochs": 1}}, "data": "xyz"})
    assert artifact.hash_files(cut) == before


def test_a_checkpoint_of_another_model_is_refused_with_a_tensor(digits, cut):
    with pytest.raises(UserError, match=r"is of another model; 3 tensors differ, first '1\.bias'"):
        train(digits, cut, width=17)


def test_a_report_names_a_checkpoint_only_when_it_is_whole(digits, tmp_path):
    told = []
    train(digits, tmp_path, report=lambda metrics, saved: saved and told.append((metrics["step"], artifact.read(saved, verify=True).scores["step"])))
    assert told[-1] == (STEPS, STEPS)
    assert all(written <= step for step, written in told)


def test_what_is_saved_is_the_state_at_the_call_though_it_changes_before_it_is_written(tmp_path):
    """The thread is held up by a lock of ours until the tensor is another."""
    gate, value = threading.Lock(), torch.zeros(1000)

    class Late(Writer):
        def _write(self, state):
            with gate:
                super()._write(state)

    with Late(tmp_path, "k", {}) as writer:
        with gate:
            writer.save({"step": 1}, {"x": value})
            value += 1
        writer.wait()
    assert checkpoint.newest(tmp_path, "k", {}, print).tensors["x"].eq(0).all()


def _train_on_a_small_disk(folder, results):
    """A process whose files may not exceed 20 kB, from its second checkpoint on: what a full disk is to a write."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    digits = data.load(spec.Digits())

    def report(metrics, saved):
        if saved:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    try:
        train(digits, folder, report=report)
    except UserError as error:
        results.put(str(error))


def test_a_full_disk_leaves_the_checkpoint_before_and_says_the_cause_in_one_line(digits, tmp_path):
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["portaisys.train"])
    results = server.Queue()
    process = server.Process(target=_train_on_a_small_disk, args=(tmp_path, results))
    process.start()
    said = results.get(timeout=120)
    process.join()
    step = checkpoint.steps(tmp_path)
    assert step in (4, 8)
    assert said.startswith("storage.path: a checkpoint cannot be written in") and "\n" not in said
    assert "File too large" in said and f"the one of step {step} is whole" in said
    steps = []
    again = train(digits, tmp_path, audit=lambda step, rows: steps.append(step))
    assert steps == list(range(step, STEPS)) and same(again, train(digits, tmp_path / "whole"))
    assert not list(tmp_path.glob(".*"))
