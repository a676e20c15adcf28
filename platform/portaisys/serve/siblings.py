"""The replicas of one application tell each other what was loaded or unloaded by hand: a client asks one, and means all.

What they tell is kept by none but themselves: a replica that starts asks the others, and when all of an application's have gone,
its arguments and the registry are what counts again. Knows Ray; what a change means is protocol.py's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError

from portaisys.spec import UserError

logger = logging.getLogger("portaisys.serve")

TOLD_S = 120.0  # until all have done it: loading may build an engine

Change = tuple[str, dict[str, Any]]  # action, parameters


class Siblings:
    """The replicas beside this one, by Ray's own handle. Made inside a replica."""

    def __init__(self) -> None:
        context = serve.get_replica_context()
        self.mine = context.replica_id.unique_id
        self._handle = serve.get_deployment_handle(context.deployment, context.app_name)

    async def tell(self, name: str, action: str, parameters: Mapping[str, Any]) -> None:
        """Have them all do it. Raises UserError when not all did."""
        answers = await asyncio.to_thread(self._broadcast, "changed", self.mine, name, action, dict(parameters))
        failed = [answer for answer in answers if isinstance(answer, Exception) or answer]
        if failed:
            raise UserError(f"{name}: done here, and not by {len(failed)} of {len(answers)} replicas ({failed[0]}); ask again")

    async def changes(self) -> dict[str, Change]:
        """What the others were told before this one came; nothing when there are none, or they do not answer."""
        try:
            answers = await asyncio.to_thread(self._broadcast, "changes", self.mine)
        except UserError as problem:
            logger.warning("what was loaded by hand is not known: %s", problem)
            return {}
        return {name: change for answer in answers if isinstance(answer, dict) for name, change in answer.items()}

    def _broadcast(self, method: str, *arguments: Any) -> list[Any]:
        try:
            return list(self._handle.broadcast(method, *arguments).results(timeout_s=TOLD_S))
        except (RayError, RuntimeError, TimeoutError) as error:
            raise UserError(f"the other replicas cannot be asked ({type(error).__name__}); ask again") from error
