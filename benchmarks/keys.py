"""API keys for measurements and tests: made, put into an access file, sent."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mora_serve.access.keys import new_secret, sha256_of
from mora_serve.access.roles import Role
from mora_serve.cli.key import append, entry

OVER = "expires = 2020-01-01T00:00:00Z\n"


def add_key(
    file: Path,
    key_id: str,
    tenant: str,
    roles: Iterable[Role | str] = Role,
    more: str = "",
    secret: str = "",
) -> str:
    """Add a key to an access file as the command does, with all roles unless said; the secret.

    ``more`` are further lines of its entry, like ``OVER`` for one whose time is over.
    """
    secret = secret or new_secret()
    names = [Role(role).value for role in roles]
    append(file, key_id, entry(key_id, tenant, names, sha256_of(secret)) + more)
    return secret


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    """A call's metadata with a key."""
    return (("authorization", f"Bearer {secret}"),)
