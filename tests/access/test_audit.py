"""The audit log: a line for each event, through rotation, full disks and floods."""

from __future__ import annotations

import json
import logging
import os
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


def test_a_flood_of_denials_is_counted_instead_of_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 5.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    audit = Audit(tmp_path / "audit")
    for _ in range(1000):
        audit.denied(**WHO, method="/m", reason="NO_KEY")
    assert len(lines(tmp_path / "audit")) == MOST_DENIALS
    now = 6.0
    audit.denied(**WHO, method="/m", reason="NO_KEY")
    assert lines(tmp_path / "audit")[-1]["dropped"] == 1000 - MOST_DENIALS


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
