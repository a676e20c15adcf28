"""Published versions as verified local copies, made once a host, which do while the registry is down.

A copy lies in `<cache_dir>/versions/<digest>/`; what a reference meant last is noted in `<cache_dir>/references/`. Knows folders with a
manifest, not what their files mean.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from portaisys import artifact
from portaisys.registry import DIGEST, Registry, UnreachableError, Version, open_registry, split_reference
from portaisys.spec import Storage, UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetched:
    """A verified local copy. `from_cache`: nothing was downloaded; `note`: why the registry was not asked, empty when it was."""

    version: Version
    path: Path
    from_cache: bool
    note: str


def fetch(reference: str, storage: Storage, cache_dir: Path) -> Fetched:
    """A verified local copy of "NAME@ALIAS" or "NAME@3" in `<cache_dir>/versions/<digest>/`, made once a host.

    When the registry does not answer, the copy that `reference` last meant here is used, with a warning and a note.
    Raises UserError for an unknown reference, a copy that differs from what was published, or no registry and no copy.
    """
    memo = _memo(reference, cache_dir)
    for folder in (cache_dir, cache_dir / "versions", cache_dir / "references"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        registry = open_registry(storage, create=False)
        version = registry.resolve(reference)
        fetched = _copy(registry, version, cache_dir)
    except UnreachableError as error:
        return _last_copy(reference, memo, cache_dir, error)
    # Asked for by number, it is still what its aliases mean while the registry is down.
    for meant in {reference, *(f"{version.name}@{alias}" for alias in version.aliases)}:
        with contextlib.suppress(UserError):  # another tool's alias may be no name of ours, nor of a file
            artifact.write_text(_memo(meant, cache_dir), json.dumps(asdict(version), indent=1))
    return fetched


def _memo(reference: str, cache_dir: Path) -> Path:
    """Where it is noted what a reference meant last. Raises UserError for one that is not fit for a path."""
    name, rest = split_reference(reference)
    return cache_dir / "references" / f"{name}@{rest}.json"


def _copy(registry: Registry, version: Version, cache_dir: Path) -> Fetched:
    folder = cache_dir / "versions" / version.digest
    with FileLock(cache_dir / "versions" / f".{version.digest}.lock", timeout=600):  # replicas of one host start together
        if _is_good_copy(folder, version):
            return Fetched(version, folder, True, "")
        with tempfile.TemporaryDirectory(prefix=f".{version.digest}.", dir=folder.parent) as draft:
            artifact.replace(verified_copy(registry, version, Path(draft)), folder)
    return Fetched(version, folder, False, "")


def verified_copy(registry: Registry, version: Version, folder: Path) -> Path:
    """The version's files, downloaded below `folder`; returns where. Raises UserError when they are not the ones published."""
    came = registry.download(version, folder)
    if fault := _fault(came, version):  # the folder is often gone when this is read, so what is named is where it came from
        raise UserError(f"{version}: the registry's copy (artifacts of run {version.run_id}) is not what was published: {fault}; put a good copy back in its place, or publish one under another name")
    return came


def _last_copy(reference: str, memo: Path, cache_dir: Path, cause: UnreachableError) -> Fetched:
    try:
        known = json.loads(memo.read_text())
        version = Version(**{**known, "aliases": tuple(known["aliases"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        raise UserError(f"{reference}: {cause}; and there is no local copy in {cache_dir}") from None
    folder = cache_dir / "versions" / version.digest
    if not DIGEST.fullmatch(version.digest) or not _is_good_copy(folder, version):
        raise UserError(f"{reference}: {cause}; and the local copy of {version} is gone or damaged") from None
    note = f"{reference}: {cause}. Using the local copy of {version}, which {reference} meant when the registry last answered"
    _log.warning(note)
    return Fetched(version, folder, True, note)


def _is_good_copy(folder: Path, version: Version) -> bool:
    if not folder.exists():
        return False
    if fault := _fault(folder, version):
        _log.warning("%s: the local copy is not what was published and is not used: %s: %s", version, folder, fault)
    return not fault


def _fault(folder: Path, version: Version) -> str:
    """What in a copy is not as it was published, by the names of files; empty when all is."""
    try:
        found = artifact.read(folder)
    except UserError:
        return f"{artifact.MANIFEST} is missing or damaged"
    if wrong := artifact.damaged(found):
        return f"{', '.join(wrong)} differs from its manifest"
    if found.digest != version.digest:
        return "the files, and their manifest with them, are not the ones published"
    if artifact.hash_file(folder / artifact.MANIFEST) != version.manifest:
        return f"{artifact.MANIFEST} is not the one published"
    return ""
