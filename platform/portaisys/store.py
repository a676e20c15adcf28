"""Artifacts in a remote store: push a finished folder to `s3://bucket/prefix/...`, pull it back verified.

Knows files and their manifest, not what they mean nor where a stage wants them. The manifest goes last, and a folder without one is
no artifact, so a push that was cut short has left nothing. Two pushes of different content to one place at the same time may mix;
`pull` then refuses what came of it.

boto3 and not pyarrow.fs (both tried with pyarrow 25 on rclone's S3): pyarrow ignores AWS_ENDPOINT_URL where it takes timeouts, writes
an empty `folder/` object at every delete, which rclone answers with 500, and its checksum trailers with 411.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any

from portaisys import artifact
from portaisys.artifact import MANIFEST
from portaisys.spec import UserError


def push(folder: Path, uri: str) -> None:
    """Upload a finished artifact. Raises UserError when the folder is none, or the store refuses or does not answer."""
    found = artifact.read(folder, verify=True)
    bucket, prefix = _split(uri)
    with _asking(uri) as s3:
        s3.delete_object(Bucket=bucket, Key=f"{prefix}/{MANIFEST}")  # what was there ends before its first file changes
        for name in [*sorted(found.files), MANIFEST]:
            s3.upload_file(str(folder / name), bucket, f"{prefix}/{name}")


def pull(uri: str, folder: Path) -> bool:
    """Download an artifact into `folder`, all of it or nothing; False when there is none at `uri`.

    Raises UserError when it differs from its manifest, or the store refuses or does not answer.
    """
    bucket, prefix = _split(uri)
    with _asking(uri) as s3:
        try:
            manifest = s3.get_object(Bucket=bucket, Key=f"{prefix}/{MANIFEST}")["Body"].read()
        except s3.exceptions.NoSuchKey:
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            draft = Path(temporary) / "artifact"
            draft.mkdir()
            (draft / MANIFEST).write_bytes(manifest)
            for name in _names(manifest, uri):
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                s3.download_file(bucket, f"{prefix}/{name}", str(draft / name))
            _check(draft, uri)
            artifact.replace(draft, folder)
    return True


def send_file(source: Path, uri: str) -> None:
    """Upload one file that is no artifact yet (a checkpoint). An object appears whole or not at all."""
    bucket, key = _split(uri)
    with _asking(uri) as s3:
        s3.upload_file(str(source), bucket, key)


def fetch_file(uri: str, target: Path) -> bool:
    """Download one file, whole or not at all; False when there is none."""
    bucket, key = _split(uri)
    with _asking(uri) as s3:
        try:
            content = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        except s3.exceptions.NoSuchKey:
            return False
    target.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_bytes(target, content)
    return True


def digest_at(uri: str) -> str:
    """Digest of the artifact at `uri`, empty when there is no finished one."""
    bucket, prefix = _split(uri)
    with _asking(uri) as s3:
        try:
            return str(json.loads(s3.get_object(Bucket=bucket, Key=f"{prefix}/{MANIFEST}")["Body"].read()).get("digest", ""))
        except (s3.exceptions.NoSuchKey, ValueError):
            return ""


def claim(uri: str, owner: str) -> bool:
    """Put a claim at `uri` unless somebody's is there; whether it is ours now.

    Exact where the store heeds If-None-Match (AWS does); some work-alikes do not, and two that come within the same milliseconds may
    both believe it is theirs. So a claim saves work and guards nothing.
    """
    bucket, key = _split(uri)
    with _asking(uri) as s3:
        if claim_age_s(uri) is not None:
            return False
        try:
            s3.put_object(Bucket=bucket, Key=key, Body=owner.encode(), IfNoneMatch="*")
        except s3.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                return False
            raise
        return bool(s3.get_object(Bucket=bucket, Key=key)["Body"].read() == owner.encode())


def claim_age_s(uri: str) -> float | None:
    """Seconds since a claim was put, by the store's own clock; None when there is none."""
    bucket, key = _split(uri)
    with _asking(uri) as s3:
        found = s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
        now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
        return next((float((now - item["LastModified"]).total_seconds()) for item in found.get("Contents", []) if item["Key"] == key), None)


def remove(uri: str) -> None:
    """Delete one object; that there is none is no error."""
    bucket, key = _split(uri)
    with _asking(uri) as s3:
        s3.delete_object(Bucket=bucket, Key=key)


def reachable(uri: str) -> None:
    """Raises UserError when the bucket of `uri` does not exist, refuses us or does not answer."""
    bucket, _ = _split(uri)
    with _asking(uri) as s3:
        s3.list_objects_v2(Bucket=bucket, MaxKeys=1)  # not head_bucket, whose errors have no text


def _split(uri: str) -> tuple[str, str]:
    """Bucket and prefix."""
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise UserError(f"storage.path: {uri!r} is no store; write a folder or s3://bucket/prefix")
    return bucket, prefix.strip("/")


def _client() -> Any:
    """Reads AWS_ENDPOINT_URL, AWS_REGION, the credentials and profiles as every AWS tool does."""
    try:
        import boto3  # type: ignore[import-untyped]
        from botocore.config import Config  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("storage.path: a store at s3:// needs boto3; install portaisys[s3]") from None
    # The newer default sends checksums as trailers, which some of S3's work-alikes do not take. Nothing is lost: every file is
    # checked against the manifest after it came back.
    checksums = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    config = Config(connect_timeout=5, read_timeout=60, retries={"total_max_attempts": 3}, **checksums)
    # A session of its own: boto3's default one keeps the first credentials it saw for as long as the process lives.
    return boto3.session.Session().client("s3", config=config)


@contextlib.contextmanager
def _asking(uri: str) -> Iterator[Any]:
    """A client whose failures become UserErrors."""
    s3 = _client()
    from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    try:
        yield s3
    except (Boto3Error, BotoCoreError, ClientError) as error:
        cause = str(error).splitlines()[0][:300]
        raise UserError(
            f"storage.path: {uri} cannot be used: {cause}; check the path, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error


def _names(manifest: bytes, uri: str) -> list[str]:
    """The files a manifest lists; whoever can write to the store can write any name into it, so each is checked."""
    try:
        names = list(json.loads(manifest)["files"])
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
