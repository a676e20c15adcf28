"""Means of speed: which change no bit, what auto keeps and refuses, and what it says when something is not to be had."""

from __future__ import annotations

import dataclasses
import functools
import threading

import numpy as np
import pytest
import torch
from test_train_checkpoint import Killed, killed_at

from portaisys import checkpoint, fits, launch, models, spec
from portaisys.data import Split
from portaisys.data.sources import Table
from portaisys.distributed import Place
from portaisys.rows import Loader, Plan, load, loading, resident, shares_of, shuffled, too_large
from portaisys.spec import UserError
from portaisys.speed import _order, choose
from portaisys.step import Captured
from portaisys.train import fit

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, 60)
    ids = np.where(np.arange(20) < lengths[:, None], rng.integers(1, 50, (60, 20)), 0)
    table = Table(lambda indices: ids[indices, : lengths[indices].max()], rng.integers(0, 3, 60), ("a", "b", "c"), (20,), "", lengths=lengths)
    return Split(table, np.arange(60))


class Dropping(torch.nn.Module):
    """A model that draws in every step, and has batch statistics."""

    def __init__(self, rate=0.2):
        super().__init__()
        torch.manual_seed(0)
        self.rate = rate
        self.first, self.norm, self.last = torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 10)

    def forward(self, x):
        return self.last(torch.nn.functional.dropout(self.norm(self.first(x.flatten(1))).relu(), self.rate, self.training))


def train(digits, folder, model=None, split=None, note=lambda text: None, report=lambda metrics, saved: None, **changes):
    options = spec.Train(**{"epochs": 2, "batch_size": 64, "checkpoint_every_steps": 5, "augment": "shift_flip", **changes})
    return fit(model or Dropping(), split or digits.train, options, folder=folder, key="k", seed=1, note=note, report=report)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def rows_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


def loader_of(split, augment="none", place=Place(), epochs=2, batch_size=16):
    options = spec.Train(batch_size=batch_size, accumulate_steps=2)
    return Loader(split, Plan(shuffled(len(split), batch_size, 0), epochs), functools.partial(shares_of, place=place, options=options), len, augment, 1, place)


def equal(shares, others):
    return len(shares) == len(others) and all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and (a.rows == b.rows).all() and a.weight == b.weight for a, b in zip(shares, others, strict=True))


# --- what changes no bit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [("prefetch",), ("resident",), ("resident", "prefetch")], ids=str)
def test_rows_ahead_or_resident_give_the_same_bits_also_when_resumed(digits, tmp_path, speed):
    plain = train(digits, tmp_path / "plain", micro_batch=17)
    with pytest.raises(Killed):
        train(digits, tmp_path / "cut", micro_batch=17, speed=speed, report=killed_at(15))
    assert not rows_threads()
    assert same(plain, train(digits, tmp_path / "cut", micro_batch=17, speed=speed)) and not rows_threads()


@pytest.mark.parametrize("speed,named", [(["prefetch", "fused"], ["fused"]), ("exact", []), ("auto", "auto"), ([], [])])
def test_means_that_change_no_bit_are_not_in_the_key_of_what_is_trained(speed, named):
    options = spec.Spec(name="n", train={"speed": speed})
    stage = next(stage for stage in launch.plan(options) if stage.kind == "train")
    assert launch._sections(options, stage)["train"]["speed"] == named


def test_resident_rows_are_those_of_the_host_augmented_alike(digits):
    for rank in (0, 1):
        plain = loader_of(digits.train, "shift_flip_erase", Place(rank, 2))
        kept = resident(plain)
        assert all(equal(load(plain, step), load(kept, step)) for step in range(0, plain.plan.total, 7))


def test_resident_texts_are_padded_to_the_longest_of_their_batch(texts):
    plain = loader_of(texts)
    assert all(equal(load(plain, step), load(resident(plain), step)) for step in range(plain.plan.total))


def test_rows_that_do_not_fit_stay_where_they_are_and_it_is_said(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("portaisys.rows.memory_limit", lambda workers, device: 2**19 // workers)
    notes = []
    assert same(train(digits, tmp_path / "a", epochs=1), train(digits, tmp_path / "b", epochs=1, speed=["resident"], note=notes.append))
    assert notes == ["train.speed: rows are not resident: the rows take 0 MiB, and a quarter of the memory that is free is 0"]
    assert too_large(loader_of(digits.train))


def test_loading_does_not_touch_the_generator_that_steps_draw_from(digits):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load(loader_of(digits.train, "shift_flip"), 1)
    assert torch.equal(before, torch.get_rng_state())


def test_rows_are_made_ahead_but_no_further_than_two_steps(digits):
    loader = loader_of(digits.train)
    with loading(loader, ("prefetch",)) as ahead:
        assert equal(ahead(3), load(loader, 3)) and equal(ahead(4), load(loader, 4))
        assert ahead(loader.plan.total) == [] and ahead(loader.plan.total) == []
    assert not rows_threads()


# --- when rows cannot be read -------------------------------------------------------------------------------------


def broken(split, at):
    """The split, whose row `at` cannot be read."""

    def rows(indices):
        if split.indices[at] in indices:
            raise OSError("the disk is gone\nand more of it")
        return split.table.rows(indices)

    return Split(dataclasses.replace(split.table, rows=rows), split.indices)


@pytest.mark.parametrize("speed", [(), ("prefetch",)], ids=str)
def test_a_loader_that_raises_is_told_with_its_cause_in_one_line_and_the_thread_ends(digits, tmp_path, speed):
    with pytest.raises(UserError) as told:
        train(digits, tmp_path, split=broken(digits.train, 700), speed=speed)
    assert str(told.value).startswith("train: rows of step ") and str(told.value).endswith(" could not be loaded: OSError: the disk is gone")
    assert isinstance(told.value.__cause__, OSError) and not rows_threads()


# --- compile ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Traced and split into two passes by torch as ever, without the C++ compiler, which takes minutes on a busy machine."""
    monkeypatch.setattr("portaisys.step.BACKEND", "aot_eager")
    torch._dynamo.reset()


def test_a_compiled_run_is_resumed_uncompiled_and_the_reverse(digits, tmp_path, quick):
    plain = train(digits, tmp_path / "plain")
    for first, then in ((["compile"], []), ([], ["compile"])):
        folder = tmp_path / "-".join(["then", *first])
        with pytest.raises(Killed):
            train(digits, folder, speed=first, report=killed_at(10))
        made = train(digits, folder, speed=then)
        assert [*made.state_dict()] == [*plain.state_dict()]
        torch.testing.assert_close(made.state_dict(), plain.state_dict(), rtol=1e-2, atol=1e-3)


def test_a_compiled_run_that_is_resumed_ends_with_the_same_bits(digits, tmp_path, quick):
    whole = train(digits, tmp_path / "whole", speed=["compile"])
    torch._dynamo.reset()
    with pytest.raises(Killed):
        train(digits, tmp_path / "cut", speed=["compile"], report=killed_at(15))
    torch._dynamo.reset()
    assert same(whole, train(digits, tmp_path / "cut", speed=["compile"]))


def test_texts_of_all_lengths_are_one_compiled_graph(texts, tmp_path, quick):
    model = models.build(spec.TextTransformer(name="text_transformer", dim=16, depth=1, heads=2), (20,), 3, vocabulary=50)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    fit(model, texts, spec.Train(epochs=3, batch_size=7, speed=["compile"], learning_rate=0.01), folder=tmp_path, key="k")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


def test_a_compile_that_fails_is_told_in_one_line(digits, tmp_path, monkeypatch):
    def failing(graph, example):
        raise RuntimeError("no compiler\nin many lines")

    monkeypatch.setattr("portaisys.step.BACKEND", failing)
    torch._dynamo.reset()
    with pytest.raises(UserError, match=r"^train\.speed: compile does not work for this model here: RuntimeError: no compiler; leave compile out, or take train\.speed=auto$"):
        train(digits, tmp_path, speed=["compile"])


def test_auto_goes_on_without_a_compile_that_fails_and_says_so(digits, tmp_path, monkeypatch):
    def failing(graph, example):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("portaisys.step.BACKEND", failing)
    monkeypatch.setattr("portaisys.speed.LONG_S", 0.0)
    torch._dynamo.reset()
    notes = []
    train(digits, tmp_path, speed="auto", epochs=1, note=notes.append)
    told = next(note for note in notes if "compile" in note)
    assert "compile failed (compile does not work for this model here: RuntimeError: no compiler; " in told
    assert "compile" not in checkpoint.state(tmp_path)["settled"]["speed"]


@pytest.mark.slow
def test_the_real_compiler_learns_the_same_but_for_roundings(digits, tmp_path):
    torch._dynamo.reset()
    plain, compiled = (train(digits, tmp_path / name, Dropping(0.0), speed=speed) for name, speed in (("a", []), ("b", ["compile"])))  # it draws other numbers for dropout
    torch.testing.assert_close(plain.state_dict(), compiled.state_dict(), rtol=1e-2, atol=1e-3)


# --- CUDA graphs --------------------------------------------------------------------------------------------------


def test_cuda_graphs_are_refused_on_a_cpu(digits, tmp_path):
    with pytest.raises(UserError, match=r"^train\.speed: cuda_graphs is not to be had here: there are none on a CPU; leave it out$"):
        train(digits, tmp_path, speed=["cuda_graphs"])


def test_each_shape_is_captured_once_in_training_and_others_run_as_they_are(monkeypatch):
    monkeypatch.setattr("portaisys.step.CAPTURES", 2)
    made, replayed = [], []

    def capture(model, x):
        made.append(tuple(x.shape))
        return lambda given: replayed.append(tuple(given.shape)) or model(given)

    model = Captured(torch.nn.Linear(4, 2), capture)
    for rows in (3, 5, 3, 7):
        assert model.train()(torch.ones(rows, 4)).shape == (rows, 2)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(3, 4))
    model.eval()(torch.ones(3, 4))
    assert made == [(3, 4), (5, 4)] and replayed == [(3, 4), (5, 4), (3, 4)]


@pytest.mark.gpu
def test_captured_steps_learn_what_plain_ones_learn(digits, tmp_path):
    def learnt(folder, **changes):
        torch.manual_seed(0)
        model = models.build(spec.ConvNet(channels=(8,), blocks=(1,)), digits.shape, 10, digits.mean, digits.std)
        options = spec.Train(epochs=2, checkpoint_every_steps=5, **changes)
        return fit(model, digits.train, options, folder=folder, key="k", place=Place(device="cuda")).state_dict()

    plain = learnt(tmp_path / "plain")
    for speed in (["cuda_graphs"], ["resident", "prefetch", "cuda_graphs"]):
        torch.testing.assert_close(learnt(tmp_path / speed[0], speed=speed), plain, rtol=1e-2, atol=1e-3)


# --- what auto keeps ----------------------------------------------------------------------------------------------


def clocked(monkeypatch, seconds):
    """`trial` for names whose steps take `seconds[name]`, or `seconds[name](turn)`, on a clock that they move on."""
    clock, order = [0.0], []
    monkeypatch.setattr("portaisys.speed.time.perf_counter", lambda: clock[0])

    def trial(name):
        turns = iter(range(100))

        def step():
            order.append(name)
            taken = seconds[name]
            clock[0] += taken(next(turns)) if callable(taken) else taken
            return 1.0

        return step

    return trial, order


def test_a_bound_of_the_paired_gain_decides(monkeypatch):
    trial, _ = clocked(monkeypatch, {"plain": 3, "often faster": lambda turn: 3.1 if turn in (3, 7) else 2})
    assert choose(["plain", "often faster"], trial, lambda tensor: tensor).name == "plain"
    trial, _ = clocked(monkeypatch, {"plain": 3, "faster": lambda turn: 3.1 if turn == 7 else 2})
    choice = choose(["plain", "faster"], trial, lambda tensor: tensor)
    assert choice.name == "faster" and "faster 2000.0 ms (gains 50.0%, at least 50.0%)" in choice.because


def test_the_bounds_level_is_that_of_the_sign_test():
    assert [_order(rounds) for rounds in (5, 8, 16, 24)] == [1, 2, 5, 8]


def test_cheap_steps_get_more_rounds_and_the_first_in_a_round_changes(monkeypatch):
    trial, order = clocked(monkeypatch, {"a": 0.01, "b": 0.02})
    assert "in 24 rounds" in choose(["a", "b"], trial, lambda tensor: tensor).because
    assert order[:6] == ["a", "b", "b", "a", "a", "b"] and len(order) == 50


def test_what_costs_more_to_set_up_than_it_saves_is_not_taken(monkeypatch):
    seconds = {"plain": 2, "compiled": lambda turn: 1 if turn else 61}
    for steps, best in ((59, "plain"), (61, "compiled")):
        choice = choose(["plain", "compiled"], clocked(monkeypatch, seconds)[0], lambda tensor: tensor, steps)
        assert choice.name == best
        assert ("setting it up took 59.0 s, and 59 steps save 59.0" in choice.because) == (best == "plain")


class Slow(torch.nn.Module):
    """Adds what the memory's order of its input says to a clock."""

    def __init__(self, clock, channels_last_s):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 10))
        self.clock, self.channels_last_s = clock, channels_last_s

    def __deepcopy__(self, memo):
        made = Slow(self.clock, self.channels_last_s)
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x):
        last = self.net[0].weight.stride() != torch.empty(4, 1, 3, 3).stride()
        self.clock[0] += self.channels_last_s if last else 1.0
        return self.net(x)


@pytest.mark.parametrize("seconds,kept", [(0.5, True), (2.0, False)])
def test_auto_keeps_what_pays_and_refuses_what_does_not_and_the_checkpoint_says_which(digits, tmp_path, monkeypatch, seconds, kept):
    clock, notes = [0.0], []
    monkeypatch.setattr("portaisys.speed.time.perf_counter", lambda: clock[0])
    torch.manual_seed(0)
    train(digits, tmp_path, model=Slow(clock, seconds), speed="auto", epochs=1, note=notes.append)
    assert ("channels_last" in checkpoint.state(tmp_path)["settled"]["speed"]) == kept
    assert notes[1].startswith(f"train.speed: auto took {'channels_last' if kept else 'plain'} of plain 1000.0 ms, channels_last {seconds * 1e3:.1f} ms (gains ")


def test_exact_tries_only_what_changes_no_bit_and_only_in_long_runs(digits, tmp_path, monkeypatch):
    plain, notes = train(digits, tmp_path / "plain"), []
    assert same(plain, train(digits, tmp_path / "short", speed="exact", note=notes.append)) and not notes
    monkeypatch.setattr("portaisys.speed.MANY_STEPS", 20)
    assert same(plain, train(digits, tmp_path / "long", speed="exact", note=notes.append))
    assert len(notes) == 2 and "resident" in notes[0] and "prefetch" in notes[1]


# --- micro-batches ------------------------------------------------------------------------------------------------


def test_a_micro_batch_is_searched_once_and_again_with_other_workers(digits, monkeypatch):
    asked, notes = [], []
    monkeypatch.setattr(fits, "find_micro_batch", lambda *args, **kwargs: asked.append(args[1]) or 9)
    options = spec.Spec(name="n", train={"micro_batch": "auto"})
    found = functools.partial(fits._with_micro_batch, options, digits, options.train)
    assert found(Place(), {}, notes.append).micro_batch == 9 and len(asked) == 1
    left = {"world": 1, "settled": {"precision": "fp32", "speed": [], "micro_batch": 5}}
    assert found(Place(), left, notes.append).micro_batch == 5 and len(asked) == 1
    assert found(Place(world=2), left, notes.append).micro_batch == 9 and asked[1:] == [32]
    assert notes[1] == "train.micro_batch: auto was 5 rows with 1 workers; there are 2 now, so it is searched again"
