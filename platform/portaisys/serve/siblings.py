"""The replicas of one application tell each other what was loaded or unloaded by hand: a client asks one, and means all.

What they tell is kept by none but themselves: a replica that starts asks the others, and when all of an application's have gone,
its arguments and the registry are what counts again. Knows Ray; what a change means is protocol.py's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.exceptions import ActorDiedError, RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from portaisys.serve.repository import Change
from portaisys.spec import UserError

logger = logging.getLogger("portaisys.serve")

TOLD_S = 120.0  # until all have done it: loading may build an engine
ASKED_S = 10.0  # until all have said what they did

Changes = dict[str, list[Change]]


class Siblings:
    """The replicas beside this one, by Ray's own handle. Made inside a replica. `references`: of the application's arguments."""

    def __init__(self, references: Sequence[str]) -> None:
        context = serve.get_replica_context()
        self.mine, self.references = context.replica_id.unique_id, list(references)
        self._handle = serve.get_deployment_handle(context.deployment, context.app_name)

    async def tell(self, name: str, change: Change) -> None:
        """Have them all do it. Raises UserError when not all did that are still there."""
        answers = await asyncio.to_thread(self._broadcast, TOLD_S, "changed", self.mine, name, change)
        failed = [answer for answer in answers if answer]
        if failed:
            raise UserError(f"{name}: done here, and not by {len(failed)} of {len(answers)} replicas ({failed[0]}); ask again")

    async def changes(self) -> Changes:
        """What the others were told before this one came, the latest of each name; nothing when there are none. Raises UserError when one does not say."""
        latest: Changes = {}
        for answer in await asyncio.to_thread(self._broadcast, ASKED_S, "changes", self.mine, self.references):
            if isinstance(answer, Exception):
                raise UserError(f"a replica does not say what was loaded by hand ({type(answer).__name__})")
            for name, changes in answer.items():
                if name not in latest or changes[-1].when > latest[name][-1].when:
                    latest[name] = changes
        return latest

    def _broadcast(self, timeout_s: float, method: str, *arguments: Any) -> list[Any]:
        """The answers of all replicas, those left out that have died. Raises UserError when they cannot be asked."""
        try:
            answers = self._handle.broadcast(method, *arguments).results(timeout_s=timeout_s, return_exceptions=True)
        except DeploymentUnavailableError:
            return []  # there is nobody
        except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
            raise UserError(f"the other replicas cannot be asked ({type(error).__name__}); ask again") from error
        return [answer for answer in answers if not isinstance(answer, ActorDiedError)]
