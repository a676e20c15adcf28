"""Artifacts in a remote store: push a finished folder to `s3://bucket/prefix/...`, pull it back verified.

Knows files and their manifest, not what they mean nor where a stage wants them. The manifest goes last, and a folder without one is
no artifact, so a push that was cut short has left nothing. Two pushes of different content to one place at the same time may mix;
`pull` then refuses what came of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from portaisys import artifact
from portaisys.artifact import MANIFEST
from portaisys.spec import UserError

_CHUNK = 8 << 20


def push(folder: Path, uri: str) -> None:
    """Upload a finished artifact. Raises UserError when the folder is none, or the store refuses or does not answer."""
    found = artifact.read(folder, verify=True)
    with _asking(uri):
        files, root = _open(uri)
        if _exists(files, f"{root}/{MANIFEST}"):  # replacing: the old artifact ends before its first file changes
            files.delete_file(f"{root}/{MANIFEST}")
        for name in [*sorted(found.files), MANIFEST]:
            _upload(files, folder / name, f"{root}/{name}")


def pull(uri: str, folder: Path) -> bool:
    """Download an artifact into `folder`, all of it or nothing; False when there is none at `uri`.

    Raises UserError when it differs from its manifest, or the store refuses or does not answer.
    """
    with _asking(uri):
        files, root = _open(uri)
        if not _exists(files, f"{root}/{MANIFEST}"):
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            draft = Path(temporary) / "artifact"
            _download(files, f"{root}/{MANIFEST}", draft / MANIFEST)
            for name in _names(draft / MANIFEST, uri):
                _download(files, f"{root}/{name}", draft / name)
            _check(draft, uri)
            artifact._replace(draft, folder)
    return True


def send_file(source: Path, uri: str) -> None:
    """Upload one file (a checkpoint: it is no artifact yet). An object appears whole or not at all."""
    with _asking(uri):
        _upload(_open(uri)[0], source, _open(uri)[1])


def fetch_file(uri: str, target: Path) -> bool:
    """Download one file, whole or not at all; False when there is none."""
    with _asking(uri):
        files, path = _open(uri)
        if not _exists(files, path):
            return False
        draft = target.with_name(f".{target.name}.download")
        _download(files, path, draft)
        draft.replace(target)
    return True


def reachable(uri: str) -> None:
    """Raises UserError when the bucket (or folder) that `uri` lies in does not exist, refuses us or does not answer."""
    with _asking(uri):
        files, root = _open(uri)
        place = root if uri.startswith("file:") else root.partition("/")[0]
        if not _exists(files, place):
            raise UserError(f"storage.path: {uri}: {place!r} does not exist there; create it, or correct the path")


def _open(uri: str) -> tuple[Any, str]:
    """The file system and the path on it."""
    try:
        from pyarrow import fs
    except ImportError:
        raise UserError(f"storage.path: {uri}: needs pyarrow; install portaisys[s3]") from None
    scheme, _, rest = uri.partition("://")
    if scheme != "s3":
        files, root = fs.FileSystem.from_uri(uri)
        return files, str(root).rstrip("/")
    # The SDK's newer default sends checksums as chunked trailers, which S3's work-alikes (rclone, older MinIO) answer with 411.
    # Nothing is lost: every file is checked against the manifest after it came back.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    return _s3(fs, rest.partition("/")[0]), rest.rstrip("/")


def _s3(fs: Any, bucket: str) -> Any:
    # pyarrow reads AWS_ENDPOINT_URL only in from_uri, which in turn takes no timeouts: so both are given here.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region or ("us-east-1" if endpoint else fs.resolve_s3_region(bucket)),
        connect_timeout=5,
        request_timeout=60,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=3),
    )


def _exists(files: Any, path: str) -> bool:
    return bool(files.get_file_info(path).type != _not_found())


def _not_found() -> Any:
    from pyarrow import fs

    return fs.FileType.NotFound


def _upload(files: Any, source: Path, target: str) -> None:
    if files.type_name == "local":  # an object store has no folders to make
        files.create_dir(target.rpartition("/")[0], recursive=True)
    with source.open("rb") as local, files.open_output_stream(target) as remote:
        shutil.copyfileobj(local, remote, _CHUNK)


def _download(files: Any, source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.open_input_stream(source) as remote, target.open("wb") as local:
        shutil.copyfileobj(remote, local, _CHUNK)


def _names(manifest: Path, uri: str) -> list[str]:
    """The files a manifest lists; whoever can write to the store can write any name into it, so each is checked."""
    try:
        names = list(json.loads(manifest.read_text())["files"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{uri}/{MANIFEST}: damaged; delete it and run the stage again") from None
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
            raise UserError(f"{uri}/{MANIFEST}: lists {name!r}, which does not lie inside the artifact; delete it and run the stage again")
    return names


def _check(draft: Path, uri: str) -> None:
    try:
        artifact.read(draft, verify=True)
    except UserError as error:
        raise UserError(f"{uri}: {str(error).removeprefix(f'{draft}: ')}") from None


@contextlib.contextmanager
def _asking(uri: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:  # all that pyarrow raises: ArrowInvalid is a ValueError
        cause = str(error).splitlines()[0][:300]
        raise UserError(
            f"storage.path: {uri} cannot be used: {cause}; check the path, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
