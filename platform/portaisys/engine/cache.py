"""Built engines on disk, found again by what went into them.

An entry is an artifact (`artifact.py`) named by its key: the ONNX file's digest, the backend's version and code, the
device, the precision and the profile. One process builds, the others wait. An entry whose bytes are not those its
builder wrote is built again, never loaded: a plan is native code. Knows nothing of what engines compute.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from portaisys import artifact, engine
from portaisys.artifact import Artifact
from portaisys.engine import Engine, Options
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


def get_or_build(onnx: Path, backend: str, options: Options, cache_dir: Path) -> Built:
    """The engine of an ONNX file, from `cache_dir` or built into it.

    Raises UserError for an unknown backend or precision, a missing library, an unreadable ONNX file or cache folder.
    """
    module = engine.backend(backend)
    if options.precision not in module.PRECISIONS:
        raise UserError(f"engine.precisions: {options.precision!r} is not one of {', '.join(module.PRECISIONS)}, which backend {backend!r} has")
    about = _about(onnx, backend, module, options)
    key = digest(about)
    with _alone(cache_dir, key):
        found, notes = _find(cache_dir / key, key)
        if found is None:
            _build(onnx, module, options, cache_dir / key, about)
            found = artifact.read(cache_dir / key)
            return _built(found, reused=False, notes=notes)
    return _built(found, reused=True, notes=notes)


def load(built: Built, options: Options) -> Engine:
    """Open a built engine. Raises CannotExecute where this machine can only build it, UserError when the file has changed."""
    if artifact.hash_file(built.path) != built.sha256:
        raise UserError(f"{built.path}: is not the file that was built; delete it and build again")
    module = engine.backend(built.backend)
    loaded: Engine = module.load(built.path, options)
    return loaded


def _about(onnx: Path, backend: str, module: Any, options: Options) -> dict[str, Any]:
    """What decides a built file. The thread count does not; the code that builds does."""
    try:
        source = artifact.hash_file(onnx)
    except OSError as error:
        raise UserError(f"{onnx}: cannot be read ({error.strerror}); export the model again") from None
    profile = {name: value for name, value in asdict(options).items() if name != "threads"}
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
