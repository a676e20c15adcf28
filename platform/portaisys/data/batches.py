"""Which rows stand in which batch where rows differ in length: plans, epoch by epoch, and how much of them is padding.

A plan gives, for an epoch, its global batches as int64 positions of a split. It depends on lengths, seed and epoch alone: a run that goes
on in the middle of an epoch, or with other workers, finds the same batches. Knows neither rows nor models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from portaisys.spec import UserError

Batch = NDArray[np.int64]
Plan = Callable[[int], Sequence[Batch]]
Cut = Callable[[Batch, int], Sequence[Batch]]

WINDOW = 200  # groups that are sorted together: more pads less, fewer mixes more
# Groups of like length in a batch. One would do for padding, but its rows are all short or all long, 16 of them or 400:
# such steps learn less from as many samples (docs/log.md).
MIX = 8


def token_budget(lengths: NDArray[np.int64], tokens: int, seed: int, mix: int = MIX, window: int = WINDOW) -> Plan:
    """Batches of `mix` groups of rows of like length, each group of at most tokens / mix once padded (longest x rows); `cut` finds them again.

    The groups as tensor2tensor and fairseq make batches (Vaswani et al. 2017, section 5.1): the epoch's permutation, sorted within windows
    of about `window` groups, every other one downwards so that a group may span two, cut where the next row would not fit. Then the groups
    are shuffled, and so many at a time make a batch, its longest rows first. Each row stands in one batch an epoch.
    Raises UserError for a budget whose groups do not hold the longest row.
    """
    longest, most = int(lengths.max()), tokens // mix
    if longest > most:
        raise UserError(
            f"train.tokens_per_batch: {tokens} in {mix} groups of like length do not hold the longest row, of {longest} tokens; "
            f"take at least {longest * mix}, or cut rows at data.max_tokens={max(1, most)}"
        )
    size = max(1, round(window * most / lengths.mean()))

    def plan(epoch: int) -> Sequence[Batch]:
        rng = np.random.default_rng((seed, epoch))
        groups = _groups(_zigzag(rng.permutation(len(lengths)), lengths, size), lengths, most)
        parts = np.array_split(rng.permutation(len(groups)), -(-len(groups) // mix))
        return [_longest_first(np.concatenate([groups[index] for index in part]), lengths) for part in parts]

    return plan


def cut(lengths: NDArray[np.int64], tokens: int, mix: int = MIX) -> Cut:
    """A function that cuts a worker's rows of a batch of `token_budget`, longest first, into micro-batches of its part of tokens / mix.

    A row that is longer than that part is a micro-batch of its own.
    """
    return lambda rows, world: _groups(rows, lengths, tokens // mix // world)


def _zigzag(rows: Batch, lengths: NDArray[np.int64], size: int) -> Batch:
    windows = [_longest_first(rows[start : start + size], lengths) for start in range(0, len(rows), size)]
    return np.concatenate([window[:: -1 if index % 2 else 1] for index, window in enumerate(windows)])


def _longest_first(rows: Batch, lengths: NDArray[np.int64]) -> Batch:
    # Stable, so that rows of one length stay in their random order.
    return rows[np.argsort(-lengths[rows], kind="stable")]


def _groups(rows: Batch, lengths: NDArray[np.int64], tokens: int) -> list[Batch]:
    starts, longest = [0], 0
    for position, length in enumerate(lengths[rows].tolist()):
        longest = max(longest, length)
        if longest * (position + 1 - starts[-1]) > tokens and position > starts[-1]:
            starts.append(position)
            longest = length
    return np.split(rows, starts[1:])


def waste(lengths: NDArray[np.int64], batches: Sequence[Batch]) -> float:
    """Fraction in [0, 1) of what is computed that is padding, when each of `batches` is padded to its own longest row."""
    padded = sum(int(lengths[batch].max(initial=0)) * len(batch) for batch in batches)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / padded if padded else 0.0
