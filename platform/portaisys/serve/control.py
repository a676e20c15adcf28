"""Release control inside a replica: which version answers a request that names none, and which one watches beside it.

What is wanted stands in the registry, the alias and the traffic of a name; every replica reads it every few seconds and makes it
so, on each of its paths alike. A canary answers a share of the requests; a shadow is asked what the version in charge is asked, its
answers are compared and never returned. Knows neither HTTP nor Ray.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from numpy.typing import NDArray
from scipy import stats

from portaisys.monitor import differing
from portaisys.serve.batcher import ClosedError, Outputs, QueueFullError, TooManySamplesError
from portaisys.serve.ladder import EXACTNESS
from portaisys.serve.model import ServedModel
from portaisys.spec import UserError

logger = logging.getLogger(__name__)

LAST = 1000  # a shadow's priority: behind everybody


@dataclass(frozen=True)
class Canary:
    """`percent` of the requests go to `version`; with `by`, a header, one value of it always to the same side."""

    version: str
    percent: float
    by: str = ""


@dataclass(frozen=True)
class Shadow:
    """`percent` of the requests are asked of `version` as well."""

    version: str
    percent: float = 100.0


@dataclass(frozen=True)
class Traffic:
    """What a name's registry entry says beside its alias. `pin`: the precision that answers, whatever signals say; empty: the one that they lead to."""

    canary: Canary | None = None
    shadow: Shadow | None = None
    pin: str = ""

    @property
    def versions(self) -> list[str]:
        """Versions that must be here for it."""
        return [one.version for one in (self.canary, self.shadow) if one is not None]

    def to_dict(self) -> dict[str, Any]:
        """As `traffic_of` reads it."""
        return {name: value for name, value in asdict(self).items() if value}


def traffic_of(tree: Mapping[str, Any]) -> Traffic:
    """Traffic out of plain values. Raises UserError for what makes no sense."""
    try:
        canary = Canary(**tree["canary"]) if tree.get("canary") else None
        shadow = Shadow(**tree["shadow"]) if tree.get("shadow") else None
    except TypeError as error:
        raise UserError(f"traffic: {error}; a canary has version, percent and by, a shadow version and percent") from None
    for what, one in (("canary", canary), ("shadow", shadow)):
        if one is not None and not (one.version.isdecimal() and 0 < one.percent <= 100):
            raise UserError(f"traffic: {what} {one.version!r} at {one.percent:g} %: a version is a number, a share above 0 and at most 100")
    pin = tree.get("pin", "")
    if pin not in ("", *EXACTNESS):
        raise UserError(f"traffic: pin {pin!r} is not one of {', '.join(EXACTNESS)}")
    return Traffic(canary, shadow, pin)


class Share:
    """Says yes to a percentage, exactly: of any hundred in a row so many, evenly spread, and by value always the same."""

    def __init__(self, percent: float) -> None:
        self._percent, self._sum = percent, 0.0

    def takes(self, value: str = "") -> bool:
        """Whether this one is in; with a value, by its hash."""
        if value:
            return int.from_bytes(hashlib.sha256(value.encode()).digest()[:4], "big") < self._percent / 100 * 2**32
        self._sum += self._percent
        if self._sum < 100:
            return False
        self._sum -= 100
        return True


@dataclass
class Compared:
    """Rows that a shadow answered too. `skipped`: requests it had no room for; `failed`: that it failed on."""

    rows: int = 0
    differing: int = 0
    skipped: int = 0
    failed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Counts, and Wilson's 95 % interval of the share that differs."""
        counts = asdict(self)
        if not self.rows:
            return counts
        interval = stats.binomtest(self.differing, self.rows).proportion_ci(0.95, "wilson")
        return {**counts, "share": self.differing / self.rows, "low": float(interval.low), "high": float(interval.high)}


@dataclass
class Release:
    """The traffic of one name at work."""

    traffic: Traffic = field(default_factory=Traffic)
    compared: Compared = field(default_factory=Compared)

    def __post_init__(self) -> None:
        self._canary = Share(self.traffic.canary.percent) if self.traffic.canary else None
        self._shadow = Share(self.traffic.shadow.percent) if self.traffic.shadow else None

    def version(self, default: str, headers: Mapping[str, str]) -> str:
        """The version that answers a request that names none. `headers`: of the request, lower-case names."""
        canary = self.traffic.canary
        if canary is None or self._canary is None:
            return default
        return canary.version if self._canary.takes(headers.get(canary.by, "") if canary.by else "") else default

    def watched(self, shadow: ServedModel | None, model: ServedModel, feeds: Mapping[str, NDArray[Any]]) -> Callable[[Outputs], None] | None:
        """Ask the shadow too; what is returned is to be told the answer that was given. None: not this one."""
        if shadow is None or shadow is model or self._shadow is None or not self._shadow.takes():
            return None
        pair = _Pair(self.compared)
        try:
            shadow.batcher.put(feeds, pair.theirs, priority=LAST)
        except (QueueFullError, ClosedError, TooManySamplesError):
            self.compared.skipped += 1
            return None
        return pair.ours


class _Pair:
    """Two answers to one request, whichever comes first."""

    def __init__(self, compared: Compared) -> None:
        self._compared = compared
        self._first: Outputs | None = None

    def ours(self, outputs: Outputs) -> None:
        self._take(outputs)

    def theirs(self, outputs: Outputs | None, problem: Exception | None) -> None:
        if outputs is None:
            self._compared.failed += 1
            logger.warning("a shadow failed: %s", problem)
        else:
            self._take(outputs)

    def _take(self, outputs: Outputs) -> None:
        if self._first is None:
            self._first = outputs
            return
        self._compared.differing += differing(self._first, outputs)
        self._compared.rows += len(next(iter(outputs.values())))
