"""``mora-serve key``: an access file is added to, and nothing else about it changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mora_serve.access.file import read_rules
from mora_serve.access.keys import sha256_of
from mora_serve.cli import main
from tests.access import make


def new(path: Path, key_id: str = "web", *more: str) -> int:
    command = ("key", "new", "--id", key_id, "--tenant", "acme", "--role", "generate")
    return main([*command, "--file", str(path), *more])


def test_what_is_printed_is_a_key_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "access.toml"
    assert new(path) == 0
    secret = capsys.readouterr().out.strip()
    (key,) = read_rules(path).keys
    assert (key.id, key.tenant, key.sha256) == ("web", "acme", sha256_of(secret))
    assert path.stat().st_mode & 0o777 == 0o600
    assert secret not in path.read_text()


def test_the_same_id_again_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "access.toml"
    assert (new(path), new(path)) == (0, 1)
    assert "choose another id" in capsys.readouterr().err
    assert len(list(read_rules(path).keys)) == 1


@pytest.mark.parametrize("before", ["keys = []\n", "[limits]\nx = 3\n", "x = 1\n", "[[keys\n"])
def test_a_file_that_takes_no_entry_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str
) -> None:
    path = tmp_path / "access.toml"
    path.write_text(before)
    assert new(path) in (1, 2)
    assert capsys.readouterr().out == ""
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["access.toml"]


def test_a_list_of_no_keys_gets_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TOML forbids tables beside it: the server would not read such a file."""
    path = tmp_path / "access.toml"
    path.write_text("keys = []\n")
    assert new(path) == 1
    assert "write its keys as [[keys]] tables" in capsys.readouterr().err


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "access.toml"
    link.symlink_to("real/access.toml")
    assert (new(link, "one"), new(link, "two")) == (0, 0)
    assert link.is_symlink()
    assert [key.id for key in read_rules(tmp_path / "real" / "access.toml").keys] == ["one", "two"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_the_owner_and_the_mode_stay(tmp_path: Path) -> None:
    """A server that runs as another user still reads its file."""
    path = tmp_path / "access.toml"
    new(path, "one")
    os.chown(path, 1234, 2345)
    path.chmod(0o640)
    new(path, "two")
    status = path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1234, 2345, 0o640)


def test_of_many_at_the_same_time_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    program = (
        "import sys; from pathlib import Path; from tests.access import make\n"
        "for i in range(20): make.key(Path(sys.argv[1]), f'{sys.argv[2]}-{i}', 't', ['generate'])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(path), f"p{i}"]) for i in range(3)
    ]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert len(list(read_rules(path).keys)) == 60


def test_entries_are_appended_below_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    path.write_text("[limits]\nconcurrency = 3  # of everybody")
    make.key(path, "one", "acme", ["generate"])
    rules = read_rules(path)
    assert rules.limits.concurrency == 3
    assert [key.id for key in rules.keys] == ["one"]
    assert "# of everybody" in path.read_text()
