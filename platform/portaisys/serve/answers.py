"""Answers kept for inputs that come again: opt-in, one store a replica, bounded in bytes; what was asked for longest ago leaves first.

The key is the version and precision in charge with the names, types, shapes and bytes of the inputs, so no other model, version or rung
of the ladder is ever answered for. Lives on one loop; knows neither HTTP nor what the arrays mean.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from portaisys.engine import Arrays
from portaisys.serve.batcher import Done, Outputs

ENTRY_BYTES = 1024  # of a key, a dictionary's place and array objects, beside the numbers themselves


class Answers:
    """At most `most_bytes` of answers, by key."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.held_bytes = most_bytes, 0
        self._kept: OrderedDict[bytes, tuple[Outputs, int]] = OrderedDict()

    def get(self, key: bytes) -> Outputs | None:
        """The answer kept, which is now the one used last."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def keep(self, key: bytes, outputs: Outputs) -> None:
        """Keep a copy: the outputs are views of a whole batch's. One that is larger than a quarter of the room is not kept."""
        size = sum(array.nbytes for array in outputs.values()) + ENTRY_BYTES
        if key in self._kept or size > self.most_bytes // 4:
            return
        self._kept[key] = {name: array.copy() for name, array in outputs.items()}, size
        self.held_bytes += size
        while self.held_bytes > self.most_bytes:
            _, (_, gone) = self._kept.popitem(last=False)
            self.held_bytes -= gone


@dataclass
class Recall:
    """The store as one version sees it. `stamp`: what tells this version, and the precision in charge, from every other. `hits`, `misses`: requests."""

    answers: Answers
    stamp: Callable[[], str]
    hits: int = 0
    misses: int = 0

    def find(self, feeds: Arrays) -> tuple[bytes, Outputs | None]:
        """The key of these inputs, and their answer where it is known."""
        key = key_of(self.stamp(), feeds)
        found = self.answers.get(key)
        self.hits += found is not None
        self.misses += found is None
        return key, found

    def keeping(self, key: bytes, done: Done) -> Done:
        """`done`, which keeps the answer first: a right one, of the engine that was in charge when it was asked."""
        stamp = self.stamp()

        def told(outputs: Outputs | None, problem: Exception | None) -> None:
            if (
                outputs is not None
                and stamp == self.stamp()
                and all(np.isfinite(array).all() for array in outputs.values() if array.dtype.kind == "f")
            ):
                self.answers.keep(key, outputs)
            done(outputs, problem)

        return told


def key_of(stamp: str, feeds: Arrays) -> bytes:
    """A digest that no two inputs share but by an accident of 2^-128."""
    state = hashlib.blake2b(stamp.encode(), digest_size=32)
    for name in sorted(feeds):
        array = feeds[name]
        state.update(f"\0{name}\0{array.dtype.str}{array.shape}".encode())
        state.update(array.data)
    return state.digest()
