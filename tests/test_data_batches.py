"""Batches by a token budget: every row once, nothing computed beyond the budget, the same again, and little padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portaisys import spec
from portaisys.data import Split
from portaisys.data.batches import MIX, cut, token_budget, waste
from portaisys.data.sources import Table
from portaisys.distributed import Place
from portaisys.fits import batches as given_to_fit
from portaisys.rows import shares_of, shuffled
from portaisys.spec import UserError
from portaisys.train import fit


def glosses(rows=5000):
    """Lengths as WordNet's are distributed."""
    return np.clip(np.random.default_rng(0).lognormal(2.7, 0.6, rows).astype(np.int64), 1, 128)


def padded(lengths, rows):
    return int(lengths[rows].max()) * len(rows)


def parts_of(lengths, tokens, batches):
    return [part for batch in batches for part in cut(lengths, tokens)(batch, 1)]


def test_every_row_stands_in_one_batch_of_an_epoch_and_nothing_computed_exceeds_its_part_of_the_budget():
    lengths = glosses()
    for epoch in range(3):
        batches = token_budget(lengths, 2048, seed=0)(epoch)
        parts = parts_of(lengths, 2048, batches)
        assert sorted(np.concatenate(batches)) == sorted(np.concatenate(parts)) == list(range(len(lengths)))
        assert max(padded(lengths, part) for part in parts) <= 2048 / MIX
        assert max(sum(padded(lengths, part) for part in cut(lengths, 2048)(batch, 1)) for batch in batches) <= 2048


def test_a_twelfth_of_what_is_computed_is_padding_at_most_where_random_batches_have_half():
    lengths = glosses(20_000)
    for tokens in (2048, 4096, 16_384):
        batches = token_budget(lengths, tokens, seed=0)(0)
        assert waste(lengths, parts_of(lengths, tokens, batches)) <= 0.08
        assert waste(lengths, np.array_split(np.random.default_rng(0).permutation(len(lengths)), len(batches))) > 0.5


def test_a_plan_depends_on_seed_and_epoch_alone():
    lengths = glosses()
    first, again = token_budget(lengths, 2048, seed=1), token_budget(lengths, 2048, seed=1)
    again(7)  # whatever was asked before
    for one, other in zip(first(2), again(2), strict=True):
        np.testing.assert_array_equal(one, other)
    for another in (first(3), token_budget(lengths, 2048, seed=2)(2)):
        assert not np.array_equal(first(2)[0], another[0])


def test_a_batch_mixes_lengths_and_the_company_of_a_row_changes_with_the_epoch():
    lengths = glosses()
    plan = token_budget(lengths, 2048, seed=0)
    assert np.median([np.ptp(lengths[batch]) for batch in plan(0)]) > np.std(lengths)
    company = [next({*batch} for batch in plan(epoch) if 17 in batch) for epoch in range(2)]
    assert len(company[0] & company[1]) < 0.5 * len(company[0])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(1, 5), st.integers(0, 100), st.integers(1, 5), st.integers(1, 4))
def test_whatever_the_lengths_no_row_is_lost_or_seen_twice_by_any_number_of_workers(lengths, mix, extra, window, world):
    lengths = np.array(lengths, np.int64)
    tokens = (int(lengths.max()) + extra) * mix
    batches = token_budget(lengths, tokens, seed=0, mix=mix, window=window)(0)
    places, part = [Place(rank, world) for rank in range(world)], cut(lengths, tokens, mix)
    shares = [share for batch in batches for place in places for share in shares_of(batch, place, spec.Train(), part)]
    assert sorted(np.concatenate(shares)) == list(range(len(lengths)))
    most = tokens // mix // world
    assert all(len(share) <= 1 or padded(lengths, share) <= most for share in shares)


def test_waste_is_the_share_of_padding():
    lengths = np.array([2, 4, 6, 8])
    assert waste(lengths, [np.arange(4)]) == pytest.approx(1 - 20 / 32)
    assert waste(lengths, [np.array([1])]) == waste(lengths, []) == 0


def test_a_row_longer_than_the_budget_holds_is_refused_with_what_to_change():
    message = r"train\.tokens_per_batch: 512 in 8 groups of like length do not hold the longest row, of 90 tokens; take at least 720, or cut rows at data\.max_tokens=64"
    with pytest.raises(UserError, match=message):
        token_budget(np.array([3, 90, 5]), 512, seed=0)


# --- in training --------------------------------------------------------------------------------------------------


def varying(rows=120):
    """Ids whose class is their first, in a table as a text source makes it."""
    lengths, y = 1 + np.arange(rows) % 30, np.arange(rows) % 3

    def taken(indices):
        width = np.arange(lengths[indices].max())
        return np.where(width < lengths[indices][:, None], 1 + y[indices][:, None], 0)

    return Split(Table(taken, y, ("a", "b", "c"), (30,), "", lengths=lengths), np.arange(rows))


def model():
    from portaisys import models

    torch.manual_seed(0)
    return models.build(spec.TextTransformer(name="text_transformer", dim=8, depth=1, heads=2), (30,), 3, vocabulary=5)


def trained(folder, rows, **given):
    options = spec.Train(epochs=2, batch_size=24, learning_rate=0.05, tokens_per_batch=400)
    return fit(model(), rows, options, folder=folder, key="k", **given)


def test_training_by_a_budget_sees_every_row_in_every_epoch(tmp_path):
    rows, seen = varying(), []
    given = given_to_fit(spec.Train(tokens_per_batch=400), rows, 0)
    trained(tmp_path, rows, **given, audit=lambda step, positions: seen.extend(positions))
    assert sorted(seen) == sorted([*range(120)] * 2)


def test_how_a_batch_is_cut_changes_no_step(tmp_path):
    rows = varying()
    plan = shuffled(len(rows), 24, 0)
    longest_first = lambda epoch: [batch[np.argsort(-rows.lengths[batch])] for batch in plan(epoch)]  # noqa: E731
    whole = trained(tmp_path / "whole", rows, batches=longest_first)
    parts = trained(tmp_path / "parts", rows, batches=longest_first, cut=cut(rows.lengths, 400))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_budget_for_rows_of_one_shape_is_refused():
    from portaisys import data

    with pytest.raises(UserError, match=r"train\.tokens_per_batch: all rows of this data have one shape"):
        given_to_fit(spec.Train(tokens_per_batch=400), data.load(spec.Digits()).train, 0)
