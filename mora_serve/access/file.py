"""The access file: keys, tenants and their limits, read again when it changes.

[limits]                      # of each tenant; what is left out is not limited
concurrency = 64              # calls at the same time
requests_per_second = 50.0
burst = 100                   # calls at once, before that rate holds
adapters = 500                # registered
bytes = 10_000_000_000        # of their weights

[tenants.acme]                # where acme's differ
concurrency = 128

[[keys]]                      # as `mora-serve key new` writes it
id = "acme-web"
sha256 = "..."
tenant = "acme"
roles = ["generate"]
expires = 2027-01-01T00:00:00Z
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import re
import threading
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mora_serve.access.keys import Key, Keys
from mora_serve.access.limits import Limits
from mora_serve.access.roles import Role
from mora_serve.adapters.untrusted import check_name
from mora_serve.errors import ConfigError, InvalidArgument

CHECK_SECONDS = 1.0
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """What an access file says."""

    keys: Keys
    limits: Limits = field(default_factory=Limits)
    tenants: Mapping[str, Limits] = field(default_factory=dict)

    def limits_of(self, tenant: str) -> Limits:
        """A tenant's limits."""
        return self.tenants.get(tenant, self.limits)


class AccessFile:
    """The rules of a file, at most ``CHECK_SECONDS`` old. Any thread may ask.

    A change that cannot be read is logged, and what held before holds on: a slip of the pen locks
    nobody out, and nobody in either. Raises ConfigError for a file that cannot be read at first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._rules = read_rules(path)
        self._checked = time.monotonic()

    @property
    def rules(self) -> Rules:
        """What holds now."""
        if time.monotonic() - self._checked >= CHECK_SECONDS and self._lock.acquire(False):
            try:
                self._check()
            finally:
                self._checked = time.monotonic()
                self._lock.release()
        return self._rules

    def _check(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._rules = read_rules(self._path)
        except ConfigError as e:
            log.error("the access file has changed and is not used: %s", e.message)
        else:
            log.info("the access file has changed and is in use")

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def read_rules(path: Path) -> Rules:
    """The rules of a file. Raises ConfigError, which names the entry at fault."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise _wrong(f"the file cannot be read ({e.strerror}); give one") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise _wrong(f"it is not valid TOML: {e}") from None
    _known(tree, ("limits", "tenants", "keys"), "")
    limits = _limits(_table(tree.get("limits", {}), "limits"), "limits", Limits())
    tenants = {
        _name(name, f"tenants.{name}"): _limits(
            _table(table, f"tenants.{name}"), f"tenants.{name}", limits
        )
        for name, table in _table(tree.get("tenants", {}), "tenants").items()
    }
    entries = tree.get("keys", [])
    if not isinstance(entries, list):
        raise _wrong("keys is no list of tables; write [[keys]] above each key")
    keys = [_key(_table(entry, f"keys[{i}]"), f"keys[{i}]") for i, entry in enumerate(entries)]
    for what in ("id", "sha256"):
        seen: set[str] = set()
        for i, key in enumerate(keys):
            if (value := getattr(key, what)) in seen:
                raise _wrong(f"keys[{i}].{what} is that of another key; give each its own")
            seen.add(value)
    return Rules(Keys(keys), limits, tenants)


def _key(entry: Mapping[str, Any], where: str) -> Key:
    _known(entry, ("id", "sha256", "tenant", "roles", "expires"), f"{where}.")
    digest = entry.get("sha256")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise _wrong(
            f"{where}.sha256 is no SHA-256 in 64 lower-case hex digits; make a key with "
            "`mora-serve key new`"
        )
    roles, known = entry.get("roles"), [role.value for role in Role]
    if not isinstance(roles, list) or not roles or any(role not in known for role in roles):
        raise _wrong(f"{where}.roles is no list of some of {', '.join(known)}")
    expires = entry.get("expires")
    if expires is not None and (
        not isinstance(expires, datetime.datetime) or expires.tzinfo is None
    ):
        raise _wrong(f"{where}.expires is no time with a zone, such as 2027-01-01T00:00:00Z")
    return Key(
        id=_name(entry.get("id"), f"{where}.id"),
        sha256=digest,
        tenant=_name(entry.get("tenant"), f"{where}.tenant"),
        roles=frozenset(map(Role, roles)),
        expires=expires.timestamp() if expires is not None else None,
    )


def _limits(table: Mapping[str, Any], where: str, default: Limits) -> Limits:
    names = [f.name for f in fields(Limits)]
    _known(table, names, f"{where}.")
    values = {name: getattr(default, name) for name in names}
    for name, value in table.items():
        whole = name != "requests_per_second"
        number = isinstance(value, int) if whole else isinstance(value, int | float)
        if isinstance(value, bool) or not number or not math.isfinite(value) or value < 0:
            raise _wrong(f"{where}.{name} is no {'whole ' if whole else ''}number from 0 on")
        if name == "requests_per_second" and not value:
            raise _wrong(f"{where}.{name} is 0; give no key to a tenant that may not call")
        values[name] = value
    return Limits(**values)


def _name(value: Any, where: str) -> str:
    try:
        return check_name(value if isinstance(value, str) else "", where)
    except InvalidArgument as e:
        raise _wrong(e.message) from None


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(f"{where} is no table")
    return value


def _known(table: Mapping[str, Any], names: Any, where: str) -> None:
    for name in table:
        if name not in names:
            raise _wrong(f"{where}{name} is unknown; use {', '.join(names)}")


def _wrong(message: str) -> ConfigError:
    return ConfigError(f"access.file: {message}", field="access.file")
