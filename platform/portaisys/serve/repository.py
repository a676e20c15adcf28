"""The models and versions that one replica serves, by name and number; loading and unloading touches no other.

Which versions of a model are served is said by references: NAME@ALIAS, NAME@7, NAME@latest (the newest that passed its gate),
NAME@latest:3, NAME@all, NAME@2,5. What a reference names is looked up again every few seconds (`refresh`), so a promotion or a roll back
in the registry is followed, and so is its traffic: canary and shadow (control.py). Where memory is limited, the model that was asked
least recently leaves it and comes back when it is asked. Lives on one asyncio loop; opening, which takes seconds, happens in a thread.
Knows neither HTTP nor Ray.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from numpy.typing import NDArray

from portaisys import registry
from portaisys.serve.answers import Answers
from portaisys.serve.batcher import Outputs
from portaisys.serve.control import Release, Traffic, traffic_of
from portaisys.serve.model import BlockedError, Limits, Observer, ServedModel, open_reference
from portaisys.spec import Storage, UserError

logger = logging.getLogger(__name__)

RETRY_S = 60.0  # between attempts at a version that could not be loaded
BROKEN_S = 5.0  # between attempts at a model that left memory and does not come back

Result = TypeVar("Result")


class UnknownModelError(UserError):
    """No model, or no version of it, of this name is here."""


class RestingError(UserError):
    """The model `name` has left memory; `Repository.wake` brings it back."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} has left memory")
        self.name = name


@dataclass(frozen=True)
class Change:
    """A load or unload that a client asked for. `when`: seconds since the epoch, by the clock of whoever was asked."""

    when: float
    action: str
    parameters: dict[str, Any]


async def _nobody_else(name: str, change: Change) -> None:
    """There are no others to tell."""


@dataclass
class Served:
    """The versions of one model: number -> model, or why it could not be loaded; `default` answers requests that name none.

    `asked`: when it was asked last, by the repository's count; `resting`: it left memory; `memory_bytes`: what it took there; `rested`: the
    versions that left; `broken_until`: monotonic, before which it is not tried to have it back.
    """

    reference: str = ""
    models: dict[str, ServedModel] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    default: str = ""
    release: Release = field(default_factory=Release)
    tried: tuple[list[str], Traffic] = field(default_factory=lambda: ([], Traffic()))  # what was wanted when it became what it is
    retry_at: float = math.inf  # monotonic, where some of that failed
    asked: int = 0
    resting: bool = False
    memory_bytes: int = 0
    rested: frozenset[str] = frozenset()
    broken_until: float = 0.0

    @property
    def held_bytes(self) -> int:
        """What its engines take now."""
        return sum(model.memory_bytes for model in self.models.values())


@dataclass
class Repository:
    """Models by name. `opener`: a reference of one version -> the warm model; `expand`: a reference -> those of single versions, the default first.

    `traffic`: what the registry says of a name's canary and shadow. `generation` changes with every load and unload, for whoever
    remembers what was here. `most_bytes`: what engines may take together. `tell_others`: tells other replicas of what was loaded or unloaded
    by hand; `by_hand`: that, by name; `untold`: names of which not all know yet. `ports`: where else this repository is asked, for clients to read.
    """

    opener: Callable[[str], ServedModel]
    expand: Callable[[str], Sequence[str]]
    traffic: Callable[[str], Traffic] = lambda name: Traffic()
    served: dict[str, Served] = field(default_factory=dict)
    generation: int = 0
    most_bytes: int | None = None
    tell_others: Callable[[str, Change], Awaitable[None]] = _nobody_else
    by_hand: dict[str, list[Change]] = field(default_factory=dict)
    untold: set[str] = field(default_factory=set)
    ports: dict[str, int] = field(default_factory=dict)
    _asked: int = 0
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _waking: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _alone: dict[str, asyncio.Lock] = field(default_factory=dict)

    def pick(self, name: str, version: str | None = None, headers: Mapping[str, str] | None = None) -> ServedModel:
        """The model that answers; with no version the default one, or for an inference request, whose headers are given, the canary.

        Raises UnknownModelError, naming what is here, or RestingError.
        """
        found = self.served.get(name)
        if found is None or not found.models:
            if found is not None and found.resting:
                raise RestingError(name)
            raise UnknownModelError(f"unknown model; this server has {', '.join(sorted(name for name, one in self.served.items() if one.models)) or 'none'}")
        self._asked += 1
        found.asked = self._asked
        chosen = version or (found.default if headers is None else found.release.version(found.default, headers))
        model = found.models.get(chosen) or (found.models.get(found.default) if version is None else None)
        if model is None:
            raise UnknownModelError(f"unknown version of {name}; this server has {', '.join(sorted(found.models, key=int))}")
        return model

    def watched(self, model: ServedModel, feeds: Mapping[str, NDArray[Any]]) -> Callable[[Outputs], None] | None:
        """Ask the shadow of this model's name too, if there is one; returns who is to be told the answer."""
        one = self.served.get(model.name)
        if one is None or one.release.traffic.shadow is None:
            return None
        return one.release.watched(one.models.get(one.release.traffic.shadow.version), model, feeds)

    def all(self) -> Iterator[ServedModel]:
        """Every model and version in memory. From any thread: models may come and go meanwhile."""
        return (model for one in list(self.served.values()) for model in list(one.models.values()))

    @property
    def ready(self) -> bool:
        """Whether there is a model, in memory or on its way back, and none in memory hangs."""
        return any(one.models or one.resting for one in list(self.served.values())) and all(model.ready for model in self.all())

    def versions(self, name: str) -> list[str]:
        """Numbers of a model's versions here, oldest first."""
        return sorted(self.served[name].models, key=int)

    def put(self, model: ServedModel, *, default: bool = True) -> ServedModel | None:
        """Take a warm model in; returns the one whose place it took."""
        one = self.served.setdefault(model.name, Served())
        before = one.models.get(model.version)
        one.models[model.version] = model
        one.failed.pop(model.version, None)
        if default or not one.default:
            one.default = model.version
        self.generation += 1
        return before

    async def load(self, reference: str) -> None:
        """Open what a reference names and take it in; what of the same name is not named any more leaves, once the new is warm.

        Raises UserError when none of it opens: then everything is as it was. A version that fails beside others is noted (`index`).
        """
        name = reference.partition("@")[0]
        async with self._alone.setdefault(name, asyncio.Lock()):
            try:
                wanted = list(await asyncio.to_thread(self.expand, reference))
                await self._become(name, reference, wanted, await self._traffic(name))
            finally:
                if name not in self.served:
                    self._alone.pop(name, None)  # names that do not exist must not gather

    def rests(self, name: str) -> bool:
        """Whether the model left memory, and comes back when it is asked."""
        return name in self.served and self.served[name].resting

    async def whole(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await `work`, which goes on to its end when whoever asked for it leaves: half a load or unload helps nobody."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def wake(self, name: str) -> None:
        """Have the model in memory again, if it is one that left. Raises UserError when it cannot be opened any more."""
        while self.rests(name):  # it may have left again by the time we are told that it came
            waking = self._waking.get(name)
            if waking is None:
                waking = self._waking[name] = asyncio.get_running_loop().create_task(self._wake(name))
                waking.add_done_callback(lambda _: self._waking.pop(name, None))
            await asyncio.shield(waking)

    async def _wake(self, name: str) -> None:
        async with self._alone.setdefault(name, asyncio.Lock()):
            if not self.rests(name):
                return
            one = self.served[name]
            if time.monotonic() < one.broken_until:  # else each request would send others to rest for nothing
                raise UserError(f"{name}: could not be loaded a moment ago")
            one.broken_until = time.monotonic() + BROKEN_S
            wanted, traffic = list(await asyncio.to_thread(self.expand, one.reference)), await self._traffic(name)
            known = (wanted, traffic) == one.tried
            # With nothing new in the registry it is what it was: what was unloaded by hand stays out.
            back = [reference for reference in wanted if reference.partition("@")[2] in one.rested] if known else wanted
            await self._make_room(name, one.memory_bytes)
            await self._become(name, one.reference, back or wanted, traffic)
            one.tried, one.broken_until = (wanted, traffic), 0.0
            logger.info("%s: in memory again", name)

    async def spread(self, name: str, action: str, parameters: Mapping[str, Any]) -> None:
        """Remember what was done by hand, and have it done wherever else these models are."""
        change = Change(time.time(), action, dict(parameters))
        self.remember(name, change)
        self.untold.add(name)
        await self.tell_others(name, change)
        self.untold.discard(name)

    def remember(self, name: str, change: Change) -> bool:
        """Keep what was done by hand, or is about to be; False for what is older than the last. Of one version's unloading the changes before it count on."""
        kept = self.by_hand.get(name, [])
        if kept and change.when <= kept[-1].when:
            return False
        partial = change.action == "unload" and change.parameters.get("version")
        self.by_hand[name] = [*kept, change][-100:] if partial else [change]
        return True

    async def refresh(self) -> None:
        """Follow the registry: what references name now, and their traffic. What fails is logged, and everything is as it was."""
        for name, one in list(self.served.items()):
            try:
                await self._follow(name, one)
            except UserError as error:
                logger.warning("%s stays as it is: %s", name, error)

    async def _follow(self, name: str, one: Served) -> None:
        if one.resting:  # what it is by then is looked up when it wakes
            return
        reference = one.reference
        wanted = list(await asyncio.to_thread(self.expand, reference))
        traffic = await asyncio.to_thread(self.traffic, name)
        async with self._alone.setdefault(name, asyncio.Lock()):
            if self.served.get(name) is not one or one.reference != reference or not _differs(one, wanted, traffic):
                return
            one.tried, one.retry_at = (wanted, traffic), time.monotonic() + RETRY_S  # so it stands when it fails
            await self._become(name, reference, wanted, traffic)
        logger.info("%s: now %s by default, traffic %s", name, one.default, traffic.to_dict())

    async def _traffic(self, name: str) -> Traffic:
        """The traffic of a name that is loaded; what it had, or none, where the registry does not tell."""
        try:
            return await asyncio.to_thread(self.traffic, name)
        except UserError as error:
            logger.warning("%s: its traffic stays as it is: %s", name, error)
            return self.served[name].release.traffic if name in self.served else Traffic()

    async def _become(self, name: str, reference: str, wanted: list[str], traffic: Traffic) -> None:
        """Have exactly these versions here, and those that the traffic needs."""
        extra = [f"{name}@{version}" for version in traffic.versions if f"{name}@{version}" not in wanted]
        before = dict(self.served[name].models) if name in self.served else {}
        opened, reasons = await self._open([*wanted, *extra], before)
        named = {model.version for model in opened}
        if not any(model.version not in traffic.versions or f"{name}@{model.version}" in wanted for model in opened):
            raise UserError(f"{name}: {'; '.join(reasons.values()) or 'no version of it is named'}")
        await self._refuse_too_large(name, opened, before)
        for index, model in enumerate(opened):
            self.put(model, default=index == 0)
        one = self.served[name]
        one.reference, one.failed, one.resting = reference, reasons, False
        one.tried, one.retry_at = (wanted, traffic), time.monotonic() + RETRY_S if reasons else math.inf
        if traffic != one.release.traffic:
            one.release = Release(traffic)
        for model in opened:
            if model.ladder is not None:
                await asyncio.to_thread(model.ladder.pin, traffic.pin)
        await self._leave(name, [model for number, model in before.items() if number not in named])
        await self._make_room(name)

    async def _refuse_too_large(self, name: str, opened: Sequence[ServedModel], before: Mapping[str, ServedModel]) -> None:
        """Raises UserError, the new ones closed, when these models alone are more than what may be in memory."""
        need = sum(model.memory_bytes for model in opened)
        if self.most_bytes is None or need <= self.most_bytes:
            return
        for model in opened:
            if model not in before.values():
                await model.close()
        raise UserError(
            f"{name}: its engines take about {need / 2**20:.1f} MiB, and memory_mib allows {self.most_bytes / 2**20:.1f} for all models; name fewer versions, or raise it"
        )

    async def _make_room(self, name: str, coming: int = 0) -> None:
        """While all together take more than they may, the model that was asked least recently leaves memory; never this one."""
        while self.most_bytes is not None and coming + sum(one.held_bytes for one in self.served.values()) > self.most_bytes:
            others = [
                other
                for other, one in self.served.items()
                if other != name and one.models and not self._alone.setdefault(other, asyncio.Lock()).locked()
            ]
            if not others:
                logger.warning("%s: more is in memory than memory_mib allows, until what is being loaded beside it is there", name)
                return
            await self._rest(min(others, key=lambda other: self.served[other].asked))

    async def _rest(self, name: str) -> None:
        """Out of memory, and back when it is asked."""
        async with self._alone[name]:
            one = self.served.get(name)
            if one is None or not one.models:
                return
            models, one.memory_bytes, one.rested = list(one.models.values()), one.held_bytes, frozenset(one.models)
            one.models, one.resting = {}, True
            self.generation += 1
            logger.info("%s: asked least recently, so it left memory (%.1f MiB)", name, one.memory_bytes / 2**20)
            for model in models:
                await model.close()

    async def unload(self, name: str, version: str | None = None) -> None:
        """Take a model out, or one version of it; requests it has are answered first. It stays out until the registry says otherwise. Raises UnknownModelError."""
        self._known(name, version)
        async with self._alone.setdefault(name, asyncio.Lock()):
            self._known(name, version)  # somebody else may have been faster
            if self.rests(name):
                one = self.served[name]
                one.rested -= {version or ""}
                if not version or not one.rested:
                    del self.served[name]
                return
            models = self.served[name].models
            await self._leave(name, [models[version]] if version else list(models.values()))

    def _known(self, name: str, version: str | None) -> None:
        if not self.rests(name):
            self.pick(name, version)
        elif version and version not in self.served[name].rested:
            raise UnknownModelError(f"unknown version of {name}; this server has {', '.join(sorted(self.served[name].rested, key=int))}")

    async def close(self) -> None:
        """Unload everything, once what is under way is done."""
        await asyncio.gather(*self._tasks, *self._waking.values(), return_exceptions=True)
        for name in list(self.served):
            await self._leave(name, list(self.served[name].models.values()))

    def index(self) -> list[dict[str, Any]]:
        """Every version as the repository extension lists it: name, version, state, reason."""
        rows = []
        for name, one in sorted(self.served.items()):
            rows += [{"name": name, "version": number, "state": "READY" if one.models[number].ready else "UNAVAILABLE", "reason": ""} for number in self.versions(name)]
            rows += [{"name": name, "version": one.default, "state": "UNAVAILABLE", "reason": "left memory; comes back when it is asked"}] * one.resting
            rows += [{"name": name, "version": number, "state": "UNAVAILABLE", "reason": why} for number, why in sorted(one.failed.items())]
        return rows

    def status(self, name: str) -> dict[str, Any]:
        """Who answers: the default version, the traffic, and what the shadow was found to answer."""
        one = self.served[name]
        return {"name": name, "reference": one.reference, "default": one.default, "versions": self.versions(name), "ladders": {number: model.ladder.status() for number, model in one.models.items() if model.ladder}, **one.release.traffic.to_dict(), "compared": one.release.compared.to_dict()}

    async def _open(self, wanted: Sequence[str], here: Mapping[str, ServedModel]) -> tuple[list[ServedModel], dict[str, str]]:
        """The models of these references, those that are here already as they are, and why others are not."""
        opened: list[ServedModel] = []
        reasons: dict[str, str] = {}
        for one in wanted:
            number = one.partition("@")[2]
            try:
                opened.append(here[number] if number in here else await asyncio.to_thread(self.opener, one))
            except BlockedError as error:
                reasons[number] = str(error)
                if len(wanted) == 1:
                    raise
            except UserError:
                # The cause may name paths; it is for the log, that there is one is for everybody.
                logger.exception("%s cannot be loaded", one)
                reasons[number] = "could not be loaded; the server's log has the cause"
        return opened, reasons

    async def _leave(self, name: str, models: Sequence[ServedModel]) -> None:
        """Out of sight first, then closed: who asks from now on does not meet them."""
        one = self.served[name]
        for model in models:
            if one.models.get(model.version) is model:
                del one.models[model.version]
        if one.default not in one.models:
            one.default = max(one.models, key=int, default="")
        if not one.models:
            del self.served[name]
        self.generation += 1
        for model in models:
            await model.close()


def _differs(one: Served, wanted: list[str], traffic: Traffic) -> bool:
    """Whether the registry wants other things than when it was followed last, or it is time to try again what failed then."""
    if not all(reference.partition("@")[2].isdecimal() for reference in wanted):  # it is down: an alias could not be looked up
        return False
    return (wanted, traffic) != one.tried or time.monotonic() >= one.retry_at


def of_models(*models: ServedModel) -> Repository:
    """A repository of models that are open already, which loads no others."""

    def refuse(reference: str) -> Any:
        raise UserError(f"{reference.partition('@')[0]}: this server loads no models")

    repository = Repository(refuse, lambda reference: [reference])
    for model in models:
        repository.put(model)
    return repository


@dataclass(frozen=True)
class Room:
    """What all models of a replica may take together. `memory_mib`: of engines (None: as much as there is); `answers_mib`: of kept answers (0: none are)."""

    memory_mib: float | None = None
    answers_mib: float = 0.0


def of_storage(storage: Storage, limits: Limits, observer: Callable[[str], Observer | None] = lambda reference: None, room: Room = Room()) -> Repository:
    """A repository that opens published versions. `observer`: who is told of a reference's requests."""
    answers = Answers(int(room.answers_mib * 2**20)) if room.answers_mib else None
    return Repository(
        lambda reference: open_reference(reference, storage, limits, observer(reference), answers), lambda reference: expand(reference, storage), lambda name: traffic_in(name, storage),
        most_bytes=None if room.memory_mib is None else int(room.memory_mib * 2**20),
    )  # fmt: skip


def traffic_in(name: str, storage: Storage) -> Traffic:
    """A name's traffic in the registry. Raises UserError while it is down, and for an entry that makes no sense."""
    return traffic_of(registry.open_registry(storage, create=False).traffic(name))


def expand(reference: str, storage: Storage) -> list[str]:
    """A reference as references of single versions, the one that answers by default first. Raises UserError for one that names nothing."""
    name, _, which = reference.partition("@")
    if re.fullmatch(r"\d+(,\d+)+", which):
        return [f"{name}@{number}" for number in sorted({*which.split(",")}, key=int, reverse=True)]
    latest = re.fullmatch(r"latest(?::(\d+))?", which)
    if which.isdecimal():
        return [reference]
    if not latest and which != "all":
        try:
            return [str(registry.open_registry(storage, create=False).resolve(reference))]
        except registry.UnreachableError:
            return [reference]  # whose local copy opens while the registry is down
    passed = [version.version for version in registry.open_registry(storage, create=False).versions(name) if version.verdict == "pass"]
    if not passed:
        raise UserError(f"{reference}: no version of {name} has passed its gate")
    count = int(latest.group(1) or 1) if latest else len(passed)
    return [f"{name}@{number}" for number in sorted(passed, reverse=True)[:count]]
