"""The models and versions that one replica serves, by name and number; loading and unloading touches no other.

Which versions of a model are served is said by references: NAME@ALIAS, NAME@7, NAME@latest (the newest that passed its gate),
NAME@latest:3, NAME@all, NAME@2,5. Lives on one asyncio loop; opening, which takes seconds, happens in a thread. Knows neither
HTTP nor Ray.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from portaisys import registry
from portaisys.serve.model import BlockedError, Limits, ServedModel, open_reference
from portaisys.spec import Storage, UserError

logger = logging.getLogger(__name__)


class UnknownModelError(UserError):
    """No model, or no version of it, of this name is here."""


@dataclass
class Served:
    """The versions of one model: number -> model, or why it could not be loaded; `default` answers requests that name none."""

    models: dict[str, ServedModel] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    default: str = ""


@dataclass
class Repository:
    """Models by name. `opener`: a reference of one version -> the warm model; `expand`: a reference -> those of single versions, the default first.

    `generation` changes with every load and unload, for whoever remembers what was here.
    """

    opener: Callable[[str], ServedModel]
    expand: Callable[[str], Sequence[str]]
    served: dict[str, Served] = field(default_factory=dict)
    generation: int = 0
    _alone: dict[str, asyncio.Lock] = field(default_factory=dict)

    def pick(self, name: str, version: str | None = None) -> ServedModel:
        """The model that answers. Raises UnknownModelError, naming what is here."""
        found = self.served.get(name)
        if found is None or not found.models:
            raise UnknownModelError(f"unknown model; this server has {', '.join(sorted(name for name, one in self.served.items() if one.models)) or 'none'}")
        model = found.models.get(version or found.default)
        if model is None:
            raise UnknownModelError(f"unknown version of {name}; this server has {', '.join(sorted(found.models, key=int))}")
        return model

    def all(self) -> Iterator[ServedModel]:
        """Every model and version."""
        return (model for one in self.served.values() for model in one.models.values())

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

    async def load(self, reference: str) -> list[ServedModel]:
        """Open what a reference names and take it in; what of the same name is not named any more leaves, once the new is warm.

        Raises UserError when none of it opens: then everything is as it was. A version that fails beside others is noted (`index`).
        """
        name = reference.partition("@")[0]
        async with self._alone.setdefault(name, asyncio.Lock()):
            try:
                wanted = await asyncio.to_thread(self.expand, reference)
                opened = await self._open(name, wanted)
            finally:
                if name not in self.served:
                    self._alone.pop(name, None)  # names that do not exist must not gather
            before = list(self.served.get(name, Served()).models.values())
            for index, model in enumerate(opened):
                self.put(model, default=index == 0)
            await self._leave(name, [model for model in before if all(model is not new for new in opened)])
        return opened

    async def unload(self, name: str, version: str | None = None) -> None:
        """Take a model out, or one version of it; requests it has are answered first. Raises UnknownModelError."""
        self.pick(name, version)
        async with self._alone.setdefault(name, asyncio.Lock()):
            models = self.served[name].models
            await self._leave(name, [models[version]] if version else list(models.values()))

    async def close(self) -> None:
        """Unload everything."""
        for name in list(self.served):
            await self._leave(name, list(self.served[name].models.values()))

    def index(self) -> list[dict[str, Any]]:
        """Every version as the repository extension lists it: name, version, state, reason."""
        rows = []
        for name, one in sorted(self.served.items()):
            rows += [{"name": name, "version": number, "state": "READY" if one.models[number].ready else "UNAVAILABLE", "reason": ""} for number in self.versions(name)]
            rows += [{"name": name, "version": number, "state": "UNAVAILABLE", "reason": why} for number, why in sorted(one.failed.items())]
        return rows

    async def _open(self, name: str, wanted: Sequence[str]) -> list[ServedModel]:
        opened, reasons = [], {}
        for one in wanted:
            try:
                opened.append(await asyncio.to_thread(self.opener, one))
            except BlockedError as error:
                reasons[one.partition("@")[2]] = str(error)
                if len(wanted) == 1:
                    raise
            except UserError:
                # The cause may name paths; it is for the log, that there is one is for everybody.
                logger.exception("%s cannot be loaded", one)
                reasons[one.partition("@")[2]] = "could not be loaded; the server's log has the cause"
        if not opened:
            raise UserError(f"{name}: {'; '.join(reasons.values()) or 'no version of it is named'}")
        self.served.setdefault(name, Served()).failed.update(reasons)
        return opened

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
            self._alone.pop(name, None)
        self.generation += 1
        for model in models:
            await model.close()


def of_models(*models: ServedModel) -> Repository:
    """A repository of models that are open already, which loads no others."""

    def refuse(reference: str) -> Any:
        raise UserError(f"{reference.partition('@')[0]}: this server loads no models")

    repository = Repository(refuse, lambda reference: [reference])
    for model in models:
        repository.put(model)
    return repository


def of_storage(storage: Storage, limits: Limits, observe: Callable[[str], Callable[[Any], None] | None] = lambda reference: None) -> Repository:
    """A repository that opens published versions."""
    return Repository(lambda reference: open_reference(reference, storage, limits, observe(reference)), lambda reference: expand(reference, storage))


def expand(reference: str, storage: Storage) -> list[str]:
    """A reference as references of single versions, the one that answers by default first. Raises UserError for one that names nothing."""
    name, _, which = reference.partition("@")
    if re.fullmatch(r"\d+(,\d+)+", which):
        return [f"{name}@{number}" for number in sorted({*which.split(",")}, key=int, reverse=True)]
    latest = re.fullmatch(r"latest(?::(\d+))?", which)
    if not latest and which != "all":
        return [reference]  # an alias or a number, which open even while the registry is down
    passed = [version.version for version in registry.open_registry(storage, create=False).versions(name) if version.verdict == "pass"]
    if not passed:
        raise UserError(f"{reference}: no version of {name} has passed its gate")
    count = int(latest.group(1) or 1) if latest else len(passed)
    return [f"{name}@{number}" for number in sorted(passed, reverse=True)[:count]]
