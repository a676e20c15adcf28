"""The precision ladder of a served version: its engines from the fastest to the plainest, and which of them answers now.

A signal moves one rung up: an answer with NaN or infinity at once, and the very batch is answered by the next rung; agreement with
the fp32 engine on sampled batches once it is too low beyond doubt (monitor.py). It never moves down by itself, since what was wrong
once needs somebody to look at it: an operator's pin, or loading the version again, does. Called in engines' threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys.engine import Arrays, Engine
from portaisys.monitor import Bounds, Decision, Window, decide, differing
from portaisys.spec import UserError

logger = logging.getLogger(__name__)

# From the least to the most exact; a rung may only be left for one further right.
EXACTNESS = ("fp8", "int8", "bf16", "fp16", "tf32", "fp32")


@dataclass(frozen=True)
class Step:
    """A change of rung. `when`: seconds since the epoch."""

    before: str
    now: str
    because: str
    when: float


@dataclass
class Ladder:
    """`rungs`: precisions, the one that answers at first leading; `opener` opens another, checked as at start.

    `every`: of so many batches one is answered by the reference too, the last rung; 0: none is.
    """

    name: str
    rungs: Sequence[str]
    first: Engine
    opener: Callable[[str], Engine]
    bounds: Bounds = field(default_factory=Bounds)
    every: int = 100
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = self.first
        self.window = Window()
        self.open: dict[str, Engine] = {self.first.precision: self.first}
        self._climbed = self.first.precision
        self._batches = 0
        self._lock = threading.Lock()

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Answers of the engine in charge, or of a more exact one when they are no numbers."""
        while True:
            engine = self.engine
            outputs = engine.run(feeds)
            decision = self._watch(engine, feeds, outputs)
            if decision is None:
                if engine is self.engine or not _odd_rows(outputs):
                    return outputs
                continue  # another batch beside this one said so first: ask who is in charge now
            if not self._step_up(engine, decision) or not decision.figures["odd"]:
                return outputs

    def pin(self, precision: str) -> None:
        """Have this rung answer, whatever signals say; empty: the one that signals led to. A rung that the version has not is left unpinned, and said."""
        wanted = precision or self._climbed
        if wanted == self.engine.precision:
            return
        try:
            engine = self._opened(wanted)
        except UserError as error:
            logger.warning("%s: cannot be pinned to %s: %s", self.name, wanted, error)
            return
        self._change(engine, f"pinned to {precision} by an operator" if precision else "no longer pinned")

    def close(self) -> None:
        """Free every engine that was opened."""
        for engine in self.open.values():
            engine.close()

    def status(self) -> dict[str, Any]:
        """Rungs, the one in charge, what was seen since it took over, and every change."""
        window = self.window
        seen = {"rows": window.rows, "odd": window.odd, "compared": window.compared, "agreed": window.agreed}
        return {"rungs": list(self.rungs), "rung": self.engine.precision, "window": seen, "steps": [vars(step) for step in self.steps]}

    def _watch(self, engine: Engine, feeds: Arrays, outputs: dict[str, NDArray[Any]]) -> Decision | None:
        """What the monitor says after this batch; None where there is no rung to go to, or nothing new to say."""
        if engine is not self.engine or engine.precision == self.rungs[-1] or self.engine.precision != self._climbed:
            return None
        rows, odd = len(next(iter(outputs.values()))), _odd_rows(outputs)
        with self._lock:
            if engine is not self.engine:
                return None
            window = self.window
            self._batches += 1
            window.rows += rows
            window.odd += odd
            sampled = bool(self.every) and self._batches % self.every == 0
        if sampled and not odd:
            wrong = differing(self._opened(self.rungs[-1]).run(feeds), outputs)
            with self._lock:
                window.compared += rows
                window.agreed += rows - wrong
        return decide(window, self.bounds) if odd or sampled else None

    def _step_up(self, engine: Engine, decision: Decision) -> bool:
        """Whether another engine is in charge now."""
        if decision.action != "fall back":
            return False
        with self._lock:
            if self.engine is not engine:  # another thread's batch said so first
                return True
        for rung in self.rungs[self.rungs.index(engine.precision) + 1 :]:
            try:
                better = self._opened(rung)
            except UserError as error:
                logger.error("%s: rung %s cannot be opened: %s", self.name, rung, error)
                continue
            self._climbed = rung
            self._change(better, decision.because)
            return True
        return False

    def _change(self, engine: Engine, because: str) -> None:
        with self._lock:
            step = Step(self.engine.precision, engine.precision, because, time.time())
            self.engine, self.window, self._batches = engine, Window(), 0
            self.steps = [*self.steps, step][-100:]
        logger.warning("%s: %s answers instead of %s: %s", self.name, step.now, step.before, because)

    def _opened(self, precision: str) -> Engine:
        if precision not in self.rungs:
            raise UserError(f"this version has {', '.join(self.rungs)}")
        if precision not in self.open:
            with self._lock:
                if precision not in self.open:
                    self.open[precision] = self.opener(precision)
        return self.open[precision]


def rungs_from(precision: str, admitted: Sequence[str]) -> list[str]:
    """The rungs that a version can climb: this one and all that are more exact."""
    return [precision, *(name for name in EXACTNESS[EXACTNESS.index(precision) + 1 :] if name in admitted)]


def _odd_rows(outputs: dict[str, NDArray[Any]]) -> int:
    """Rows with NaN or infinity in any answer."""
    floats = [array for array in outputs.values() if array.dtype.kind == "f"]
    if all(np.isfinite(array).all() for array in floats):
        return 0
    return int(np.any([~np.isfinite(array).reshape(len(array), -1).all(1) for array in floats], axis=0).sum())
