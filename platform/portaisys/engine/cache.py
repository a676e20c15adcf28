"""Built engines on disk, found again by what went into them.

An entry is an artifact (`artifact.py`) named by its key: the ONNX file's digest, the backend's version and code, the
device, the precision and the profile. One process builds, the others wait. An entry whose bytes are not those its
builder wrote is built again, never loaded: a plan is native code. A folder that grows beyond its bound loses what was
used longest ago. Knows nothing of what engines compute.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from portaisys import artifact, engine
from portaisys.artifact import Artifact
from portaisys.engine import RUN_ONLY, Engine, Options
from portaisys.spec import UserError, digest

FILE = "engine"
WAIT_S = 3600.0  # longer than any build; beyond it the builder hangs


@dataclass(frozen=True)
class Built:
    """A built engine. `sha256`: of the file at `path`; `reused`: it was there; `notes`: fall-backs; `build_s`: what the build took."""

    path: Path
    key: str
    sha256: str
    backend: str
    precision: str
    device: str
    reused: bool
    notes: tuple[str, ...]
    build_s: float


def get_or_build(onnx: Path, backend: str, options: Options, cache_dir: Path, max_bytes: int | None = None) -> Built:
    """The engine of an ONNX file, from `cache_dir` or built into it, which may then hold `max_bytes`.

    A folder that cannot be written is good enough for what stands in it.
    Raises UserError for an unknown backend or precision, a missing library, an unreadable ONNX file or cache folder.
    """
    module = engine.backend(backend)
    if options.precision not in module.PRECISIONS:
        raise UserError(f"engine.precisions: {options.precision!r} is not one of {', '.join(module.PRECISIONS)}, which backend {backend!r} has")
    about = _about(onnx, backend, module, options)
    key = digest(about)
    found, notes = _find(cache_dir / key, key)  # entries appear whole, so whoever only reads needs no lock
    if found is None:
        with _alone(cache_dir, key):
            found, notes = _find(cache_dir / key, key)
            if found is None:
                _build(onnx, module, options, cache_dir / key, about)
                if max_bytes is not None:
                    prune(cache_dir, max_bytes, keep=key)
                return _built(artifact.read(cache_dir / key), reused=False, notes=notes)
    _used_now(cache_dir / key)
    return _built(found, reused=True, notes=notes)


def load(built: Built, options: Options) -> Engine:
    """Open a built engine. Raises CannotExecute where this machine can only build it, UserError when the file has changed."""
    if artifact.hash_file(built.path) != built.sha256:
        raise UserError(f"{built.path}: is not the file that was built; delete it and build again")
    module = engine.backend(built.backend)
    loaded: Engine = module.load(built.path, options)
    return loaded


# --- what stands there ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """An entry of the cache. `used`: seconds since the epoch; `problem`: why it would be built again, empty when sound."""

    key: str
    backend: str
    precision: str
    device: str
    size_bytes: int
    used: float
    problem: str = ""


def entries(cache_dir: Path, *, verify: bool = False) -> list[Entry]:
    """All entries, last used first; with `verify` every byte is hashed. Raises UserError when there is no such folder."""
    if not cache_dir.is_dir():
        raise UserError(f"{cache_dir}: no engine cache there; name the folder with --cache, engines stand in its engines/")
    found = [_entry(path, verify) for path in cache_dir.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=lambda entry: -entry.used)


def prune(cache_dir: Path, max_bytes: int, *, keep: str = "") -> list[Entry]:
    """Remove what was used longest ago until at most `max_bytes` are left; returns what went. `keep`, and what is being built, stays."""
    there = entries(cache_dir)
    total, gone = sum(entry.size_bytes for entry in there), []
    for entry in reversed(there):
        if total <= max_bytes:
            break
        if entry.key != keep and _remove(cache_dir, entry.key):
            total -= entry.size_bytes
            gone.append(entry)
    return gone


def remove_unsound(cache_dir: Path) -> list[Entry]:
    """Hash every entry and remove those that would be built again; returns them."""
    return [entry for entry in entries(cache_dir, verify=True) if entry.problem and _remove(cache_dir, entry.key)]


def _entry(path: Path, verify: bool) -> Entry:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    used = path.stat().st_mtime
    try:
        about = artifact.read(path, verify=verify).spec
        return Entry(path.name, about["backend"], about["options"]["precision"], about["device"], size, used)
    except (UserError, OSError, KeyError, TypeError) as error:
        return Entry(path.name, "?", "?", "?", size, used, str(error))


def _remove(cache_dir: Path, key: str) -> bool:
    """Remove one entry, unless somebody is building it. A process that has it open keeps what it has."""
    try:
        with FileLock(cache_dir / f"{key}.lock", timeout=0):
            shutil.rmtree(cache_dir / key)
    except Timeout:
        return False
    except OSError as error:
        raise UserError(f"{cache_dir / key}: cannot be removed ({error.strerror}); the cache stays as large as it is") from error
    return True


def _used_now(entry: Path) -> None:
    with contextlib.suppress(OSError):  # of a folder that is only read nobody prunes
        os.utime(entry)


def _about(onnx: Path, backend: str, module: Any, options: Options) -> dict[str, Any]:
    """What decides a built file: not how it is run, but the code that builds it."""
    try:
        source = artifact.hash_file(onnx)
    except OSError as error:
        raise UserError(f"{onnx}: cannot be read ({error.strerror}); export the model again") from None
    profile = {name: value for name, value in asdict(options).items() if name not in RUN_ONLY}
    code = artifact.hash_file(Path(module.__file__))
    return {"onnx": source, "backend": backend, "version": module.version(), "device": module.device(), "options": profile, "code": code}


@contextlib.contextmanager
def _alone(cache_dir: Path, key: str) -> Iterator[None]:
    """Hold this key for this process: one builds, the others wait and find. The lock dies with its process."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f"{key}.lock", timeout=WAIT_S):
            yield
    except Timeout:
        raise UserError(f"{cache_dir}: another process has been building this engine for {WAIT_S:g} s; end it and try again") from None
    except OSError as error:
        raise UserError(f"storage.cache: {cache_dir} cannot be written ({error.strerror}); name a folder that can") from error


def _find(entry: Path, key: str) -> tuple[Artifact | None, tuple[str, ...]]:
    """The undamaged entry of this key, or None; and what was wrong with one that cannot be used."""
    if not entry.exists():
        return None, ()
    try:
        found = artifact.read(entry, verify=True)
        found.file(FILE)
    except (UserError, OSError) as error:
        return None, (f"the cached engine was not used, and built again: {error}",)
    if found.key != key:
        return None, (f"the cached engine was not used, and built again: {entry} holds an entry of another key",)
    return found, ()


def _build(onnx: Path, module: Any, options: Options, entry: Path, about: dict[str, Any]) -> None:
    for left in entry.parent.glob(f".{entry.name}.*"):  # drafts of builders that were killed: we hold the lock, so they are dead
        shutil.rmtree(left, ignore_errors=True)
    with artifact.writing(entry, kind="engine", key=digest(about), parents={"onnx": about["onnx"]}, spec=about) as draft:
        draft.notes.extend(module.build(onnx, options, draft.path / FILE))


def _built(found: Artifact, *, reused: bool, notes: tuple[str, ...]) -> Built:
    about = found.spec
    return Built(
        path=found.file(FILE), key=found.key, sha256=found.files[FILE], backend=about["backend"], precision=about["options"]["precision"],
        device=about["device"], reused=reused, notes=notes + found.notes, build_s=found.seconds,
    )  # fmt: skip
