"""The load generator against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import load
from tests.server.conftest import Running, configuration, root, running

__all__ = ["root"]  # the fixture


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Running]:
    with running(configuration(root)) as server:
        with server.client() as client:
            for name in ("rev", "sum", "plain"):
                client.register_adapter(name, name)
        yield server


FEW = ["--rate", "40", "--seconds", "0.5", "--max-tokens", "4", "--prompt-tokens", "5", "--json"]


def play(server: Running, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    assert load.main(["--address", server.server.address, *FEW, *flags]) == 0
    out = capsys.readouterr().out
    result: dict[str, object] = json.loads(out.splitlines()[-1])
    return result


@pytest.mark.parametrize(
    "flags",
    [(), ("--adapters", "rev,sum,plain", "--mixture", "2", "--popularity", "zipf")],
    ids=["base", "mixtures"],
)
def test_every_request_is_answered_in_full(
    server: Running, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    result = play(server, capsys, *flags)
    assert result["failed"] == 0
    requests, seconds = result["requests"], result["seconds"]
    assert isinstance(requests, int)
    assert isinstance(seconds, float)
    assert requests > 5
    assert result["tokens_per_second"] == pytest.approx(4 * requests / seconds)


def test_an_unknown_adapter_is_an_error_by_code(
    server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    result = play(server, capsys, "--adapters", "nobody")
    assert result["answered"] == 0
    assert result["errors"] == {"NOT_FOUND": result["requests"]}


def test_prompts_come_from_a_file_and_the_router_may_pick(
    server: Running, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """This server has no router: what asks for one is refused, nothing else is."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("reverse it\nadd them\n")
    assert play(server, capsys, "--prompts", str(prompts))["failed"] == 0
    errors = play(server, capsys, "--prompts", str(prompts), "--auto")["errors"]
    assert errors == {} or set(errors) == {"FAILED_PRECONDITION"}  # type: ignore[call-overload]


def test_a_server_that_is_not_there_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(["--address", "127.0.0.1:1", *FEW]) == 1
    assert "not reachable" in capsys.readouterr().err


def test_wrong_flags_say_what_to_give(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for flags, remedy in (
        (["--rate", "0"], "above 0"),
        (["--adapters", "a", "--mixture", "2"], "give 1 to 1"),
        (["--prompts", str(tmp_path)], "give a text file"),
    ):
        with pytest.raises(SystemExit):
            load.parse(flags)
        assert remedy in capsys.readouterr().err
