"""Precision: what is to be had, who chooses it, fp32 islands, and every rung of the ladder on models that overflow by plan."""

from __future__ import annotations

import pytest
import torch

from portaisys import models, spec
from portaisys.precision import LIMIT, Ladder, islands, supported
from portaisys.spec import UserError
from portaisys.speed import choose
from portaisys.train import fit

pytestmark = pytest.mark.usefixtures("one_thread")


def one(x):
    return x


class Net(torch.nn.Module):
    """Two layers with batch statistics; `between` changes what goes from the first to the second in training."""

    def __init__(self, between=one):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 10)
        self.odd, self.calls = Odd(between), 0

    def forward(self, x):
        return self.last(self.norm(self.odd(self.first(x.flatten(1)))))


class Odd(torch.nn.Module):
    """Where an overflow is planted."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x) if self.training else x


class Reached(torch.autograd.Function):
    """The identity, whose gradient `change` alters."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def train(digits, folder, model, **changes):
    """Last metrics, notes, rows of each update."""
    seen, notes, rows = [], [], []
    options = spec.Train(**{"epochs": 1, "batch_size": 64, "learning_rate": 0.01, **changes})
    fit(model, digits.train, options, folder=folder, key="k", report=lambda metrics, saved: seen.append(metrics), note=notes.append, audit=lambda step, taken: rows.append(taken))
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    return seen[-1], notes, rows


def all_rows(rows):
    return sorted(row for taken in rows for row in taken) == list(range(797))


def counts(metrics):
    return tuple(metrics[name] for name in ("scale_lowered", "steps_repeated", "precision_fallbacks", "steps_skipped"))


def test_finite_steps_take_no_rung(digits, tmp_path):
    for precision in ("fp32", "bf16"):
        metrics, notes, rows = train(digits, tmp_path / precision, Net(), precision=precision)
        assert counts(metrics) == (0, 0, 0, 0) and not notes and all_rows(rows)


def test_gradients_too_large_for_fp16_lower_the_scale_and_the_step_is_done_again(digits, tmp_path):
    """Half of the scaler's first 65536 is what fp16 can hold of a gradient of one."""
    metrics, _, rows = train(digits, tmp_path, Net(lambda x: Reached.apply(x, lambda g: g * 300)), precision="fp16", clip_norm=1.0)
    assert metrics["scale_lowered"] >= 1 and counts(metrics)[1:] == (0, 0, 0)
    assert all_rows(rows)


def test_a_gradient_that_no_scale_helps_leaves_the_scale_to_the_steps_after_it():
    ladder = Ladder("fp16", "cpu", lambda text: None)
    before = ladder.scaler.scale(torch.ones(())).item()
    tried = ["fp16"]
    while tried[-1] == "fp16":
        tried.append(ladder.climb(7, "fp16", False, str))
    assert tried[-1] == "fp32" and len(tried) == 18 and ladder.scaler.get_scale() == before
    assert ladder.climb(8, "fp16", False, str) == "fp16" and ladder.scaler.get_scale() == before / 2


def test_a_trial_of_auto_goes_on_after_an_overflow_in_fp16(digits, tmp_path):
    model = Net(lambda x: Reached.apply(x, lambda g: g * 300))  # which the first scale does not hold
    _, notes, rows = train(digits, tmp_path, model, precision="auto", clip_norm=1.0)
    assert notes[0].startswith("train.precision: auto took ") and all_rows(rows)


def sometimes(limit, times):
    """An activation of 1e5 or so, which fp16 does not hold, in the first `times` forward passes that are in fp16."""
    left = [times]

    def change(x):
        if x.dtype == limit and left[0]:
            left[0] -= 1
            return x * torch.finfo(limit).max
        return x

    return change


@pytest.mark.parametrize("precision,dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_forward_pass_that_overflows_is_repeated_in_fp32_and_loses_no_row(digits, tmp_path, precision, dtype):
    metrics, _, rows = train(digits, tmp_path, Net(sometimes(dtype, LIMIT - 1)), precision=precision)
    assert counts(metrics)[1:] == (LIMIT - 1, 0, 0) and all_rows(rows)


def test_what_keeps_overflowing_in_fp16_falls_back_to_bf16_for_the_rest(digits, tmp_path):
    metrics, notes, rows = train(digits, tmp_path, Net(sometimes(torch.float16, 1000)), precision="fp16")
    assert counts(metrics) == (0, LIMIT, 1, 0) and all_rows(rows)
    assert len(notes) == 1 and notes[0].startswith("train.precision: 3 steps of the last 100 overflowed in fp16") and notes[0].endswith("it is bf16")


def test_what_keeps_overflowing_in_bf16_falls_back_to_fp32_and_stays_there_after_a_restart(digits, tmp_path):
    metrics, notes, _ = train(digits, tmp_path, Net(sometimes(torch.bfloat16, 1000)), precision="bf16")
    assert counts(metrics) == (0, LIMIT, 1, 0) and "is fp32" in notes[0]
    model, half = Net(), []
    model.odd.change = lambda x: half.append(x.dtype) or x
    options = spec.Train(epochs=1, batch_size=64, learning_rate=0.01, precision="bf16")
    fit(model, digits.train, options, folder=tmp_path, key="k")
    assert not half  # finished: nothing is computed at all


def spoilt(at):
    """The numbers of the forward passes in `at` are infinite whatever the precision."""
    calls = [0]

    def change(x):
        calls[0] += 1
        return x * (float("inf") if calls[0] - 1 in at else 1.0)

    return change


def test_a_step_that_is_not_finite_in_fp32_is_left_out_and_leaves_no_trace(digits, tmp_path):
    metrics, notes, rows = train(digits, tmp_path, Net(spoilt({4})))
    assert counts(metrics) == (0, 0, 0, 1) and len(rows) == 12
    assert notes == ["step 5 was left out: its gradients are not finite even in fp32"]


def test_the_third_such_step_ends_the_run_with_the_layer_that_overflowed_first(digits, tmp_path):
    with pytest.raises(UserError, match=r"not finite in fp32, for 3 of the last 100 steps, by step 7; the first output that is not finite is that of odd \(Odd\), whose inputs reach .*; lower train\.learning_rate") as stop:
        train(digits, tmp_path, Net(spoilt(range(4, 100))))
    assert "\n" not in str(stop.value)


def test_weights_that_are_not_finite_are_told_of(digits, tmp_path):
    model = Net()
    model.last.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"that of last \(Linear\).* and whose weights are not finite"):
        train(digits, tmp_path, model)


def test_a_gradient_alone_that_is_not_finite_is_named(digits, tmp_path):
    model = Net(lambda x: Reached.apply(x, lambda g: g * float("inf")))
    with pytest.raises(UserError, match=r"outputs and loss are finite and the gradient of first\.bias is not"):
        train(digits, tmp_path, model)


def test_an_overflow_leaves_the_running_statistics_as_they_were(digits, tmp_path):
    model = Net(sometimes(torch.float16, 1))
    train(digits, tmp_path, model, precision="fp16")
    assert model.norm.num_batches_tracked == 13


# --- fp32 islands -------------------------------------------------------------------------------------------------


def test_an_island_computes_in_fp32_and_the_rest_in_16_bits(digits, tmp_path):
    seen = {}
    model = Net(lambda x: seen.setdefault("odd", x.dtype) and x)
    model.last.register_forward_hook(lambda module, args, output: seen.setdefault("last", (args[0].dtype, output.dtype)) and None)
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    train(digits, tmp_path, model, precision="bf16", fp32_modules=("last",))
    assert seen == {"odd": torch.bfloat16, "last": (torch.float32, torch.float32)}
    assert before == {name: len(module._forward_hooks) for name, module in model.named_modules()}


def test_a_prefix_names_all_below_it_and_an_unknown_name_is_refused_with_the_nearest():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]), "head": torch.nn.Linear(4, 4)})
    with islands(model, ("layers",), "cpu"), torch.autocast("cpu", torch.bfloat16):
        kinds = [layer(torch.ones(1, 4, dtype=torch.bfloat16)).dtype for layer in (*model["layers"], model["head"])]
        assert torch.is_autocast_enabled("cpu")
    assert kinds == [torch.float32, torch.float32, torch.bfloat16]
    with pytest.raises(UserError, match=r"train\.fp32_modules: no module of the model is called 'layer\.1'; there are layers\.1"), islands(model, ("layer.1",), "cpu"):
        pass


def test_an_island_keeps_a_model_from_overflowing_in_fp16(digits, tmp_path):
    def large(x):
        return x * 1e6 / 1e6 if x.dtype == torch.float32 else x * 60000 * 60000 / 6e4 / 6e4

    assert train(digits, tmp_path / "without", Net(large), precision="fp16")[0]["steps_repeated"] == LIMIT
    assert counts(train(digits, tmp_path / "with", Net(large), precision="fp16", fp32_modules=("odd", "first"))[0])[1:] == (0, 0, 0)


# --- the choice ---------------------------------------------------------------------------------------------------


def test_this_cpu_has_no_tf32_and_is_asked_before_anything_starts(digits, tmp_path):
    assert supported("cpu")[0] == "fp32" and "tf32" not in supported("cpu")
    with pytest.raises(UserError, match=r"train\.precision: tf32 is not to be had on this cpu; take fp32.*, or auto"):
        train(digits, tmp_path, Net(), precision="tf32")


def test_auto_says_what_it_took_and_a_resumed_run_keeps_to_it(digits, tmp_path):
    torch.manual_seed(0)
    model = models.build(spec.ConvNet(channels=(8,), blocks=(1,)), digits.shape, 10, digits.mean, digits.std)
    before = [p.clone() for p in model.parameters()]
    options, notes = spec.Train(epochs=1, precision="auto", speed="auto", checkpoint_every_steps=5), []

    def stop(metrics, saved):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(model, digits.train, options, folder=tmp_path, key="k", note=notes.append, report=stop)
    assert notes[0].startswith("train.precision: auto took ") and all("ms" in note for note in notes[:5])
    assert notes[1].startswith("train.speed: auto took ") and "of plain " in notes[1] and "channels_last" in notes[2] and "resident" in notes[3] and "prefetch" in notes[4]
    assert notes[5].startswith("train.speed: compile is not tried: 13 steps take ") and notes[6:] == ["train.speed: cuda_graphs is not tried: there are none on a CPU"]
    assert any(not torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    fit(model, digits.train, options, folder=tmp_path, key="k", note=notes.append)
    assert len(notes) == 7


def test_steps_that_are_only_tried_have_the_small_rates_of_a_long_runs_beginning(digits, tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr("portaisys.speed.update", lambda learner, precision: rates.append(learner.optimizer.param_groups[0]["lr"]) or True)
    train(digits, tmp_path, Net(), precision="auto", learning_rate=1.0, epochs=1)
    assert rates and max(rates) <= 25 / 100


@pytest.mark.parametrize("figures,best", [({"a": (4, 1), "b": (2, 1), "c": (1, 9)}, "b"), ({"a": (1, 1), "b": (4, 1)}, "a"), ({"a": (4, 1), "b": (1, float("nan"))}, "a")])
def test_the_fastest_is_taken_whose_loss_agrees(monkeypatch, figures, best):
    """`figures`: name -> seconds of a step, on a clock that steps move on, and loss."""
    clock = [0.0]
    monkeypatch.setattr("portaisys.speed.time.perf_counter", lambda: clock[0])

    def trial(name):
        def step():
            clock[0] += figures[name][0]
            return figures[name][1]

        return step

    choice = choose([*figures], trial, lambda tensor: tensor)
    assert choice.name == best and all(name in choice.because for name in figures)


def test_what_is_hopeless_in_the_first_round_is_not_asked_again(monkeypatch):
    clock, asked = [0.0], {"a": 0, "b": 0, "c": 0}
    monkeypatch.setattr("portaisys.speed.time.perf_counter", lambda: clock[0])

    def trial(name):
        def step():
            asked[name] += 1
            clock[0] += {"a": 1, "b": 3.5, "c": 0.5}[name]
            return 1.0

        return step

    choice = choose(["a", "b", "c"], trial, lambda tensor: tensor)
    assert choice.name == "c" and asked == {"a": 9, "b": 2, "c": 9}
    assert choice.because == "c of a 1000.0 ms, b 3500.0 ms, c 500.0 ms (gains 100.0%, at least 100.0%) a step, in 8 rounds"


def test_a_gain_that_is_not_there_in_nearly_every_round_is_none(monkeypatch):
    clock, turns = [0.0], {"a": 0, "b": 0}
    monkeypatch.setattr("portaisys.speed.time.perf_counter", lambda: clock[0])

    def trial(name):
        def step():
            turns[name] += 1
            clock[0] += 3 if name == "a" else (5 if turns[name] in (3, 7) else 2)
            return 1.0

        return step

    assert choose(["a", "b"], trial, lambda tensor: tensor).name == "a"
