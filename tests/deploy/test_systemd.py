"""The unit is one that systemd takes, locked down, and in step with how the server ends."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks.monitoring import DEPLOY
from mora_serve.cli import build_parser
from mora_serve.config import load_config
from mora_serve.server.ending import ENGINE_FAILED

DIRECTORY = DEPLOY / "systemd"
UNIT = DIRECTORY / "mora-serve.service"
MOST_EXPOSED = 2.0  # of 10, as systemd-analyze counts


def analyze(*arguments: Any) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True)


def settings() -> dict[str, list[str]]:
    """The unit's keys, each with all of its values."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def config() -> Any:
    return load_config(DIRECTORY / "mora.toml", {})


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit and its drop-in, with a command that is there."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/mora-serve/bin/mora-serve", "/bin/true"))
    drop_in = tmp_path / f"{UNIT.name}.d" / "cuda.conf"
    drop_in.parent.mkdir()
    shutil.copy(DIRECTORY / "cuda.conf", drop_in)
    return unit


def test_systemd_takes_it(installed: Path):
    done = analyze("verify", installed)
    ours = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, ours) == (0, [])


def test_a_key_that_systemd_does_not_know_would_be_found(installed: Path):
    installed.write_text(installed.read_text().replace("ProtectHome=", "ProtectHomes="))
    assert "Unknown key 'ProtectHomes'" in analyze("verify", installed).stderr


def test_it_is_locked_down():
    done = analyze("security", "--offline=true", UNIT)
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    if level is None:
        pytest.skip("this systemd-analyze looks at no unit that is not running")
    assert float(level[1]) <= MOST_EXPOSED


def test_its_command_is_one_that_the_command_line_takes():
    (command,) = settings()["ExecStart"]
    words = shlex.split(command)[1:]
    assert build_parser().parse_args(words).config == "/etc/mora-serve/mora.toml"


def test_a_failed_engine_is_started_again_and_a_wrong_configuration_is_not():
    found = settings()
    assert found["RestartForceExitStatus"] == [str(ENGINE_FAILED)]
    assert found["RestartPreventExitStatus"] == ["2"]
    assert found["Restart"] == ["on-failure"]


def test_there_is_time_to_drain():
    (stop,) = settings()["TimeoutStopSec"]
    assert float(stop) >= config().server.drain_seconds + 5


def test_it_may_write_where_its_configuration_says_and_nowhere_else():
    found = settings()
    assert found["ProtectSystem"] == ["strict"]
    assert "ReadWritePaths" not in found
    may = [Path("/var/lib", d) for d in found["StateDirectory"][0].split()]
    may += [Path("/var/log", d) for d in found["LogsDirectory"]]
    written = (config().server.state, config().adapters.root, config().access.audit)
    assert all(any(Path(path).is_relative_to(m) for m in may) for path in written)


def test_a_card_is_reached_with_the_drop_in_alone():
    drop_in = RawConfigParser(strict=False)
    drop_in.read(DIRECTORY / "cuda.conf")
    assert settings()["PrivateDevices"] == ["yes"]
    assert drop_in["Service"]["PrivateDevices"] == "no"
    assert drop_in["Service"]["DevicePolicy"] == "closed"


def test_the_group_that_may_read_keys_is_one_that_is_made():
    (group,) = settings()["SupplementaryGroups"]
    assert re.search(rf"^g {group} -$", (DIRECTORY / "sysusers.conf").read_text(), re.MULTILINE)
