"""How far the operators of this process must give the same bits each time (`train.determinism`), and on how many threads. Everything random is seeded in any case.

The modes are torch's and of the whole process, so whoever owns the process sets them around the work and gets the old ones back.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from portaisys.spec import UserError

_CUBLAS, _SOUND = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
_NAMED = re.compile(r"(\S+) does not have a deterministic implementation")


@contextmanager
def determined(mode: str, note: Callable[[str], None]) -> Iterator[None]:
    """`seeded`: torch as it is. `warn`: deterministic forms where there are any, `note` is told each operator that has none. `strict`: UserError for such a one.

    Enter it before CUDA is used: cuBLAS reads its workspace's size once (https://docs.pytorch.org/docs/stable/notes/randomness.html).
    """
    if mode == "seeded":
        yield
        return
    with _kept():
        if os.environ.get(_CUBLAS) not in _SOUND:
            os.environ[_CUBLAS] = _SOUND[0]
        torch.use_deterministic_algorithms(True, warn_only=mode == "warn")
        if mode == "strict":
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        try:
            with _told(note):
                yield
        except RuntimeError as error:
            if not (found := _NAMED.search(str(error))):
                raise
            raise UserError(f"train.determinism: strict, and {found[1]} has no deterministic form on this device; take another layer in the model, or train.determinism=warn") from error


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch's operators, for the time of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _kept() -> Iterator[None]:
    """What is set within the block is as before it again."""
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    mode, cublas = torch.get_deterministic_debug_mode(), os.environ.get(_CUBLAS)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        os.environ.pop(_CUBLAS, None)
        if cublas is not None:
            os.environ[_CUBLAS] = cublas


@contextmanager
def _told(note: Callable[[str], None]) -> Iterator[None]:
    """torch's warnings of operators without a deterministic form become one note each; others pass."""
    seen: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.filterwarnings("always", _NAMED.pattern, UserWarning)

        def hear(message: Warning | str, *rest: object, **more: object) -> None:
            found = _NAMED.search(str(message))
            if not found:
                show(message, *rest, **more)  # type: ignore[arg-type]
            elif found[1] not in seen:
                seen.add(found[1])
                note(f"train.determinism: {found[1]} has no deterministic form on this device, so results may differ in their last bits from run to run")

        warnings.showwarning = hear
        yield
