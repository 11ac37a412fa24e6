"""The audit log: a line for each event, through rotation, full disks and floods."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from pathlib import Path

import pytest

from mora_serve.access import audit as module
from mora_serve.access.audit import MOST_DENIALS, Audit
from mora_serve.errors import ConfigError

WHO = {"request_id": "r", "tenant": "t", "key": "k"}


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_event_is_a_line_of_json(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit")
    audit.record("adapter.registered", **WHO, adapter="a\nb", version=1)
    (line,) = lines(tmp_path / "audit")
    assert {**WHO, "event": "adapter.registered", "adapter": "a\nb", "version": 1}.items() <= (
        line.items()
    )
    assert str(line["time"]).endswith("+00:00")
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o600


def test_a_file_that_was_rotated_away_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    audit = Audit(path)
    audit.record("one", **WHO)
    path.rename(tmp_path / "audit.1")
    audit.record("two", **WHO)
    assert [line["event"] for line in lines(tmp_path / "audit.1")] == ["one"]
    assert [line["event"] for line in lines(path)] == ["two"]


def test_another_start_appends(tmp_path: Path) -> None:
    for event in ("one", "two"):
        audit = Audit(tmp_path / "audit")
        audit.record(event, **WHO)
        audit.close()
    assert [line["event"] for line in lines(tmp_path / "audit")] == ["one", "two"]


def test_without_a_file_the_lines_are_in_the_servers_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Audit(None).record("router.loaded", **WHO, digest="d")
    assert json.loads(caplog.records[-1].getMessage())["event"] == "router.loaded"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that budgets go by."""
    now = [5.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def denials(path: Path, key: str) -> list[dict[str, object]]:
    return [line for line in lines(path) if line["key"] == key]


def test_a_flood_of_denials_is_counted_instead_of_written(tmp_path: Path, now: list[float]) -> None:
    audit = Audit(tmp_path / "audit")
    for _ in range(1000):
        audit.denied(**WHO, method="/m", reason="NO_KEY")
    now[0] += 1
    audit.denied(**WHO, method="/m", reason="NO_KEY")
    audit.close()
    written = lines(tmp_path / "audit")
    assert len(written) == MOST_DENIALS + 1
    assert written[-1]["dropped"] == 1000 - MOST_DENIALS


def test_a_flood_of_strangers_hides_no_denial_of_a_key(tmp_path: Path, now: list[float]) -> None:
    audit, stranger = Audit(tmp_path / "audit"), WHO | {"tenant": "", "key": ""}
    for _ in range(1000):
        audit.denied(**stranger, method="/m", reason="NO_KEY")
    for key in ("a", "b"):
        audit.denied(**WHO | {"key": key}, method="/m", reason="WRONG_ROLE")
    audit.close()
    assert len(denials(tmp_path / "audit", "")) == MOST_DENIALS
    for key in ("a", "b"):
        (line,) = denials(tmp_path / "audit", key)
        assert "dropped" not in line


def test_a_disk_that_hangs_holds_up_nobody_who_denies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit, go_on = Audit(tmp_path / "audit"), threading.Event()
    write, done = os.write, threading.Event()
    monkeypatch.setattr(module.os, "write", lambda *args: go_on.wait(60) and write(*args))

    def deny() -> None:
        for i in range(3 * module._WAITING):
            audit.denied(**WHO | {"key": f"k{i}"}, method="/m", reason="WRONG_ROLE")
        done.set()

    threading.Thread(target=deny, daemon=True).start()
    assert done.wait(60)
    go_on.set()
    audit.close()
    assert module._WAITING <= len(lines(tmp_path / "audit")) <= module._WAITING + 1


def test_a_torn_line_does_not_swallow_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills in the middle of a line, and one that did before this start."""
    path, write = tmp_path / "audit", os.write
    path.write_text('{"event": "of before')
    audit = Audit(path)
    audit.record("one", **WHO)

    def full(file: int, data: bytes) -> int:
        if data.startswith(b'{"time"'):
            return write(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "write", full)
        audit.record("two", **WHO)
    assert audit.failed == 1
    for event in ("three", "four"):
        audit.record(event, **WHO)
    of_before, one, two, three, four = path.read_text().splitlines()
    assert of_before == '{"event": "of before'
    assert two == '{"time": "'
    assert [json.loads(line)["event"] for line in (one, three, four)] == ["one", "three", "four"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_logged_and_counted_and_raises_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    audit = Audit(Path("/dev/full"))
    audit.record("one", **WHO)
    assert audit.failed == 1
    assert '"event": "one"' in caplog.text


def test_a_file_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"access\.audit: .* cannot be written"):
        Audit(tmp_path / "none" / "audit")


def test_a_disk_that_hangs_does_not_keep_the_log_from_being_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_CLOSING", 0.2)
    audit, hangs, goes_on = Audit(tmp_path / "audit"), threading.Event(), threading.Event()
    write = os.write

    def hanging(file: int, data: bytes) -> int:
        hangs.set()
        goes_on.wait(60)
        return write(file, data)

    monkeypatch.setattr(module.os, "write", hanging)
    audit.denied(**WHO, method="/m", reason="NO_KEY")
    assert hangs.wait(30)
    audit.close()
    assert "it is left behind" in caplog.text
    goes_on.set()


def test_what_comes_after_the_end_is_in_the_servers_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    audit = Audit(tmp_path / "audit")
    audit.close()
    audit.record("late", **WHO)
    assert '"event": "late"' in caplog.text
