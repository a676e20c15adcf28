"""Built engines on disk, found again by what went into them.

An entry is an artifact (`artifact.py`) named by its key: the ONNX file's digest, the backend's version and code, the
device, the precision and the profile. One process builds, the others wait. An entry whose bytes are not those its
builder wrote is built again, never loaded: a plan is native code. A folder that grows beyond its bound loses what was
used longest ago. Machines of one kind can share what they build, in a folder that all see or behind it in an s3:// store.
Knows nothing of what engines compute.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from portaisys import artifact, engine, store
from portaisys.artifact import Artifact
from portaisys.engine import RUN_ONLY, Engine, Options
from portaisys.spec import Storage, UserError, digest

logger = logging.getLogger(__name__)

FILE = "engine"
KEPT = ".kept"  # what backends keep from build to build; not an entry
DIGESTS = ".digests"  # of files that were hashed before
WAIT_S = 3600.0  # longer than any build; beyond it the builder hangs
CLAIM_S = 1800.0  # of another machine: after that it is taken for dead
POLL_S = 1.0
# A file this young may change again without its times telling so (coarse clocks of file systems), so it is hashed each time.
SETTLED_S = 2.0


@dataclass(frozen=True)
class Cache:
    """Where built engines are kept: a folder, at most how large, and an s3:// prefix shared with other machines (empty: none)."""

    folder: Path
    max_bytes: int | None = None
    shared: str = ""


def cache_of(storage: Storage) -> Cache:
    """The cache that a spec names."""
    return Cache(storage.cache_dir / "engines", storage.max_cache_bytes, storage.shared_cache)


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


def get_or_build(onnx: Path, backend: str, options: Options, cache: Cache) -> Built:
    """The engine of an ONNX file, from `cache` or built into it.

    A folder that cannot be written is good enough for what stands in it; a store that does not answer is done without, and the notes
    say so. Raises UserError for an unknown backend or precision, a missing library, an unreadable ONNX file or cache folder.
    """
    module = engine.backend(backend)
    if options.precision not in module.PRECISIONS:
        raise UserError(f"engine.precisions: {options.precision!r} is not one of {', '.join(module.PRECISIONS)}, which backend {backend!r} has")
    about = _about(onnx, backend, module, options, cache.folder)
    key = digest(about)
    entry = cache.folder / key
    found, notes = _find(entry, key)  # entries appear whole, so whoever only reads needs no lock
    reused = found is not None
    if found is None:
        with _alone(cache.folder, key):
            found, notes = _find(entry, key)
            reused = found is not None
            if found is None:
                reused, more = _fetch_or_build(entry, cache, lambda: _build(onnx, module, options, entry, about))
                found, notes = artifact.read(entry), notes + more
                if cache.max_bytes is not None:
                    prune(cache.folder, cache.max_bytes, keep=key)
    _used_now(entry)
    return _built(found, reused=reused, notes=notes)


def load(built: Built, options: Options) -> Engine:
    """Open a built engine. Raises CannotExecute where this machine can only build it, UserError when the file has changed."""
    if artifact.hash_file(built.path) != built.sha256:
        raise UserError(f"{built.path}: is not the file that was built; delete it and build again")
    module = engine.backend(built.backend)
    loaded: Engine = module.load(built.path, options, built.path.parent.parent / KEPT)
    return loaded


# --- shared with other machines -------------------------------------------------------------------------------------


def _fetch_or_build(entry: Path, cache: Cache, build: Callable[[], None]) -> tuple[bool, tuple[str, ...]]:
    """Fill `entry` from the shared store, or by building it for all; whether it was there, and notes. Without a store, or when it fails, build."""
    if not cache.shared:
        build()
        return False, ()
    uri = f"{cache.shared.rstrip('/')}/{entry.name}"
    try:
        if _fetched_or_claimed(uri, entry):
            return True, ()
    except UserError as error:
        logger.warning("storage.shared_cache: %s", error)
        build()
        return False, (f"the shared cache was not used: {error}",)
    return False, _build_for_all(uri, entry, build)


def _fetched_or_claimed(uri: str, entry: Path) -> bool:
    """True: the entry is here, from the store. False: the claim to build it is ours. Waits while another machine builds."""
    owner, deadline = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}", time.monotonic() + WAIT_S
    while True:
        if _pulled(uri, entry):
            return True
        if store.claim(f"{uri}.claim", owner):
            return False
        if (store.claim_age_s(f"{uri}.claim") or 0) > CLAIM_S:
            store.remove(f"{uri}.claim")
        elif time.monotonic() > deadline:
            raise UserError(f"{uri}: another machine has been building this engine for {WAIT_S:g} s")
        else:
            time.sleep(POLL_S)


def _pulled(uri: str, entry: Path) -> bool:
    """Whether a sound entry came. A damaged one, or of another key, is as none: what is built here takes its place."""
    try:
        store.pull(uri, entry)
    except UserError as error:
        if store.digest_at(uri):
            logger.warning("%s is not used, and built again: %s", uri, error)
            return False
        raise
    return _find(entry, entry.name)[0] is not None


def _build_for_all(uri: str, entry: Path, build: Callable[[], None]) -> tuple[str, ...]:
    try:
        build()
        return _pushed(entry, uri)
    finally:
        with contextlib.suppress(UserError):  # a claim left behind grows old
            store.remove(f"{uri}.claim")


def _pushed(entry: Path, uri: str) -> tuple[str, ...]:
    try:
        store.push(entry, uri)
    except UserError as error:
        logger.warning("storage.shared_cache: %s", error)
        return (f"built here only, the shared cache did not take it: {error}",)
    return ()


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
    _forget(cache_dir / DIGESTS)
    return gone


def _forget(memory: Path, most: int = 1000) -> None:
    """Keep the newest digests of files; the others are hashed again when asked for."""
    if memory.is_dir():
        for path in sorted(memory.iterdir(), key=lambda path: -path.stat().st_mtime)[most:]:
            path.unlink(missing_ok=True)


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


def _about(onnx: Path, backend: str, module: Any, options: Options, folder: Path) -> dict[str, Any]:
    """What decides a built file: not how it is run, but the code that builds it."""
    try:
        source = digest_of(onnx, folder / DIGESTS)
    except OSError as error:
        raise UserError(f"{onnx}: cannot be read ({error.strerror}); export the model again") from None
    profile = {name: value for name, value in asdict(options).items() if name not in RUN_ONLY}
    code = artifact.hash_file(Path(module.__file__))
    return {"onnx": source, "backend": backend, "version": module.version(), "device": module.device(), "options": profile, "code": code}


def digest_of(path: Path, memory: Path) -> str:
    """SHA-256 of a file, remembered in the folder `memory` under its path, inode, size and times, as git does.

    Neither a write nor a rename over it leaves all of these as they are: ctime cannot be set. Raises OSError when it cannot be read.
    """
    about = path.stat()
    settled = time.time() - max(about.st_mtime, about.st_ctime) > SETTLED_S
    known = memory / digest([str(path.resolve()), about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns])
    if settled:
        with contextlib.suppress(OSError):
            text = known.read_text()
            if len(text) == 64:
                return text
    found = artifact.hash_file(path)
    if settled:
        with contextlib.suppress(OSError):  # to remember is a convenience
            memory.mkdir(parents=True, exist_ok=True)
            artifact.write_text(known, found)
    return found


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
        found = artifact.read(entry)
        problem = _problem(found, key)
    except (UserError, OSError) as error:
        problem = str(error)
    return (None, (f"the cached engine was not used, and built again: {problem}",)) if problem else (found, ())


def _problem(found: Artifact, key: str) -> str:
    """What is wrong with an entry. Its bytes are hashed where they have changed since they were last; `load` hashes them each time."""
    if found.key != key:
        return f"{found.path} holds an entry of another key"
    actual = digest_of(found.file(FILE), found.path.parent / DIGESTS)
    return "" if actual == found.files[FILE] and digest(dict(found.files)) == found.digest else f"{found.path}: {FILE} differs from its manifest"


def _build(onnx: Path, module: Any, options: Options, entry: Path, about: dict[str, Any]) -> None:
    for left in entry.parent.glob(f".{entry.name}.*"):  # drafts of builders that were killed: we hold the lock, so they are dead
        shutil.rmtree(left, ignore_errors=True)
    with artifact.writing(entry, kind="engine", key=digest(about), parents={"onnx": about["onnx"]}, spec=about) as draft:
        draft.notes.extend(module.build(onnx, options, draft.path / FILE, entry.parent / KEPT))


def _built(found: Artifact, *, reused: bool, notes: tuple[str, ...]) -> Built:
    about = found.spec
    return Built(
        path=found.file(FILE), key=found.key, sha256=found.files[FILE], backend=about["backend"], precision=about["options"]["precision"],
        device=about["device"], reused=reused, notes=notes + found.notes, build_s=found.seconds,
    )  # fmt: skip
