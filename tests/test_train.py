"""Training: it learns, it resumes to the same bits, and it stops with the reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from portaisys import data, models, spec
from portaisys.spec import UserError
from portaisys.train import CHECKPOINT, Place, cosine, fit, read_checkpoint, score, shift

MODEL = spec.ConvNet(channels=(8, 16), blocks=(1, 1))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return data.load(spec.Digits())


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
    assert seen[-1]["step"] == seen[-1]["steps"] == 120
    assert seen[-1]["loss"] < seen[0]["loss"] / 2


VARIANTS = [{}, {"ema_decay": 0.9}, {"optimizer": "adamw", "learning_rate": 0.003}, {"precision": "bf16"}, {"accumulate_steps": 2}]


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


def test_ranks_share_each_batch_without_overlap(digits, tmp_path):
    seen = []

    class Recording:
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def take(self, positions):
            seen.append(positions)
            return self.rows.take(positions)

    for rank in (0, 1):
        options = spec.Train(epochs=1, batch_size=64)
        place = Place(rank, 2)
        fit(fresh(digits), Recording(digits.train), options, folder=tmp_path / str(rank), key="k", seed=1, place=place)
    steps = len(digits.train) // 64
    for step in range(steps):
        both = np.concatenate([seen[step], seen[steps + step]])
        assert len(set(both)) == 64
    assert len(set(np.concatenate(seen))) == steps * 64


def test_a_checkpoint_of_another_spec_is_refused(digits, tmp_path):
    with pytest.raises(Killed):
        train(digits, tmp_path, report=killed_at(5))
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(UserError, match="another spec, data or parent"):
        train(digits, tmp_path, key="other")
    assert (tmp_path / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_checkpoint_is_refused(digits, tmp_path, cut):
    with pytest.raises(Killed):
        train(digits, tmp_path, report=killed_at(5))
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="truncated or none of ours"):
        train(digits, tmp_path)
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(UserError, match="truncated or none of ours"):
        read_checkpoint(path)


def test_a_loss_that_is_not_finite_stops_with_the_fix(digits, tmp_path):
    with pytest.raises(UserError, match=r"lower train\.learning_rate"):
        train(digits, tmp_path, learning_rate=1e20, clip_norm=None, epochs=3)


def test_a_batch_larger_than_the_data_is_refused(digits, tmp_path):
    with pytest.raises(UserError, match=r"train\.batch_size: 5000 exceeds the 797 training rows"):
        train(digits, tmp_path, batch_size=5000)


def test_fp16_trains_with_a_scaler_whose_state_is_kept(digits, tmp_path):
    model = train(digits, tmp_path, precision="fp16", epochs=1)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert '"scale"' in read_checkpoint(tmp_path / CHECKPOINT)[0]["scaler"]


def test_the_schedule_warms_up_and_ends_near_zero():
    factors = [cosine(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1
    assert factors[-1] < 0.001


def test_a_shifted_picture_is_the_old_one_elsewhere():
    torch.manual_seed(0)
    x = torch.zeros(50, 1, 8, 8)
    x[:, :, 4, 4] = 7
    y = shift(x, 2)
    places = {tuple(place[2:].tolist()) for place in y.nonzero()}
    assert (y.sum((1, 2, 3)) == 7).all()
    assert places <= {(row, column) for row in range(2, 7) for column in range(2, 7)}
    assert len(places) > 10
