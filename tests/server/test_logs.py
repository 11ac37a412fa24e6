"""The log: one line an event, each with its call, none with a prompt."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from contextvars import Context
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve import errors
from mora_serve.access.audit import LOGGER, Audit
from mora_serve.access.door import Caller
from mora_serve.client import Client
from mora_serve.demo.process import ServerProcess
from mora_serve.server import call as calls
from mora_serve.server import logs
from tests.server.conftest import running, wait_for

FORMATTERS = {"text": logs.TextFormatter(), "json": logs.JsonFormatter()}


def record(message: str, *args: object, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("mora_serve.x", logging.WARNING, "f.py", 1, message, args, None)
    vars(made).update(more)
    return made


class TestFormats:
    def test_json_lines_say_what_programs_look_for(self):
        line = json.loads(FORMATTERS["json"].format(record("%d of %s", 3, "4", fields={"n": 1})))
        assert line["time"].endswith("+00:00")
        assert (line["level"], line["logger"]) == ("warning", "mora_serve.x")
        assert (line["message"], line["n"]) == ("3 of 4", 1)
        assert "request_id" not in line

    @pytest.mark.parametrize("form", FORMATTERS)
    def test_a_line_of_a_call_names_it(self, form, isolated):
        def line() -> str:
            calls.enter(calls.Call("job-7/a", Caller("acme")))
            return FORMATTERS[form].format(record("x"))

        text = isolated(line)
        assert "job-7/a" in text
        assert "acme" in text
        assert "job-7/a" not in FORMATTERS[form].format(record("x"))

    @given(st.text())
    @pytest.mark.parametrize("form", FORMATTERS)
    def test_no_value_begins_another_line_or_moves_the_cursor(self, form, hostile):
        made = record("got %s", hostile, request_id=hostile, fields={"method": hostile})
        line = FORMATTERS[form].format(made)
        assert line.isprintable()
        if form == "json":
            parsed = json.loads(line)
            assert parsed["message"] == f"got {hostile}"

    @pytest.mark.parametrize("form", FORMATTERS)
    def test_an_exceptions_text_cannot_pose_as_a_line(self, form):
        forged = "2026-01-01 00:00:00,000 INFO    mora_serve: forged"
        try:
            raise ValueError(f"bad\n{forged}\x1b[2J")
        except ValueError:
            made = record("failed", exc_info=sys.exc_info())
        text = FORMATTERS[form].format(made)
        assert "ValueError" in text
        assert "\x1b" not in text
        assert not any(line.startswith("2026-01-01") for line in text.splitlines())
        assert form == "text" or len(text.splitlines()) == 1


@pytest.fixture
def isolated():
    """Runs something in a context of its own."""
    return Context().run


@pytest.fixture
def written() -> Iterator[list[dict[str, Any]]]:
    """The lines of ended calls, as a program reads them."""
    lines: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(FORMATTERS["json"].format(record)))

    logger, handler = logging.getLogger("mora_serve.calls"), Keep()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def of(lines: list[dict[str, Any]], request_id: str) -> dict[str, Any]:
    """The one line about a request, which may come a moment after its answer."""
    wait_for(lambda: any(line.get("request_id") == request_id for line in lines))
    (found,) = [line for line in lines if line.get("request_id") == request_id]
    return found


class TestCalls:
    def test_an_answered_call_tells_its_tokens(self, client, written):
        client.generate("hello", base=True, max_tokens=3, ignore_eos=True, request_id="one")
        line = of(written, "one")
        assert line["method"] == "/mora_serve.v1.GenerationService/Generate"
        assert (line["code"], line["completion_tokens"]) == ("OK", 3)
        assert line["prompt_tokens"] >= 1
        assert 0 < line["seconds"] < 60
        assert line["tenant"] == client._tenant

    def test_so_does_a_stream(self, client, written):
        list(client.stream("hello", base=True, max_tokens=3, ignore_eos=True, request_id="two"))
        assert of(written, "two")["completion_tokens"] == 3

    def test_a_refused_call_tells_its_code(self, client, written):
        with pytest.raises(errors.NotFound):
            client.get_adapter("none", request_id="three")
        line = of(written, "three")
        assert line["code"] == "NOT_FOUND"
        assert "completion_tokens" not in line

    def test_a_cancelled_call_is_told(self, client, written):
        with client.stream("hello", base=True, max_tokens=2000, request_id="four", ignore_eos=True):
            pass
        assert of(written, "four")["code"] == "CANCELLED"

    def test_health_is_not_told_at_this_level(self, client, written):
        client.wait_until_ready(20)
        client.server_info(request_id="five")
        of(written, "five")
        assert not [line for line in written if "health" in line["method"]]

    def test_none_where_it_is_switched_off(self, configure, written):
        config = configure(server={"log_calls": False})
        with running(config) as serving, serving.client() as client:
            client.server_info()
        assert not written


def test_the_process_logs_json_and_no_prompt(root):
    """At any level: prompts and answers are the callers', and a log is read by others."""
    flags = {
        "base.model": root / "base",
        "base.quantization": "none",
        "server.log_format": "json",
    }
    process = ServerProcess(flags)
    process._command.append("--log-level=debug")
    with process as server, Client(server.address, timeout=60) as client:
        server.wait_until_ready(client)
        for options in ({"base": True}, {}):
            client.generate("a secret word", max_tokens=2, request_id="six", **options)
        with pytest.raises(errors.NotFound):
            client.generate("a secret word", task="secret-task")
        assert server.stop() == 0
        lines = server.whole_log.splitlines()
    assert all(json.loads(line)["level"] for line in lines)
    assert [line for line in lines if json.loads(line).get("request_id") == "six"]
    assert "secret word" not in "".join(lines)


def test_the_audit_log_does_not_depend_on_the_level():
    root, audit = logging.getLogger(), logging.getLogger(LOGGER)
    before = root.handlers[:], root.level, audit.level
    stream = io.StringIO()
    try:
        logs.configure("error", "text", stream)
        Audit(None).record("router.loaded", request_id="r", tenant="t", key="k")
        Audit(None).denied(request_id="r", tenant="t", key="k", method="m", reason="WRONG_ROLE")
        logging.getLogger("mora_serve.y").warning("unseen")
        registered, denied = stream.getvalue().splitlines()
        assert "router.loaded" in registered
        assert "WRONG_ROLE" in denied
    finally:
        logging.captureWarnings(False)
        root.handlers[:], root.level, audit.level = before


def test_configure_writes_one_form_to_one_stream():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        logs.configure("info", "json", stream)
        logging.getLogger("mora_serve.y").info("a\nb")
        logging.getLogger("mora_serve.y").debug("unseen")
        (line,) = stream.getvalue().splitlines()
        assert json.loads(line)["message"] == "a\nb"
    finally:
        logging.captureWarnings(False)
        root.handlers[:], root.level = before[0], before[1]
