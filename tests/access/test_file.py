"""The access file: read strictly, again when it changes, never half."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from mora_serve.access import file as module
from mora_serve.access.file import AccessFile, read_rules
from mora_serve.access.keys import sha256_of
from mora_serve.access.limits import Limits
from mora_serve.access.roles import Role
from mora_serve.errors import ConfigError

DIGESTS = [sha256_of(str(i)) for i in range(3)]
GOOD = f"""
[limits]
concurrency = 4
requests_per_second = 2.5

[tenants.acme]
concurrency = 8
bytes = 1000

[[keys]]
id = "web"
sha256 = "{DIGESTS[0]}"
tenant = "acme"
roles = ["generate", "register"]
expires = 2999-01-01T00:00:00Z

[[keys]]
id = "old"
sha256 = "{DIGESTS[1]}"
tenant = "other"
roles = ["admin"]
expires = 2020-01-01T00:00:00+02:00
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_keys_tenants_and_limits_are_read(tmp_path: Path) -> None:
    rules = read_rules(write(tmp_path / "access.toml", GOOD))
    web, old = rules.keys.find("0"), rules.keys.find("1")
    assert web is not None
    assert old is not None
    assert (web.tenant, web.roles) == ("acme", {Role.GENERATE, Role.REGISTER})
    assert (web.expired, old.expired) == (False, True)
    assert rules.limits_of("acme") == Limits(8, 2.5, None, None, 1000)
    assert rules.limits_of("other") == rules.limits_of("new") == Limits(4, 2.5)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("[limits]", "[limit]", "limit is unknown; use limits, tenants, keys"),
        ("concurrency = 4", "concurrency = -4", "limits.concurrency"),
        ("concurrency = 4", "concurrency = 4.5", "limits.concurrency is no whole number"),
        ("concurrency = 8", "concurrency = true", "tenants.acme.concurrency"),
        ("= 2.5", "= 0", "limits.requests_per_second is 0"),
        ("= 2.5", "= nan", "limits.requests_per_second"),
        ("bytes = 1000", "byte = 1000", "tenants.acme.byte is unknown"),
        ("[tenants.acme]", "[tenants.ACME]", "tenants.ACME: 'ACME' is not a valid name"),
        ('id = "web"', 'id = "old"', "keys[1].id is that of another key"),
        (DIGESTS[0], DIGESTS[1], "keys[1].sha256 is that of another key"),
        (DIGESTS[0], "secret", "keys[0].sha256 is no SHA-256"),
        (DIGESTS[0], DIGESTS[0].upper(), "keys[0].sha256 is no SHA-256"),
        ('tenant = "acme"', "", "keys[0].tenant: '' is not a valid name"),
        ('"generate", "register"', "", "keys[0].roles is no list of some of generate, register"),
        ('"generate", "register"', '"root"', "keys[0].roles"),
        ("2999-01-01T00:00:00Z", '"soon"', "keys[0].expires is no time with a zone"),
        ("2999-01-01T00:00:00Z", "2999-01-01T00:00:00", "keys[0].expires is no time with a zone"),
        ("[[keys]]", "[keys", "not valid TOML"),
    ],
)
def test_a_file_with_a_mistake_is_refused_and_the_entry_named(
    tmp_path: Path, old: str, new: str, named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_rules(write(tmp_path / "access.toml", GOOD.replace(old, new, 1)))
    assert caught.value.message.startswith("access.file: ")
    assert named in caught.value.message
    assert str(tmp_path) not in caught.value.message
    assert not any(digest in caught.value.message for digest in DIGESTS)


def test_a_file_that_is_not_there_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        AccessFile(tmp_path / "none.toml")


def test_a_change_is_in_use_and_a_broken_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "CHECK_SECONDS", 0)
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "access.toml", GOOD)
    access = AccessFile(path)
    assert access.rules.keys.find("2") is None

    write(path, GOOD + f'[[keys]]\nid = "x"\nsha256 = "{DIGESTS[2]}"\n')
    assert access.rules.keys.find("0") is not None
    assert "is not used: access.file: keys[2].roles" in caplog.text

    write(path, GOOD.replace(DIGESTS[0], DIGESTS[2]))
    assert access.rules.keys.find("0") is None
    assert access.rules.keys.find("2") is not None
    assert "is in use" in caplog.text

    os.unlink(path)
    assert access.rules.keys.find("2") is not None
