"""The configuration files of deploy/ are ones that the server takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.monitoring import DEPLOY
from mora_serve.config import Config, load_config

FILES = sorted(DEPLOY.rglob("mora.toml"))


def test_there_is_one_for_each_way_of_running():
    assert {path.parent.name for path in FILES} == {"compose", "docker", "systemd"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_it_loads(path: Path):
    config = load_config(path, {})
    assert config.server.state == "/var/lib/mora-serve/state"
    assert config.adapters.root == "/var/lib/mora-serve/adapters"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_who_listens_beyond_the_machine_says_who_may_call(path: Path):
    config = load_config(path, {})
    if config.server.host != Config().server.host:
        assert config.server.tls_cert or config.server.allow_plaintext
        assert config.access.file or config.access.allow_anonymous
    if config.server.http_host != Config().server.http_host:
        assert config.access.file or config.server.http_names  # against DNS rebinding


def test_the_environment_file_names_keys_that_exist():
    lines = (DEPLOY / "systemd" / "environment").read_text().splitlines()
    settings = dict(line.lstrip("#").split("=", 1) for line in lines if "=" in line)
    assert settings
    assert all(name.startswith("MORA_") for name in settings)
    config = load_config(None, settings)
    assert config != Config()
