"""The demo and the command line on the bundled models, over a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mora_serve.cli import main
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.demo.process import ServerProcess
from mora_serve.errors import Unavailable

EXAMPLES = {e.adapter: e for e in read_examples(bundle_path()) if e.kind == "auto"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server of the bundled models."""
    with ServerProcess({"adapters.root": bundle_path(), "engine.threads": 1}) as process:
        with Client(process.address) as client:
            process.wait_until_ready(client)
        yield process.address
        assert process.stop() == 0, process.log


@pytest.fixture
def command(server: str, capsys: pytest.CaptureFixture[str]):
    """Run a command against the server; returns (status, standard output, standard error)."""

    def run(*argv: str) -> tuple[int, str, str]:
        status = main([*argv, "--address", server, "--timeout", "30"])
        return status, *capsys.readouterr()

    return run


def test_the_demo_finds_everything_as_it_should_be(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["demo", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [r for r in report["rows"] if r["problem"]] == []
    assert report["problems"] == []
    assert (status, report["ok"]) == (0, True)
    kinds = {row["kind"] for row in report["rows"]}
    assert kinds == {"auto", "abstain", "task", "mixture", "base", "chat", "late"}


def test_generate_prints_the_answer_and_says_who_answered(command) -> None:
    example = EXAMPLES["uppercase"]
    status, out, err = command("generate", example.prompt)
    assert (status, out) == (0, example.answer + "\n")
    assert "uppercase (router)" in err


def test_a_stream_prints_what_the_whole_answer_is(command) -> None:
    for flags in ((), ("--task", "roman"), ("--adapter", "roman=1"), ("--chat",)):
        example = EXAMPLES["roman"]
        whole = command("generate", example.prompt, *flags)
        stream = command("generate", example.prompt, "--stream", *flags)
        assert whole[:2] == stream[:2] == (0, example.answer + "\n")


def test_json_is_for_programs(command) -> None:
    example = EXAMPLES["uppercase"]
    _, out, _ = command("generate", example.prompt, "--json", "--seed", "7")
    answer = json.loads(out)
    assert answer["text"] == example.answer
    assert answer["seed"] == 7
    assert answer["decision"]["mixture"][0]["adapter"] == "uppercase"
    _, out, _ = command("generate", example.prompt, "--json", "--stream")
    lines = [json.loads(line) for line in out.splitlines()]
    assert "".join(line.get("text", "") for line in lines) == example.answer
    assert lines[-1]["finish"] == "stop"


def test_route_shows_the_candidates(command) -> None:
    status, out, _ = command("route", EXAMPLES["uppercase"].prompt)
    assert status == 0
    assert out.splitlines()[0] == "uppercase (router)"
    assert "probability" in out


def test_an_adapter_lives_its_whole_life(command) -> None:
    before = command("adapters", "list")[1]
    assert "drop-first" not in before
    assert "uppercase" in before
    assert command("adapters", "register", "drop-first", "adapters/drop-first")[0] == 0
    assert "drop-first" in command("adapters", "list")[1]
    assert "pinned" in command("adapters", "pin", "drop-first")[1]
    assert "pinned" not in command("adapters", "unpin", "drop-first")[1]
    shown = json.loads(command("adapters", "show", "drop-first", "--json")[1])
    assert shown["card"]["tasks"] == ["drop-first"]
    assert shown["routable"] is True
    assert command("adapters", "unregister", "drop-first")[0] == 0
    assert command("adapters", "list")[1] == before


def test_an_upload_with_a_card_of_its_own(command, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("'abc' inside chevrons\n\nchevrons around 'abc'\n")
    directory = str(bundle_path() / "adapters" / "drop-first")
    status, _, err = command(
        *("adapters", "upload", "mine", directory),
        *("--task", "wrap", "--prompts", str(prompts), "--description", "wraps"),
    )
    assert (status, err) == (0, "")
    card = json.loads(command("adapters", "show", "mine", "--json")[1])["card"]
    assert (card["tasks"], len(card["prompts"]), card["description"]) == (["wrap"], 2, "wraps")
    assert command("adapters", "unregister", "mine")[0] == 0


def test_info_describes_the_server(command) -> None:
    status, out, _ = command("info")
    assert status == 0
    assert "base.quantization" in out
    assert json.loads(command("info", "--json")[1])["base"]["name"] == "demo"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("generate", "x", "--adapter", "uppercas"), "uppercase"),
        (("generate", "x", "--task", "romn"), "roman"),
        (("generate", "x", "--max-tokens", "0"), "max_tokens"),
        (("adapters", "show", "nobody"), "nobody"),
        (("adapters", "register", "x", "../x"), "path"),
        (("adapters", "register", "NOT A NAME", "adapters/drop-first"), "name"),
    ],
)
def test_a_refusal_of_the_server_is_one_line_with_status_one(
    command, argv: tuple[str, ...], message: str
) -> None:
    status, out, err = command(*argv)
    assert status == 1
    assert out == ""
    assert err.startswith("mora-serve: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_server_that_does_not_start_says_why() -> None:
    with (
        ServerProcess({"engine.max_batch": 0}) as process,
        Client(process.address) as client,
        pytest.raises(Unavailable, match=r"engine\.max_batch: 0 is out of range"),
    ):
        process.wait_until_ready(client)
