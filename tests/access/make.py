"""Access files for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mora_serve.access.keys import new_secret, sha256_of
from mora_serve.cli.key import append, entry


def key(path: Path, key_id: str, tenant: str, roles: Iterable[str], more: str = "") -> str:
    """Add a key to an access file as the command does; the secret."""
    secret = new_secret()
    append(path, key_id, entry(key_id, tenant, list(roles), sha256_of(secret)) + more)
    return secret


def authorization(secret: str) -> tuple[tuple[str, str], ...]:
    """A call's metadata with a key."""
    return (("authorization", f"Bearer {secret}"),)
