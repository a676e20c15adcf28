"""Training: it learns, it resumes to the same bits, and it stops with the reason."""

from __future__ import annotations

import typing

import numpy as np
import pytest
import torch

from portaisys import checkpoint, models, spec
from portaisys.distributed import Place
from portaisys.rows import erase, shares_of, shares_of_all, shift
from portaisys.spec import UserError
from portaisys.step import SCHEDULES, rate_factor, score
from portaisys.train import fit

MODEL = spec.ConvNet(channels=(8, 16), blocks=(1, 1))


pytestmark = pytest.mark.usefixtures("one_thread")


def fresh(digits):
    torch.manual_seed(0)
    return models.build(MODEL, digits.shape, 10, digits.mean, digits.std)


def train(digits, folder, key="k", model=None, report=lambda metrics, checkpoint: None, **changes):
    options = spec.Train(**{"epochs": 2, "batch_size": 64, "checkpoint_every_steps": 5, "augment": "shift", **changes})
    return fit(model or fresh(digits), digits.train, options, folder=folder, key=key, seed=1, validation=digits.validation, report=report)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Killed(Exception):
    """The process dies here."""


def killed_at(step):
    def report(metrics, checkpoint):
        if metrics["step"] >= step:
            raise Killed

    return report


def test_it_learns_digits(digits, tmp_path):
    seen = []
    model = train(digits, tmp_path, epochs=10, report=lambda metrics, checkpoint: seen.append(metrics))
    assert score(model, digits.validation) >= 0.9  # 0.92 to 0.95, by CPU
    assert seen[-1]["step"] == seen[-1]["steps"] == 130
    assert seen[-1]["loss"] < seen[0]["loss"] / 2


@pytest.mark.parametrize("step", [12, 13, 14])
def test_a_run_stopped_beside_an_epochs_end_ends_with_the_same_bits(digits, tmp_path, step):
    whole = train(digits, tmp_path / "whole", checkpoint_every_steps=1)
    with pytest.raises(Killed):
        train(digits, tmp_path / "cut", report=killed_at(step), checkpoint_every_steps=1)
    assert checkpoint.steps(tmp_path / "cut") == step
    assert same(whole, train(digits, tmp_path / "cut", checkpoint_every_steps=1))


VARIANTS = [{}, {"ema_decay": 0.9}, {"optimizer": "adamw", "learning_rate": 0.003}, {"precision": "bf16"}, {"accumulate_steps": 2}, {"micro_batch": 17}, {"precision": "fp16"}, {"speed": ["fused", "channels_last"]}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_resumed_run_ends_with_the_same_bits(digits, tmp_path, changes):
    whole = train(digits, tmp_path / "whole", **changes)
    for step in (5, 15):
        with pytest.raises(Killed):
            train(digits, tmp_path / "cut", report=killed_at(step), **changes)
    assert same(whole, train(digits, tmp_path / "cut", **changes))


def test_a_finished_run_resumes_to_its_end_at_once(digits, tmp_path):
    whole = train(digits, tmp_path)
    again = train(digits, tmp_path, report=lambda metrics, checkpoint: pytest.fail("it trained again"))
    assert same(whole, again)


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(digits, tmp_path):
    torch.manual_seed(0)
    whole, parts = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    train(digits, tmp_path / "a", model=whole, augment="none", epochs=1)
    train(digits, tmp_path / "b", model=parts, augment="none", epochs=1, accumulate_steps=4)
    torch.testing.assert_close(whole.state_dict(), parts.state_dict(), rtol=1e-4, atol=1e-5)


def taken(digits, folder, world, **changes):
    """Rows of each step and rank, as the audit saw them; each rank trains for itself."""
    seen = {}
    for rank in range(world):
        options = spec.Train(**{"epochs": 2, "batch_size": 64, **changes})
        audit = lambda step, rows, rank=rank: seen.setdefault(step, []).append(rows)  # noqa: E731
        fit(linear(), digits.train, options, folder=folder / str(rank), key="k", seed=1, place=Place(rank, world), audit=audit)
    return seen


def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_epoch_sees_each_row_once_whatever_the_number_of_ranks(digits, tmp_path, world):
    seen = taken(digits, tmp_path, world)
    assert len(seen) == 2 * 13  # 797 rows are 13 batches of 61 or 62
    for epoch in (0, 1):
        rows = np.concatenate([part for step in range(13 * epoch, 13 * epoch + 13) for part in seen[step]])
        assert (np.sort(rows) == np.arange(797)).all()
    alone = taken(digits, tmp_path / "alone", 1)
    assert all((np.sort(np.concatenate(seen[step])) == np.sort(alone[step][0])).all() for step in seen)


def test_shares_differ_by_a_row_at_most_and_no_micro_batch_is_larger_than_asked():
    for rows, world, micro in [(64, 3, 10), (61, 4, 16), (5, 4, 2), (2, 3, 1), (64, 1, 64)]:
        options = spec.Train(batch_size=64, micro_batch=micro)
        shares = [shares_of(np.arange(rows), Place(rank, world), options) for rank in range(world)]
        sizes = [sum(map(len, share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1 and len({len(share) for share in shares}) == 1
        assert max(len(part) for share in shares for part in share) <= micro
        assert sorted(np.concatenate([part for share in shares for part in share])) == list(range(rows))


def test_micro_batches_of_unequal_weight_give_the_gradient_of_the_whole(digits, tmp_path):
    """Rows count as their label plus one, as a row of many tokens would; the loss is the mean over what counts."""
    weights = torch.from_numpy(digits.train.y + 1).float()

    def loss(logits, x, y):
        each = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        return (each * (y + 1)).sum() / (y + 1).sum()

    def trained(folder, **changes):
        options = spec.Train(epochs=1, batch_size=64, clip_norm=None, **changes)
        weigh = lambda rows: weights[rows].sum().item()  # noqa: E731
        return fit(linear(), digits.train, options, folder=folder, key="k", loss=loss, weigh=weigh).state_dict()

    torch.testing.assert_close(trained(tmp_path / "a"), trained(tmp_path / "b", micro_batch=7), rtol=1e-4, atol=1e-5)


def test_a_plan_of_batches_may_have_epochs_of_different_lengths(digits, tmp_path):
    plan = {0: [np.arange(0, 30), np.arange(30, 100)], 1: [np.arange(100, 103)], 2: [np.arange(50), np.arange(9), np.arange(200, 300)]}
    options, rows, seen = spec.Train(epochs=3, checkpoint_every_steps=1), [], []
    arguments = {"batches": plan.__getitem__, "key": "k", "audit": lambda step, taken: rows.append(taken)}
    whole = fit(linear(), digits.train, options, folder=tmp_path / "a", report=lambda metrics, saved: seen.append(metrics), **arguments)
    assert [row.tolist() for row in rows] == [batch.tolist() for epoch in plan.values() for batch in epoch]
    assert [row["epoch"] for row in seen] == pytest.approx([0.5, 1, 2, 2 + 1 / 3, 2 + 2 / 3, 3])
    assert [row["samples"] for row in seen] == [30, 100, 103, 153, 162, 262]
    with pytest.raises(Killed):
        fit(linear(), digits.train, options, folder=tmp_path / "b", report=killed_at(3), **arguments)
    assert same(whole, fit(linear(), digits.train, options, folder=tmp_path / "b", **arguments))
    with pytest.raises(Killed):
        fit(linear(), digits.train, options, folder=tmp_path / "c", report=killed_at(3), **arguments)
    plan[0] = plan[0] * 2
    with pytest.raises(UserError, match="stands at batch 0 of epoch 2, and the batches planned now are others"):
        fit(linear(), digits.train, options, folder=tmp_path / "c", **arguments)
    with pytest.raises(UserError, match="an epoch has no batch"):
        fit(linear(), digits.train, options, folder=tmp_path / "d", batches=lambda epoch: [], key="k")


def test_means_of_speed_change_no_more_than_roundings(digits, tmp_path):
    plain = train(digits, tmp_path / "plain", epochs=1, optimizer="adamw", learning_rate=0.003)
    fast = train(digits, tmp_path / "fast", epochs=1, optimizer="adamw", learning_rate=0.003, speed=["fused", "channels_last"])
    torch.testing.assert_close(plain.state_dict(), fast.state_dict(), rtol=1e-2, atol=1e-3)
    assert fast.net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_model_is_prepared_before_anything_else(digits, tmp_path):
    model = fit(linear(), digits.train, spec.Train(epochs=1), folder=tmp_path, key="k", prepare=lambda model: torch.nn.Sequential(model, torch.nn.Linear(10, 10)))
    assert len(list(model.parameters())) == 4


def test_a_loss_that_is_not_finite_stops_with_the_fix(digits, tmp_path):
    with pytest.raises(UserError, match=r"lower train\.learning_rate"):
        train(digits, tmp_path, learning_rate=1e20, clip_norm=None, epochs=3)


def test_a_batch_larger_than_the_data_is_refused(digits, tmp_path):
    with pytest.raises(UserError, match=r"train\.batch_size: 5000 exceeds the 797 training rows"):
        train(digits, tmp_path, batch_size=5000)


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0003), ("linear", 1 / 90), ("constant", 1.0)])
def test_the_schedule_warms_up_and_ends_near_zero_unless_it_is_constant(schedule, last):
    factors = [rate_factor(step, 100, 0.1, schedule) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(last, rel=0.1)


def test_every_schedule_of_the_spec_is_known_to_the_loop():
    assert set(typing.get_args(spec.Train.model_fields["schedule"].annotation)) == SCHEDULES.keys()


def test_a_constant_rate_without_warm_up_is_constant_from_the_first_step():
    assert {rate_factor(step, 50, 0.0, "constant") for step in range(50)} == {1.0}


def test_about_every_other_picture_loses_one_rectangle_of_two_to_a_third_of_it():
    x = torch.ones(400, 3, 28, 28)
    made = erase(x, torch.Generator().manual_seed(0))
    holes = made[:, 0] == 0
    assert torch.equal(made == 0, holes[:, None].expand_as(made))
    shares = holes.float().mean((1, 2))
    touched = shares > 0
    assert 0.42 < touched.float().mean() < 0.58 and shares[touched].min() > 0.015 and shares.max() < 0.36 and shares[touched].max() > 0.25
    for hole in holes[touched][:50]:
        assert torch.equal(hole, hole.any(1)[:, None] & hole.any(0)[None, :])
    assert torch.equal(made, erase(x, torch.Generator().manual_seed(0)))


def test_a_shifted_picture_is_the_old_one_elsewhere():
    torch.manual_seed(0)
    x = torch.zeros(50, 1, 8, 8)
    x[:, :, 4, 4] = 7
    y = shift(x, 2)
    places = {tuple(place[2:].tolist()) for place in y.nonzero()}
    assert (y.sum((1, 2, 3)) == 7).all()
    assert places <= {(row, column) for row in range(2, 7) for column in range(2, 7)}
    assert len(places) > 10


def test_micro_batches_that_are_not_found_yet_count_as_if_nothing_were_cut():
    options = spec.Train(batch_size=8, micro_batch="auto", num_workers=2)
    assert [[len(part) for part in parts] for parts in shares_of_all([np.arange(8)], options)] == [[4], [4]]
