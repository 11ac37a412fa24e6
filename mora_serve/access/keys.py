"""API keys: made here, kept as their SHA-256 alone, found by what a caller presents.

A key has 256 random bits, so that a plain SHA-256 of it can neither be guessed nor tried out; slow
hashes are for passwords.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mora_serve.access.roles import Role

PREFIX = "mora_"  # what scanners of leaked secrets can look for
LONGEST = 256  # characters
_BUCKET = 4  # characters of a digest by which candidates are found; the rest is compared


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the access file.

    ``id`` names it in logs, ``sha256`` is the hex digest of the secret, ``expires`` unix seconds
    or None.
    """

    id: str
    sha256: str
    tenant: str
    roles: frozenset[Role]
    expires: float | None = None

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and time.time() >= self.expires


class Keys:
    """Keys by what is presented."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._all = tuple(keys)
        self._buckets: dict[str, list[Key]] = {}
        for key in self._all:
            self._buckets.setdefault(key.sha256[:_BUCKET], []).append(key)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._all)

    def find(self, presented: str) -> Key | None:
        """The key of this secret, expired or not.

        What is compared is a digest of what was presented, whole and in constant time: neither
        how long it takes nor what the bucket tells helps to find a secret.
        """
        if len(presented) > LONGEST:
            return None
        digest = sha256_of(presented)
        found = None
        for key in self._buckets.get(digest[:_BUCKET], ()):
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def new_secret() -> str:
    """A new key for a caller; only its digest is to be kept."""
    return PREFIX + secrets.token_urlsafe(32)


def sha256_of(secret: str) -> str:
    """The hex digest by which a key is kept."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def bearer(metadata: Mapping[str, str | bytes]) -> str | None:
    """The key in ``authorization: Bearer KEY``; None without that metadata or in another form."""
    value = metadata.get("authorization")
    if not isinstance(value, str):
        return None
    scheme, _, secret = value.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" and secret.strip() else None
