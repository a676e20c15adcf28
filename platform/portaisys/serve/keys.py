"""API keys: who may ask which models, over HTTP and gRPC alike.

A file holds only hashes of keys, so reading it gives none away: `portaisys key NAME` makes a key, prints it once and adds its line.
Health is answered without a key, since balancers have none. Knows neither HTTP nor gRPC: it is given the value of a header.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from portaisys.artifact import write_text
from portaisys.spec import UserError

HEADERS = ("authorization", "x-api-key")
REMEMBERED = 10_000  # headers whose owner is known; beyond that all are forgotten
MOST_REMEMBERED = 256  # characters of one: guesses may be as long as a head, and 10,000 of those would stay


class ForbiddenError(Exception):
    """No key, a wrong one (`known` False), or one that may not do this."""

    def __init__(self, message: str, known: bool) -> None:
        super().__init__(message)
        self.known = known


@dataclass(frozen=True)
class Key:
    """`sha256`: hex, of the key; `models`: names, or "*" for all; `admin`: may load, unload and list."""

    name: str
    sha256: str
    models: tuple[str, ...] = ("*",)
    admin: bool = False


@dataclass
class Keys:
    """The keys of a server."""

    keys: Sequence[Key]
    _owners: dict[str, Key | None] = field(default_factory=dict)

    def check(self, headers: Mapping[str, str], model: str | None = None, *, admin: bool = False) -> str:
        """The name of who asks. `headers`: lower-case names. Raises ForbiddenError."""
        given = next((headers[name] for name in HEADERS if name in headers), "")
        if not given:
            raise ForbiddenError("a key is needed; send Authorization: Bearer KEY, or X-API-Key: KEY", known=False)
        owner = self._owners[given] if given in self._owners else self._find(given)
        if owner is None:
            raise ForbiddenError("this key is not known here", known=False)
        if admin and not owner.admin:
            raise ForbiddenError(f"the key of {owner.name} may not load, unload or list models", known=True)
        if model is not None and "*" not in owner.models and model not in owner.models:
            raise ForbiddenError(f"the key of {owner.name} may not ask this model", known=True)
        return owner.name

    def _find(self, given: str) -> Key | None:
        """Compared with every key in constant time, whichever fits: how long it takes says nothing."""
        digest = hashlib.sha256(given.removeprefix("Bearer ").encode("latin-1", "replace")).hexdigest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if len(given) <= MOST_REMEMBERED:
            if len(self._owners) >= REMEMBERED:
                self._owners.clear()
            self._owners[given] = found
        return found


def read_keys(path: Path) -> Keys:
    """The keys of a file. Raises UserError naming what is wrong in it."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"keys: {path} cannot be read ({getattr(error, 'strerror', None) or type(error).__name__}); make one with portaisys key NAME --file {path}") from None
    if not isinstance(tree, list) or not tree:
        raise UserError(f"keys: {path} is no list of keys; make one with portaisys key NAME --file {path}")
    return Keys([_key(entry, path) for entry in tree])


def _key(entry: Any, path: Path) -> Key:
    known = {"name", "sha256", "models", "admin"}
    if not isinstance(entry, dict) or not {"name", "sha256"} <= set(entry) <= known:
        raise UserError(f"keys: an entry of {path} has name and sha256, and may have models and admin; this one has {sorted(entry) if isinstance(entry, dict) else type(entry).__name__}")
    models = entry.get("models", ["*"])
    if not re.fullmatch("[0-9a-f]{64}", str(entry["sha256"])) or not isinstance(models, list) or not isinstance(entry.get("admin", False), bool):
        raise UserError(f"keys: the entry {entry['name']!r} of {path}: sha256 is 64 hex digits, models a list of names, admin true or false")
    return Key(str(entry["name"]), entry["sha256"], tuple(map(str, models)), entry.get("admin", False))


def add_key(path: Path, name: str, models: Sequence[str] = ("*",), *, admin: bool = False) -> str:
    """Add a new key to a file, made if need be and readable by its owner alone; returns the key, which is written nowhere. Raises UserError."""
    keys = list(read_keys(path).keys) if path.exists() else []
    if any(key.name == name for key in keys):
        raise UserError(f"keys: {path} has a key of {name!r}; take another name, or remove that entry")
    secret = secrets.token_urlsafe(32)
    keys.append(Key(name, hashlib.sha256(secret.encode()).hexdigest(), tuple(models), admin))
    entries = [{"name": key.name, "sha256": key.sha256, "models": list(key.models), "admin": key.admin} for key in keys]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(entries, sort_keys=False))
    path.chmod(0o600)
    return secret


def refuse_open(host: str, keys: Keys | None) -> None:
    """Raises UserError for a port that others reach and nobody guards."""
    if keys is None and not _loopback(host):
        raise UserError(f"data_host: {host} is reached from other machines, and no keys are set; name a file in `keys` (portaisys key NAME --file keys.yaml), or listen on 127.0.0.1")


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
