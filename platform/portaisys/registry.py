"""Names for finished work: MLflow runs, versions (NAME@3), aliases (NAME@production) and an append-only ledger of what moved them.

The only importer of mlflow, on first use and not at the top: it costs 1-3 s and reads its settings from the environment while it is
imported, so `import portaisys.registry` (every CLI verb, every process of a serving application) stays free of both.
Knows folders with a manifest (portaisys.artifact), not what their files mean; a verdict is a word with a reason, passed or not.

The ledger is a registered model, `portaisys-ledger`, whose versions are the entries: creating a version is the one call of MLflow that
any server numbers atomically, so entries have a total order without a lock. What chains them is ledger.py's.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import json
import logging
import math
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from portaisys import artifact, ledger
from portaisys.ledger import Entry, Row
from portaisys.spec import Storage, UserError
from portaisys.spec import digest as value_digest

LEDGER = "portaisys-ledger"
CANDIDATE = "candidate"
PRODUCTION = "production"
SPEC = "spec.json"  # of a run, beside its parameters

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_NUMBER = re.compile(r"[0-9]{1,9}")
DIGEST = re.compile(r"[0-9a-f]{64}")
_LOCK_S = 120.0
# MLflow's answers, as against silence: anything else it raises means that the registry could not be asked.
_ANSWERS = {
    "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_PARAMETER_VALUE", "BAD_REQUEST", "NOT_FOUND", "INVALID_STATE",
    "PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED",
}  # fmt: skip
# Used where the user has not said otherwise. MLflow's own bounds (7 retries, 120 s) would hold a starting replica for minutes.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_NOISY = ("mlflow.store.db.utils", "mlflow.utils.git_utils", "mlflow.tracking", "alembic")
_TRAFFIC = "portaisys.traffic"


class UnreachableError(UserError):
    """The registry, or its store of artifacts, did not answer."""


class RefusedError(UserError):
    """The registry answered no; `code` is MLflow's word for why."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Version:
    """A published artifact. `digest`: of the artifact; `manifest`: SHA-256 of its manifest.json, which the digest leaves out."""

    name: str
    version: int
    digest: str
    manifest: str
    run_id: str
    aliases: tuple[str, ...]
    verdict: str
    because: str
    lineage: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


# --- opening ------------------------------------------------------------------------------------------------------


def open_registry(storage: Storage, *, create: bool = True) -> Registry:
    """The server of MLFLOW_TRACKING_URI, else sqlite in `<storage.path>/mlflow.db` with files in `<storage.path>/mlartifacts`.

    Raises UserError when `storage.path` cannot hold a database, UnreachableError when it does not open or, without `create`, is not there.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        # No lock reaches the writers of other hosts; this one keeps those of this host from racing in vain.
        return Registry(uri, "", storage.cache_dir / "locks" / hashlib.sha256(uri.encode()).hexdigest()[:16])
    if storage.remote:
        raise UserError(
            f"storage.path: {storage.path} cannot hold the registry's database; start `mlflow server --artifacts-destination "
            f"{storage.path}/mlartifacts --backend-store-uri ...` and set MLFLOW_TRACKING_URI to its address"
        )
    return _open_local(Path(storage.path).expanduser().resolve(), create)


def _open_local(root: Path, create: bool) -> Registry:
    database, artifacts = root / "mlflow.db", root / "mlartifacts"
    if not create and not database.exists():
        raise UnreachableError(f"storage.path: no registry at {database}; publish a version first, or set MLFLOW_TRACKING_URI")
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Modes at creation, not os.umask, which every thread of the process would feel; sqlite's journals take the database's mode.
        artifacts.mkdir(mode=0o700, exist_ok=True)
        registry = Registry(f"sqlite:///{database}", artifacts.as_uri(), root / ".registry.lock")
        with registry.alone():
            if not database.exists():
                _create(database, artifacts)
    except OSError as error:
        raise UnreachableError(f"storage.path: {root} cannot hold a registry: {error.strerror}; choose another folder") from error
    with registry.asking("opening it"):
        registry.client.search_registered_models(max_results=1)
    return registry


def _create(database: Path, artifacts: Path) -> None:
    """MLflow makes its tables one by one, over seconds: under another name, so that a kill in between leaves no half of a database."""
    draft = database.with_name(".mlflow.db.draft")
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_CREAT | os.O_RDWR, 0o600))
    new = Registry(f"sqlite:///{draft}", artifacts.as_uri(), database.with_name(".registry.draft.lock"))
    with new.asking("creating it"):
        new.client.search_registered_models(max_results=1)
        new.client.search_experiments(max_results=1)
    draft.replace(database)
    artifact.sync_folder(database.parent)


def _mlflow_client(uri: str) -> Any:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    for name in _NOISY:  # mlflow's import sets its own levels
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _checked(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(f"{what} {_short(name)}: write 1 to 63 of a-z, 0-9, _ and -, beginning with a letter or digit")
    if name == LEDGER:
        raise UserError(f"{what} {name!r}: is the ledger's own; choose another name")
    return name


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def split_reference(reference: str) -> tuple[str, str]:
    """NAME and alias-or-number of a reference, both fit for a path. Raises UserError for any other."""
    name, at, rest = reference.partition("@")
    if not at:
        raise UserError(f"reference {_short(reference)}: says neither alias nor version; write NAME@{PRODUCTION} or NAME@3")
    return _checked(name, "name"), _checked(rest, "alias")


# --- the registry -------------------------------------------------------------------------------------------------


class Registry:
    """An open MLflow registry. Every method raises UnreachableError when it does not answer, RefusedError when it answers no."""

    def __init__(self, uri: str, artifacts: str, lock: Path) -> None:
        self.uri, self.artifacts = uri, artifacts
        self._lock = FileLock(lock, timeout=_LOCK_S)
        self._read: dict[int, Row] = {}

    @functools.cached_property
    def client(self) -> Any:
        """MLflow's client, on first use: making one for a sqlite file creates its tables."""
        with self.asking("opening it"):
            return _mlflow_client(self.uri)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the registry against other writers (of this storage; with a server: of this host). May be nested."""
        lock = Path(self._lock.lock_file)
        try:
            lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise UserError(f"registry: {lock} was held for {_LOCK_S:.0f} s; end the process that holds it") from None
        except OSError as error:
            raise UnreachableError(f"registry: {lock} cannot be written ({error.strerror}); make its folder writable") from error
        try:
            yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Turn what MLflow raises into RefusedError or UnreachableError."""
        try:
            yield
        except (UserError, AssertionError, AttributeError, NameError, TypeError):  # the last four are bugs, and no registry that is down
            raise
        except Exception as error:  # broad for a reason: MLflow lets through whatever its clients raise (requests, SQLAlchemy, boto)
            code = str(getattr(error, "error_code", ""))
            cause = _cause(error)
            where = f"registry {_no_password(self.uri)}"
            if code in _ANSWERS:
                raise RefusedError(f"{where}: {what}: {cause}", code) from error
            raise UnreachableError(f"{where}: not reachable while {what}: {cause}; check MLFLOW_TRACKING_URI and the server") from error

    # --- runs

    def log_run(
        self, name: str, spec_dict: Mapping[str, Any], digests: Mapping[str, str], scores: Mapping[str, Any], tags: Mapping[str, str],
        curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    ) -> str:
        """Record a finished run in experiment `name`; returns its id. Scores that are no finite number are left out.

        `curves`: name -> (step, value) of metrics with a history.
        """
        experiment = self._experiment(_checked(name, "name"))
        all_tags = {**tags, **{f"digest.{stage}": digest for stage, digest in digests.items()}}
        with self.asking("logging a run"):
            run_id = str(self.client.create_run(experiment, run_name=name, tags=all_tags).info.run_id)
            try:
                self._log_values(run_id, spec_dict, scores, curves or {})
                self.client.log_dict(run_id, dict(spec_dict), SPEC)  # whole: parameters are flat text, from which no spec can be read
            except BaseException:
                self.client.set_terminated(run_id, status="FAILED")
                raise
            self.client.set_terminated(run_id)
        return run_id

    def spec_of(self, version: Version) -> dict[str, Any]:
        """The spec of the run that made a version, as it was logged. Raises UserError when it is not there, damaged or not the one of the version's lineage."""
        with self.asking(f"reading the spec of {version}"), tempfile.TemporaryDirectory() as folder:
            if not any(file.path == SPEC for file in self.client.list_artifacts(version.run_id)):
                raise UserError(f"{version}: its run {version.run_id} holds no {SPEC} (an older portaisys published it); run its spec again under another name")
            written = Path(self.client.download_artifacts(version.run_id, SPEC, folder)).read_bytes()
        try:
            tree: dict[str, Any] = json.loads(written)
        except ValueError as error:  # the registry answered: what it holds is damaged
            raise UserError(f"{version}: {SPEC} of its run {version.run_id} in the registry is damaged ({error}); put a good copy back, or run its spec again under another name") from None
        if value_digest(tree) != version.lineage.get("spec"):
            raise UserError(f"{version}: {SPEC} of its run {version.run_id} is not the spec of its lineage ({version.lineage.get('spec', 'none')[:12]}); it was changed")
        return tree

    def _experiment(self, name: str) -> str:
        with self.asking("creating an experiment"):
            found = self.client.get_experiment_by_name(name)
            if found is None:
                with _unless("RESOURCE_ALREADY_EXISTS", self, "creating an experiment"):
                    place = f"{self.artifacts}/{name}" if self.artifacts else None
                    return str(self.client.create_experiment(name, artifact_location=place))
                found = self.client.get_experiment_by_name(name)
        if found.lifecycle_stage != "active":
            raise UserError(f"registry: experiment {name!r} was deleted; restore it (`mlflow experiments restore`) or choose another name")
        return str(found.experiment_id)

    def _log_values(self, run_id: str, spec_dict: Mapping[str, Any], scores: Mapping[str, Any], curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        params = [Param(key, _text(value)) for key, value in _flat(spec_dict)]
        metrics = [Metric(key, float(value), now, 0) for key, value in _flat(scores) if _is_finite_number(value)]
        metrics += [Metric(key, float(value), now, step) for key, points in curves.items() for step, value in points if _is_finite_number(value)]
        for start in range(0, len(params), 100):  # MLflow takes 100 parameters a call
            self.client.log_batch(run_id, params=params[start : start + 100])
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run_id, metrics=metrics[start : start + 1000])

    # --- versions

    def publish(self, name: str, folder: Path, run_id: str, lineage: Mapping[str, str], verdict: Mapping[str, Any]) -> Version:
        """Make a finished artifact a version of `name` and its `candidate`; the same artifact again is the version it already is.

        `verdict`: `action` ("pass" lets it be promoted) and `because`; the latest verdict on an artifact holds.
        Raises UserError when the folder is not a finished, undamaged artifact.
        """
        _checked(name, "name")
        found = artifact.read(folder, verify=True)
        tags = {
            "digest": found.digest, "manifest": artifact.hash_file(folder / artifact.MANIFEST), "verdict": str(verdict["action"]),
            "because": _text(verdict.get("because", "")), **{f"lineage.{key}": value for key, value in lineage.items()},
        }  # fmt: skip
        with self.alone(), self.asking(f"publishing {name}"):
            version = self.of_digest(name, found.digest)
            version = self._judge_again(version, tags) if version else self._create(name, folder, run_id, tags)
            if CANDIDATE not in version.aliases:
                self._set_alias(name, CANDIDATE, str(version.version))
        return self._get(name, version.version)

    def _create(self, name: str, folder: Path, run_id: str, tags: Mapping[str, str]) -> Version:
        with _unless("RESOURCE_ALREADY_EXISTS", self, f"publishing {name}"):
            self.client.create_registered_model(name)
        self.client.log_artifacts(run_id, str(folder), artifact_path=_inside_run(tags["digest"]))
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{_inside_run(tags['digest'])}"
        made = self.client.create_model_version(name, source, run_id=run_id, tags=dict(tags), await_creation_for=None)
        version = self.of_digest(name, tags["digest"])
        assert version is not None
        if version.version != int(made.version):  # another host published the same artifact at the same time: the lower number stands
            self.client.delete_model_version(name, str(made.version))
        else:
            details = {"digest": version.digest, "run_id": run_id, "verdict": version.verdict}
            self._record("publish", name, version.version, version.because, details)
        return version

    def _set_alias(self, name: str, alias: str, version: str) -> None:
        """MLflow looks and then inserts: of two hosts that set a new alias at once one is refused; asked again, it updates."""
        with contextlib.suppress(RefusedError), self.asking(f"setting {name}@{alias}"):
            self.client.set_registered_model_alias(name, alias, version)
            return
        self.client.set_registered_model_alias(name, alias, version)

    def _judge_again(self, version: Version, tags: Mapping[str, str]) -> Version:
        if (version.verdict, version.because) == (tags["verdict"], tags["because"]):
            return version
        for key in ("verdict", "because"):
            self.client.set_model_version_tag(version.name, str(version.version), key, tags[key])
        details = {"digest": version.digest, "verdict": tags["verdict"], "was": version.verdict}
        self._record("publish", version.name, version.version, tags["because"], details)
        return version

    def promote(self, name: str, version: int, because: str = "") -> Version:
        """Put a version with a passing verdict in production. Raises UserError without one, or when there is no such version."""
        with self.alone():
            chosen = self.resolve(f"{name}@{version}")
            if chosen.verdict != "pass":
                verdict = f"its verdict is {chosen.verdict!r} ({chosen.because})"
                raise UserError(f"{chosen}: cannot be promoted, {verdict}; publish one that passes the gate")
            if PRODUCTION in chosen.aliases:
                return chosen
            return self._put_in_production("promote", chosen, because)

    def rollback(self, name: str, because: str = "") -> Version:
        """Put back the version that was in production before. Raises UserError when there was none."""
        with self.alone():
            now = self._aliases(_checked(name, "name")).get(PRODUCTION)
            before = ledger.version_before(self.ledger(name), now)
            if before is None:
                raise UserError(f"{name}: no version was in production before {now or 'now'}; promote the one you want")
            return self._put_in_production("rollback", self.resolve(f"{name}@{before}"), because)

    def _put_in_production(self, event: str, version: Version, because: str) -> Version:
        was = self._aliases(version.name).get(PRODUCTION)
        # The record first: a crash in between leaves a line about a change that did not happen, never a change without a line.
        self._record(event, version.name, version.version, because, {"digest": version.digest, "was": was})
        with self.asking(f"setting {version.name}@{PRODUCTION}"):
            self._set_alias(version.name, PRODUCTION, str(version.version))
        return self._get(version.name, version.version)

    def traffic(self, name: str) -> dict[str, Any]:
        """The traffic of a name as it was set: canary and shadow; empty when none is. Raises UserError for an unknown name."""
        self._aliases(_checked(name, "name"))
        with self.asking(f"reading the traffic of {name}"):
            text = self.client.get_registered_model(name).tags.get(_TRAFFIC, "")
        try:
            found = json.loads(text or "{}")
        except ValueError:
            raise UserError(f"{name}: its traffic in the registry is damaged; set it again") from None
        return found if isinstance(found, dict) else {}

    def set_traffic(self, name: str, traffic: Mapping[str, Any], because: str = "") -> None:
        """Replace the traffic of a name; each version in it must be there and have passed. Raises UserError."""
        with self.alone():
            for what, one in traffic.items():
                if not isinstance(one, Mapping):  # a pinned precision
                    continue
                chosen = self.resolve(f"{name}@{one['version']}")
                if chosen.verdict != "pass":
                    raise UserError(f"{chosen}: cannot be a {what}, its verdict is {chosen.verdict!r} ({chosen.because})")
            self._record("traffic", name, None, because, {"traffic": dict(traffic), "was": self.traffic(name)})
            with self.asking(f"setting the traffic of {name}"):
                self.client.set_registered_model_tag(name, _TRAFFIC, json.dumps(dict(traffic), sort_keys=True))

    def resolve(self, reference: str) -> Version:
        """The version of "NAME@ALIAS" or "NAME@3". Raises UserError, listing what there is."""
        name, rest = split_reference(reference)
        aliases = self._aliases(name)
        number = int(rest) if _NUMBER.fullmatch(rest) else aliases.get(rest)
        if number is None:
            raise UserError(f"{name}: has no alias {rest!r}; it has {', '.join(sorted(aliases)) or 'none'}")
        try:
            return self._get(name, number)
        except RefusedError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
        there = ", ".join(str(version.version) for version in self.versions(name))
        raise UserError(f"{name}: has no version {number}; it has {there or 'none'}")

    def names(self) -> list[str]:
        """Names with at least one version ever published."""
        with self.asking("listing names"):
            found = _pages(self.client.search_registered_models, max_results=100)
        return sorted(model.name for model in found if model.name != LEDGER)

    def versions(self, name: str) -> list[Version]:
        """Every version of `name`, oldest first. Raises UserError for an unknown name."""
        aliases = self._aliases(_checked(name, "name"))
        with self.asking(f"listing {name}"):
            found = _pages(self.client.search_model_versions, filter_string=f"name = '{name}'")
        for item in found:  # MLflow's search leaves them out
            item.aliases = [alias for alias, number in aliases.items() if number == int(item.version)]
        return sorted((_version(item) for item in found if "digest" in item.tags), key=lambda version: version.version)

    def of_digest(self, name: str, digest: str) -> Version | None:
        """The version of `name` that holds this artifact, or None."""
        if not DIGEST.fullmatch(digest):
            raise UserError(f"digest {_short(digest)}: write the 64 hex digits of a SHA-256")
        with self.asking(f"looking for an artifact of {name}"):
            found = self.client.search_model_versions(f"name = '{_checked(name, 'name')}' and tags.digest = '{digest}'")
        return self._get(name, min(int(item.version) for item in found)) if found else None

    def _aliases(self, name: str) -> dict[str, int]:
        try:
            with self.asking(f"resolving {name}"):
                return {alias: int(version) for alias, version in self.client.get_registered_model(name).aliases.items()}
        except RefusedError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
        raise UserError(f"registry: has no name {name!r}; it has {', '.join(self.names()) or 'none'}")

    def _get(self, name: str, number: int) -> Version:
        with self.asking(f"reading {name}@{number}"):
            return _version(self.client.get_model_version(name, str(number)))

    def download(self, version: Version, folder: Path) -> Path:
        """Bring a version's files below `folder`; returns where. Not checked: a store may hand out others than were published."""
        with self.asking(f"downloading {version}"):
            return Path(self.client.download_artifacts(version.run_id, _inside_run(version.digest), str(folder)))

    # --- the ledger

    def ledger(self, name: str | None = None) -> list[Entry]:
        """The entries, oldest first; only those of `name` when given."""
        return [entry for _, entry in ledger.chain_of(self._rows()).entries if name in (None, entry.name)]

    def verify_ledger(self) -> str:
        """Check the chain; returns the hash of its last entry. Raises UserError naming every changed or missing entry."""
        head = self._head()  # first: what others append meanwhile may be among the rows, and is not missing from them
        return ledger.verified(self._rows(afresh=True), head)

    def record_looks(self, test_digest: str, candidates: Sequence[str]) -> int:
        """Record that `candidates` (digests) were scored on a test split; returns how many distinct ones ever were, these included."""
        with self.alone():
            seen = ledger.looked(self.ledger(test_digest))
            new = [digest for digest in dict.fromkeys(candidates) if digest not in seen]
            reused = [digest for digest in dict.fromkeys(candidates) if digest in seen]
            self._record("look", test_digest, None, "", {"candidates": new, "reused": reused})
            return self.looks(test_digest)

    def looks(self, test_digest: str, without: Collection[str] = ()) -> int:
        """How many distinct candidates were ever scored on a test split; those whose digests are in `without` are not counted."""
        return sum(digest.partition(" ")[0] not in without for digest in ledger.looked(self.ledger(test_digest)))

    def looks_of(self, test_digest: str, digests: Sequence[str]) -> tuple[int, ...]:
        """The counts that looks at a test split had come to when these candidates took them together: one each time they were judged."""
        return ledger.looks_of(self.ledger(test_digest), digests)

    def _record(self, event: str, name: str, version: int | None, because: str, details: Mapping[str, Any]) -> None:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self.alone():
            for _ in range(20):  # every lost race means that another writer's entry stands, so this ends
                end = ledger.chain_of(self._rows()).end
                if self._append(Entry(event, name, version, _who(), when, because, details, end, uuid.uuid4().hex)):
                    return
        raise UserError("ledger: twenty attempts to append were overtaken by other writers; try again")

    def _append(self, entry: Entry) -> bool:
        """Add an entry; False when another writer was faster, so that this one does not stand."""
        text = ledger.text_of(entry)
        sha = ledger.sha256(text)
        with self.asking("writing the ledger"):
            with _unless("RESOURCE_ALREADY_EXISTS", self, "writing the ledger"):
                self.client.create_registered_model(LEDGER, description="Append-only record kept by portaisys; each version is an entry.")
            self.client.create_model_version(LEDGER, "portaisys:/ledger", tags={"entry": text, "sha256": sha}, await_creation_for=None)
            stands = sha in ledger.chain_of(self._rows()).hashes
            if stands:
                self.client.set_registered_model_tag(LEDGER, "head", sha)
        return stands

    def _rows(self, *, afresh: bool = False) -> list[Row]:
        """All entries by number; only those newer than what was read before are asked for, unless `afresh`."""
        last = 0 if afresh else max(self._read, default=0)
        with self.asking("reading the ledger"):
            newer = f"name = '{LEDGER}' and version_number > {last}"
            found = _pages(self.client.search_model_versions, filter_string=newer, order_by=["version_number ASC"])
        new = {int(item.version): (int(item.version), item.tags.get("entry", ""), item.tags.get("sha256", "")) for item in found}
        self._read = new if afresh else {**self._read, **new}
        return sorted(self._read.values())

    def _head(self) -> str:
        try:
            with self.asking("reading the ledger"):
                return str(self.client.get_registered_model(LEDGER).tags.get("head", ""))
        except RefusedError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
        return ""


@contextlib.contextmanager
def _unless(code: str, registry: Registry, what: str) -> Iterator[None]:
    """Let one answer of MLflow pass."""
    try:
        with registry.asking(what):
            yield
    except RefusedError as error:
        if error.code != code:
            raise


def _version(item: Any) -> Version:
    tags = item.tags
    if not DIGEST.fullmatch(tags.get("digest", "")):
        raise UserError(f"{item.name}@{item.version}: was not published by portaisys (it has no digest); publish it with portaisys")
    lineage = {key.removeprefix("lineage."): value for key, value in tags.items() if key.startswith("lineage.")}
    return Version(
        name=item.name, version=int(item.version), digest=tags["digest"], manifest=tags.get("manifest", ""), run_id=item.run_id,
        aliases=tuple(sorted(item.aliases)), verdict=tags.get("verdict", ""), because=tags.get("because", ""), lineage=lineage,
    )  # fmt: skip


def _inside_run(digest: str) -> str:
    return f"versions/{digest}"


def _pages(search: Any, **query: Any) -> list[Any]:
    found, token = [], None
    while True:
        page = search(**query, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


# --- plain values -------------------------------------------------------------------------------------------------


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = re.sub(r"[^\w\-./: ]", "_", f"{prefix}{key}")  # the characters MLflow takes
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a passwd line
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _no_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


def _cause(error: Exception) -> str:
    return _no_password((str(error) or type(error).__name__).splitlines()[0][:300])
