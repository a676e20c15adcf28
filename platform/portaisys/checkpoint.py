"""Checkpoints: all that is needed to go on, written while training goes on, whole or not at all.

Two slots take turns, so that the newest whole checkpoint is never touched while the next one is written. Each is an artifact:
a folder whose manifest, with a SHA-256 for every file, is written last and whose name appears at once. Knows tensors and plain
values by name, not what they mean.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from portaisys import artifact
from portaisys.artifact import Artifact
from portaisys.spec import UserError, changes

SLOTS = ("checkpoint-a", "checkpoint-b")
TENSORS = "state.safetensors"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What stands in a slot. `state`: plain values, `step` among them, the number of steps done."""

    path: Path
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def step(self) -> int:
        return int(self.state["step"])


# --- reading ------------------------------------------------------------------------------------------------------


def steps(folder: Path) -> int:
    """Steps done by the newest checkpoint's manifest, 0 when there is none. Files are not looked at."""
    return max((step for slot in SLOTS if (step := _step(folder / slot)) is not None), default=0)


def state(folder: Path) -> Mapping[str, Any]:
    """What the newest checkpoint's manifest says, empty when there is none that can be read. Files are not looked at."""
    slots = [slot for slot in _by_age(folder) if _step(slot) is not None]
    return artifact.read(slots[0]).scores if slots else {}


def foreign(folder: Path, key: str) -> bool:
    """Whether a checkpoint there carries another key. Files are not looked at."""
    for slot in SLOTS:
        with contextlib.suppress(UserError):
            if artifact.read(folder / slot).key != key:
                return True
    return False


def by_turn(folder: Path) -> list[str]:
    """Names of the slots, first the one to be written next: the other holds the newest."""
    return sorted(SLOTS, key=lambda slot: _step(folder / slot) or -1)


def newest(folder: Path, key: str, fields: Mapping[str, Any], note: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, None when there is none. A damaged one is passed over for the one before it, and `note` told.

    Raises UserError when all are damaged, and for one with another `key`, naming the `fields` that differ.
    """
    damage = []
    for slot in _by_age(folder):
        try:
            found, tensors = _whole(slot)
        except UserError as error:
            damage.append(str(error))
            continue
        if found.key != key:
            raise UserError(f"train: {slot} was written by a run of another spec, data or parent{_differing(found.spec, fields)}; go on with those, take another name (name=...), or delete {folder}")
        if damage:
            note(f"the newest checkpoint is damaged, so training goes on from the one before it, of step {found.scores['step']} ({damage[0]})")
        return Checkpoint(slot, found.scores, tensors)
    if damage:
        raise UserError(f"train: no checkpoint is whole ({'; '.join(damage)}); delete {folder} to train from the start")
    return None


def _by_age(folder: Path) -> list[Path]:
    """Slots that hold something, newest first; one whose manifest cannot be read may be the newest."""
    there = [folder / slot for slot in SLOTS if (folder / slot).exists()]
    return sorted(there, key=lambda slot: -(_step(slot) or float("inf")))


def _step(slot: Path) -> int | None:
    try:
        return int(artifact.read(slot).scores["step"])
    except (UserError, KeyError, TypeError, ValueError):
        return None


def _whole(slot: Path) -> tuple[Artifact, dict[str, Tensor]]:
    """Raises UserError for one that is damaged or none of ours."""
    found = artifact.read(slot, verify=True)
    try:
        int(found.scores["step"])
        return found, safetensors.torch.load_file(found.file(TENSORS))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{slot}: no checkpoint of ours ({error})") from None


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    differ = [*changes(before, now).values()] if before and now else []
    return f": {', '.join(differ)}" if differ else ""


# --- writing ------------------------------------------------------------------------------------------------------


class Writer:
    """Copies the state at once and writes the copy in a thread, one at a time, into the slot that is not the newest.

    A context manager: what is being written when the block is left is written to its end. `keep`: the checkpoint gone on from.
    """

    def __init__(self, folder: Path, key: str, fields: Mapping[str, Any], keep: Checkpoint | None = None) -> None:
        self._folder, self._key, self._fields = folder, key, dict(fields)
        self._newest: tuple[Path, int] | None = (keep.path, keep.step) if keep else None
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._fresh: Path | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.wait()
        elif self._thread:
            self._thread.join()
            if self._failure:
                _log.error("the last checkpoint was not written either: %s", self._failure)

    def save(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Returns when all is copied; waits for the write before it. Raises UserError when that one failed."""
        self.wait()
        self._copy(tensors)
        self._thread = threading.Thread(target=self._write, args=(dict(state),), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises UserError when a write failed, with the cause."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._failure:
            raise self._told(self._failure) from self._failure

    def written(self) -> Path | None:
        """The folder of a checkpoint that was finished since this was last asked."""
        with self._lock:
            done, self._fresh = self._fresh, None
        return done

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Into the memory of the copy before: fresh pages cost more than the copying."""
        device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        for name, tensor in tensors.items():
            if name not in self._copies or self._copies[name].shape != tensor.shape:
                self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name].copy_(tensor.detach(), non_blocking=True)
        if device:
            torch.cuda.synchronize(device)  # one wait for all of them

    def _write(self, state: dict[str, Any]) -> None:
        slot = self._folder / next(name for name in SLOTS if not self._newest or name != self._newest[0].name)
        try:
            with artifact.writing(slot, kind="checkpoint", key=self._key, parents={}, spec=self._fields) as draft:
                safetensors.torch.save_file(self._copies, draft.path / TENSORS)
                draft.scores.update(state)
            with self._lock:
                self._newest, self._fresh = (slot, state["step"]), slot
        except BaseException as error:  # whatever it is, it ends the training, in the thread that can say so
            self._failure = error

    def _told(self, error: BaseException) -> UserError:
        cause = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        left = f"the one of step {self._newest[1]} is whole and is what a new start goes on from" if self._newest else "there is none before it"
        return UserError(f"storage.path: a checkpoint cannot be written in {self._folder}: {cause}; {left}; free space there, or name another storage.path")
