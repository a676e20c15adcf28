"""What a stage leaves behind: a folder and its manifest.json.

A folder either is complete (manifest written last, renamed into place) or does not exist. `digest` covers the
content of the files only, so two runs that computed the same thing have the same digest whatever the clock said;
scores, seconds and versions stand in the manifest beside it. Knows nothing of what the files mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from portaisys.spec import UserError, digest

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A finished folder. `digest`: hex SHA-256 over the names and contents of its files."""

    path: Path
    kind: str
    key: str
    digest: str
    parents: Mapping[str, str]
    spec: Mapping[str, Any]
    scores: Mapping[str, Any]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    files: Mapping[str, str]
    seconds: float

    def file(self, name: str) -> Path:
        """Path of one of its files. Raises UserError when the artifact does not hold it."""
        if name not in self.files:
            raise UserError(f"{self.path}: has no file {name!r}; it holds {', '.join(sorted(self.files))}")
        return self.path / name


@dataclass
class Draft:
    """A folder being written; `scores` and `notes` (fall-backs above all) end in the manifest."""

    path: Path
    scores: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def writing(folder: Path, *, kind: str, key: str, parents: Mapping[str, str], spec: Mapping[str, Any]) -> Iterator[Draft]:
    """Fill a temporary folder, then put it in place of `folder` at once. On an exception nothing changes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Draft(Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)))
    started = time.monotonic()
    try:
        yield draft
        files = hash_files(draft.path)
        manifest = {
            "kind": kind, "key": key, "digest": digest(files), "parents": dict(parents), "spec": dict(spec),
            "scores": draft.scores, "notes": draft.notes, "versions": versions(), "files": files,
            "seconds": round(time.monotonic() - started, 3), "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip
        write_text(draft.path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        replace(draft.path, folder)
    finally:
        shutil.rmtree(draft.path, ignore_errors=True)


def read(folder: Path, *, verify: bool = False) -> Artifact:
    """Open a finished artifact; with `verify` hash every file again.

    Raises UserError when there is none, when the manifest is not readable or a file differs from it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest.pop("created", None)
        manifest["notes"] = tuple(manifest["notes"])
        found = Artifact(path=folder, **manifest)
    except FileNotFoundError:
        raise UserError(f"{folder}: no finished artifact here (no {MANIFEST}); run the stage that makes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST}: damaged ({error}); delete the folder and run the stage again") from None
    if verify:
        _verify(found)
    return found


def damaged(found: Artifact) -> list[str]:
    """Names of its files, or of its manifest, that are not as they were when it was finished; every file is hashed."""
    actual = hash_files(found.path)
    wrong = sorted(name for name in {**found.files, **actual} if found.files.get(name) != actual.get(name))
    return wrong or ([MANIFEST] if digest(dict(found.files)) != found.digest else [])


def _verify(found: Artifact) -> None:
    if wrong := damaged(found):
        raise UserError(f"{found.path}: {', '.join(wrong)} differs from its manifest; delete the folder and fetch or make it again")


def find(folder: Path, key: str) -> Artifact | None:
    """The finished, undamaged artifact of exactly this key, or None."""
    if not (folder / MANIFEST).exists():
        return None
    found = read(folder)
    if found.key != key:
        return None
    _verify(found)
    return found


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of one file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file below `folder` but its manifest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hash_file(path) for path in paths if path != folder / MANIFEST}


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(path)
        sync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text."""
    write_bytes(path, text.encode())


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """An .npz of arrays under any names, the same bytes for the same arrays (np.savez takes no array called `file`)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz. Raises UserError when it cannot be read, is none, or holds Python objects, which are never loaded."""
    try:
        with np.load(path, allow_pickle=False) as found:
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise UserError(f"{path}: holds one array without a name; save it with numpy.savez(path, NAME=array)")
            return {name: found[name] for name in found.files}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or 'not an .npz file'})") from None
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not an .npz of plain arrays ({str(error).splitlines()[0] if str(error) else type(error).__name__}); write it with numpy.savez") from None


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(draft: Path, folder: Path) -> None:
    """Put a whole folder in the place of another; both on one file system."""
    for path in draft.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    draft.chmod(0o755)
    if folder.exists():
        # A folder cannot be renamed over a full one: the old one steps aside first. A crash between the two
        # renames leaves no artifact, never a wrong one, and the stage simply runs again.
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        folder.rename(old / "was")
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        draft.rename(folder)
    sync_folder(folder.parent)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. Raises UserError when another run holds it (the lock dies with its process)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(f"storage.path: another run is writing {folder}; wait for it, or give this run another name (name=...)") from None
    except OSError as error:
        raise UserError(f"storage.path: {folder} cannot be written ({error.strerror}); name a folder that can") from None
    try:
        yield
    finally:
        lock.release()


def sweep(folder: Path) -> None:
    """Remove drafts a killed run left in `folder`. Call only where nobody else writes there: while it is `locked`, or before a training begins."""
    for path in folder.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


_PACKAGES = ("portaisys", "ray", "torch", "torch-pruning", "onnx", "onnxruntime", "tensorrt-rtx-cu13", "tensorrt", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
