"""What a group of Ray Train workers does when something goes wrong: who hears it, what it counts as, and where it is noted.

Ray has no public door for some of it (a signal needs the worker's main thread, and training runs in another); the private names are
of the ray that pyproject.toml pins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client
from ray.train.v2._internal.util import construct_user_exception_with_traceback

from portaisys.fits import RESTARTS, keep_note
from portaisys.spec import Stopped, UserError
from portaisys.watch import Hung, Watch, listen

_GRACE_S = 60.0  # that Ray has for ending a hung process, which otherwise ends itself

# A controller that is killed with its driver claims the cluster's resources for so long still, and the same command run again waits where fewer
# workers would do. Ray's own 180 s; a controller that lives renews its claim every 20 s.
autoscaling_coordinator_client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = 60

_told = threading.Event()
_log = logging.getLogger(__name__)


class Notice(WorkerCallback):  # type: ignore[misc]
    """Has each worker hear SIGTERM, on its main thread, where Ray calls this."""

    def after_init_train_context(self) -> None:
        listen(_told)


def asked_to_leave() -> bool:
    """Whether this worker was sent SIGTERM, or Ray says that the machine of one of the workers will be taken away."""
    return _told.is_set() or get_train_context().preemption_context.preemption_info is not None


def as_preemption(stopped: Stopped) -> Exception:
    """What a worker that left as asked raises: Ray restarts the group and does not count it as one of `max_failures`."""
    left: Exception = RayActorError(error_msg=f"asked to leave; all went on from step {stopped.step}, where they wrote a checkpoint", preempted=True)
    return left


class Failures(UserCallback):  # type: ignore[misc]
    """In Ray's controller: ends the run at once for what would only happen again, and notes what a restart mends."""

    def __init__(self, work: str, key: str) -> None:
        self._file, self._key = Path(work) / RESTARTS, key

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        cause = cause_of(worker_exceptions)
        if isinstance(cause, UserError):
            raise cause
        keep_note(self._file, self._key, f"the workers began again: {cause}")


def cause_of(failures: Mapping[int, BaseException]) -> UserError | str:
    """The failure that explains the others: a user's own error, then a hung worker, then one that died, whose loss the others saw as lost connections."""
    causes = {rank: getattr(error, "health_check_failure", None) or getattr(error, "cause", None) or error for rank, error in failures.items()}
    for error in causes.values():
        if isinstance(error, UserError):
            return error
    for kind in (Hung, RayActorError, BaseException):
        for rank, error in causes.items():
            if isinstance(error, kind):
                return str(error) if isinstance(error, Hung) else f"rank {rank}: {_line(error)}"
    return "for no reason that Ray knows"


def _line(error: BaseException) -> str:
    if isinstance(error, RayActorError) and not error.preempted:
        return "its process or machine is gone"
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


@contextlib.contextmanager
def watched(rank: int, world: int, timeout_s: float) -> Iterator[Callable[[int, str], None]]:
    """`mark` of a watch over this group that ends the group when it hangs; one that does nothing when `timeout_s` is 0."""
    if not timeout_s:
        yield lambda step, doing: None
        return
    with Watch(_store(world, timeout_s), rank, world, timeout_s, _end_group, f"node {ray.util.get_node_ip_address()}, process {os.getpid()}") as watch:
        yield watch.mark


def _store(world: int, timeout_s: float) -> Any:
    """The store of the process group through a connection of its own, which waits for nobody else's."""
    if world == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    store: Any = dist.distributed_c10d._get_default_store()
    store = store.clone()
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _end_group(text: str) -> None:
    """Tell Ray, which ends all workers and starts them again; end this process by itself where Ray is gone."""
    _log.error(text)
    runner = get_train_context().execution_context.training_thread_runner
    runner.get_exception_queue().put(construct_user_exception_with_traceback(Hung(text)))
    time.sleep(_GRACE_S)
    os._exit(1)
