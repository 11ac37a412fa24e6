"""The SHA-256 that a sender may state of an adapter's files, so that no others take their place.

It is that of the files one behind the other, the configuration, the weights and, where there is
one, the card, as ``cat adapter_config.json adapter_model.safetensors | sha256sum`` prints it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from mora_serve.adapters.untrusted import quoted
from mora_serve.errors import InvalidArgument

FIELD = "sha256"

_SUM = re.compile(r"[0-9a-fA-F]{64}")


def stated_sum(text: str, *, required: bool) -> str:
    """A stated sum as it is compared; empty where none is stated, nor ``required``.

    Raises InvalidArgument.
    """
    if not text and required:
        raise InvalidArgument(
            f"{FIELD}: it is missing, and this server takes no adapter without "
            "(adapters.require_sha256); give the hex SHA-256 of adapter_config.json, "
            "adapter_model.safetensors and routing_card.json, if there is one, in this order",
            field=FIELD,
            reason="SHA256_REQUIRED",
        )
    if text and not _SUM.fullmatch(text):
        raise InvalidArgument(
            f"{FIELD}: {quoted(text)} is no SHA-256; give 64 hexadecimal digits",
            field=FIELD,
            reason="INVALID_SHA256",
        )
    return text.lower()


def check_sum(stated: str, parts: Iterable[bytes | memoryview | None]) -> None:
    """Raise InvalidArgument unless the files, those that there are, have the stated sum."""
    digest = hashlib.sha256()
    for part in parts:
        if part is not None:
            digest.update(part)
    if digest.hexdigest() != stated:
        raise InvalidArgument(
            f"{FIELD}: the files do not have the SHA-256 {stated}; they were changed or cut off, "
            "or another directory was meant: compare them and send them again",
            field=FIELD,
            reason="SHA256_MISMATCH",
        )
