"""The command line: help, flags, exit statuses, one-line errors, and each command for real."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys

import pytest

from mora_serve import __version__, config
from mora_serve.cli import build_parser, main, output, serve
from mora_serve.cli.prompt import selection

COMMANDS = (
    ["serve"],
    ["demo"],
    ["generate"],
    ["adapters"],
    *(
        ["adapters", a]
        for a in ("list", "show", "check", "register", "upload", "update", "unregister", "pin")
    ),
    ["route"],
    ["feedback"],
    ["feedback", "export"],
    ["info"],
    ["plan"],
)


def status_of(*argv: str) -> int:
    """The exit status of a command line, however it ends."""
    try:
        return main(argv)
    except SystemExit as e:
        return int(e.code or 0)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(*command, "--help") == 0
    text = capsys.readouterr().out
    assert "usage: mora-serve" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_without_a_command_the_help_is_shown_and_the_status_says_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status_of() == 2
    assert "first steps" in capsys.readouterr().out
    assert status_of("adapters") == 2
    assert "register" in capsys.readouterr().out
    assert status_of("feedback") == 2
    assert "export" in capsys.readouterr().out


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mora_serve", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"mora-serve {__version__}"


def test_serve_has_a_flag_for_every_key_of_the_configuration() -> None:
    given = [f"--{key}={default}" for key, (_, default, _) in config.keys().items()]
    args = build_parser().parse_args(["serve", *given])
    assert set(serve.flags(args)) == set(config.keys())
    assert config.load_config(environ={}, flags=serve.flags(args)) == config.Config()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("sevre",), "invalid choice"),
        (("serve", "--adapters.slotz", "3"), "did you mean --adapters.slots"),
        (("serve", "--adapter.slots=3"), "did you mean --adapters.slots"),
        (("serve", "--adapters.slots", "none"), "'none' is not a valid int"),
        (("serve", "--adapters.max_rank", "0"), "adapters.max_rank: 0 is out of range"),
        (("serve", "--config", "no-such-file.toml"), "configuration file: cannot be read"),
        (("serve", "--adapt", "3"), "unknown argument --adapt"),
        (("generate", ""), "prompt: it is empty"),
        (("generate", "x", "--adapter", "a=much"), "NAME=WEIGHT"),
        (("generate", "x", "--adapter", "a=nan"), "NAME=WEIGHT"),
        (("generate", "x", "--adapter", "=1"), "NAME=WEIGHT"),
        (("generate", "x", "--adapter", "a", "--base"), "not allowed with"),
        (("generate", "x", "--base", "--max-adapters", "2"), "are for the router"),
        (("route", "x", "--fallback-to-router"), "is for --task"),
        (("generate", "x", "--temperature", "warm"), "invalid float"),
        (("generate", "x", "--timeout", "-1"), "above 0"),
        (("generate",), "required: PROMPT"),
        (("adapters", "register", "a"), "required: DIR"),
        (("adapters", "register", "a", "b", "--prompts", "no-such-file"), "cannot be read"),
        (("adapters", "upload", "a", "no-such-directory"), "adapter_config.json"),
        (("adapters", "update", "a"), "card: nothing of it is given"),
        (("feedback", "export"), "required: FILE.jsonl"),
        (("feedback", "export", "f", "--since", "soon"), "'soon' is no time"),
    ],
)
def test_a_wrong_command_line_exits_with_two_and_says_what_is_wrong(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(*argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_a_server_that_is_not_there_is_an_error_of_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"  # bound, not listening
        assert status_of("info", "--address", address, "--timeout", "1") == 1
    error = capsys.readouterr().err
    assert error.startswith("mora-serve: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-tokens", "-1"), "sampling.max_tokens: -1 cannot be sent; give a positive"),
        (("--top-k", "-1"), "sampling.top_k: -1 cannot be sent; give a positive"),
        (("--seed", str(1 << 64)), "sampling.seed: "),
        (("--max-adapters", str(1 << 32)), "selection.auto.max_adapters: "),
        (("--tenant", "é"), "tenant: '\\xe9' is not a valid name; use 1 to 64"),
    ],
)
def test_a_value_that_cannot_be_sent_is_named_with_its_remedy(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of("generate", "x", *flags) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_each_way_of_choosing_becomes_one_selection() -> None:
    def chosen(*flags: str) -> object:
        return selection(build_parser().parse_args(["route", "x", *flags]))

    assert chosen() == {}
    assert chosen("--base") == {"base": True}
    two = {"task": ["a", "b"], "fallback_to_router": False}
    assert chosen("--task", "a", "--task", "b") == two
    falling = {"task": ["a"], "fallback_to_router": True}
    assert chosen("--task", "a", "--fallback-to-router") == falling
    assert chosen("--adapter", "a", "--adapter", "b=-0.5") == {"adapters": {"a": 1.0, "b": -0.5}}
    assert chosen("--candidate", "a") == {"candidates": ["a"], "max_adapters": 0}
    assert chosen("--max-adapters", "1") == {"candidates": [], "max_adapters": 1}


def test_an_adapter_named_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("route", "x", "--adapter", "a", "--adapter", "a=2") == 2
    assert "twice" in capsys.readouterr().err


def test_a_table_aligns_wide_and_combining_characters() -> None:
    text = output.table(("a", "b"), [("日本", "x"), ("e\u0301", "y"), ("1234", "z")], right=(0,))
    assert text.splitlines() == ["   a  b", "日本  x", "   e\u0301  y", "1234  z"]


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    hostile = "\x1b[2Jgone\r\x07\u202e"
    text = output.table(("a",), [(hostile,)])
    assert "\x1b" not in text
    assert "\r" not in text
    assert "\u202e" not in text
    assert "gone" in text
    assert output.visible("a\tb\n\x1b", keep="\n\t") == "a\tb\n\\x1b"


def test_colours_are_for_terminals_and_off_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        painted = output.paint("ok", "green", terminal)
        assert painted == "\x1b[32mok\x1b[0m"
        assert output.width(painted) == 2
        monkeypatch.setenv("NO_COLOR", "1")
        assert output.paint("ok", "green", terminal) == "ok"
    os.close(leader)
    assert output.paint("ok", "green", sys.stderr) == "ok"


@pytest.mark.parametrize("columns", [1, 2, 5, 80])
def test_a_shortened_text_fits_its_columns(columns: int) -> None:
    for text in ("", "abcdef", "日本語日本語", "a\nb" * 9):
        short = output.shorten(text, columns)
        assert output.width(short) <= columns
        if output.width(text) <= columns and text.isprintable():
            assert short == text
