"""What watches over a process that trains: the signal that asks it to leave, and a thread that notices when a group of them stands still.

Knows no Ray and no training loop, which says by marks what it does (fit's `mark`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

# What is done within a step, in order: who is in an earlier one is what the others wait for.
PHASES = ("computing", "loading", "exchanging", "validating", "reporting")
_SAID = {
    "computing": "is computing step {}", "loading": "is loading the rows of step {}", "exchanging": "is updating weights in step {}",
    "validating": "is validating after step {}", "reporting": "is reporting step {}",
}  # fmt: skip
_BEATS = 20  # in the time that nothing may stand still

_log = logging.getLogger(__name__)


class Hung(Exception):
    """No rank of a group has moved for too long; the message names the one that the others wait for."""


@contextlib.contextmanager
def notice() -> Iterator[Callable[[], bool]]:
    """Whether this process was sent SIGTERM within the block. The second one does what the first would have done without it.

    Only a main thread can ask for signals; in others the answer is no.
    """
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set
        return
    before = listen(told)
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def listen(told: threading.Event) -> Any:
    """Have the next SIGTERM set `told`, and only the next; returns what handles the others. Main thread only."""

    def heard(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        told.set()
        _log.warning("asked to end (SIGTERM): this step is ended and a checkpoint written; a second SIGTERM ends at once")

    before = signal.signal(signal.SIGTERM, heard)
    return before


@dataclass(frozen=True)
class Word:
    """What a rank last said of itself. `beat`: grows while its process is alive, `moves` while it does something."""

    beat: int
    moves: int
    step: int
    phase: str
    where: str


class Watch:
    """Calls `hung(text)`, once, when no rank of the group has moved for `timeout_s`. A context manager.

    Every rank says in `store`, which rank 0 keeps, what it does, and reads what the others say, 20 times in `timeout_s`. So a rank that
    waits for one that is busy, with a validation, say, is not taken for hung; and a process that is stopped or gone is told from one
    that waits: it does not even say that. Saying and looking are two threads, since a store whose host is stopped never answers.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout_s: float, hung: Callable[[str], None], where: str = "") -> None:
        self._store, self._rank, self._timeout_s, self._hung = store, rank, timeout_s, hung
        self._word = Word(0, 0, 0, "computing", where or f"{socket.gethostname()}, process {os.getpid()}")
        self._keys = [f"watch/{one}" for one in range(world)]
        self._words: dict[int, Word] = {}
        self._answered = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> Watch:
        for work in (self._say, self._look):
            threading.Thread(target=work, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._ended.set()

    def mark(self, step: int, doing: str) -> None:
        """This rank now does this; `doing` one of PHASES."""
        word = self._word
        self._word = replace(word, moves=word.moves + 1, step=step, phase=doing)

    def _say(self) -> None:
        beat = 0
        while not self._ended.wait(self._timeout_s / _BEATS):
            beat += 1
            try:
                self._store.set(self._keys[self._rank], json.dumps(astuple(replace(self._word, beat=beat))))
                spoken = [rank for rank, key in enumerate(self._keys) if self._store.check([key])]  # for what is not there a store waits
                said = self._store.multi_get([self._keys[rank] for rank in spoken])
                self._words = {rank: Word(*json.loads(text)) for rank, text in zip(spoken, said, strict=True)}
                self._answered = time.monotonic()
            except Exception as error:  # its host is gone: that is what is to be told
                _log.debug("the store of the watch does not answer: %s", error)

    def _look(self) -> None:
        seen: dict[int, tuple[Word | None, float, float]] = {}
        while not self._ended.wait(self._timeout_s / _BEATS):
            words, now = self._words | {self._rank: self._word}, time.monotonic()
            for rank in range(len(self._keys)):
                seen[rank] = _newer(seen.get(rank), words.get(rank), now)
            if now - max(moved for _, moved, _ in seen.values()) >= self._timeout_s:
                silent = {rank for rank, (_, _, spoke) in seen.items() if now - spoke > self._timeout_s / 2} - {self._rank}
                if self._rank and now - self._answered > self._timeout_s / 2:
                    silent = {0}  # it keeps the store
                self._hung(f"no worker has moved for {self._timeout_s:g} s: {blame({rank: word for rank, (word, _, _) in seen.items()}, silent)}")
                return


def _newer(seen: tuple[Word | None, float, float] | None, word: Word | None, now: float) -> tuple[Word | None, float, float]:
    """The last word of a rank, when it last moved, and when it last spoke. One that reads its data yet has no marks to make, and may take long."""
    if seen is None or (word and not word.moves):
        return word, now, now
    before, moved, _ = seen
    if word is None or word == before:
        return seen
    return word, now if before is None or word.moves != before.moves else moved, now


def blame(words: Mapping[int, Word | None], silent: set[int]) -> str:
    """Who holds up the group: those whose process does not answer, or else those that are furthest behind. Names at most three."""
    if silent:
        return _some([f"rank {rank} does not answer{f' ({word.where}; its last word: it {_said(word)})' if (word := words[rank]) else ''}" for rank in sorted(silent)])
    known = {rank: word for rank, word in words.items() if word}
    first = min(_place(word) for word in known.values())
    behind = {rank: word for rank, word in known.items() if _place(word) == first}
    others = {_said(word).replace("is ", "", 1) for word in known.values() if _place(word) != first}
    if not others:
        return f"every rank {_said(known[min(known)])}, and none is behind"
    return f"{_some([f'rank {rank} ({word.where}) {_said(word)}' for rank, word in behind.items()])}, the others are {' or '.join(sorted(others))}"


def _place(word: Word) -> tuple[int, int]:
    return word.step, PHASES.index(word.phase)


def _said(word: Word) -> str:
    return _SAID[word.phase].format(word.step + (2 if word.phase == "loading" else 1))


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
