"""Every command of the README and of docs/ is run, or parsed, or listed here as one that is not.

Those that are run have a server with the bundled models, in a folder that stands for the clone:
what the pages call their reader's own (./adapters/summarise-v1, examples.txt) lies there. Behind
a block may stand one of what it prints, whose lines have to be among what it does print.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mora_serve.cli import build_parser
from mora_serve.cli.serve import flags
from mora_serve.config import keys, load_config
from router_training.__main__ import parse
from tests.docs.pages import PAGES, ROOT, Block, blocks, blocks_of, commands, words
from tests.server.conftest import Running, running

MANIFEST = ROOT / "mora_serve/demo/bundle/bundle.json"
ADAPTERS = MANIFEST.parent / "adapters"
# Beginnings of commands that cannot be run here, and why.
NOT_RUN = {
    "git clone": "the network, and a repository's address",
    "cd mora-serve": "goes with it",
    ". .venv/bin/activate": "the environment is this one",
    "pip install": "a package index; `make claims TAG=ecosystem` installs the wheel",
    "docker ": "a container runtime",
    "serve run": "Ray, for a minute; benchmarks/ray_commands.py runs it",
    "accelerate launch": "several cards",
    "torchrun ": "several processes, for minutes",
    "vllm ": "another server",
    "lorax-launcher ": "another server",
    "curl http://127.0.0.1:8000/v1/load_lora_adapter": "vLLM's own call",
    "curl http://127.0.0.1:8080/generate": "LoRAX's own call",
    "cd proto/examples/node": "npm's packages; benchmarks/node_client.py runs it",
    "npm ci": "npm's packages; benchmarks/node_client.py runs it",
    "node conversation.mjs": "npm's packages; benchmarks/node_client.py runs it",
    ".ci/run": "it runs these tests",
}
SHELL = {"curl", "cat", "cp", "mkdir", "printf", "echo", "export"}
# Those of mora-serve that ask a server, and those that ask nobody.
ASKING = r"(?:generate|route|info|health|adapters (?!check)[a-z]+|feedback export)"
ALONE = r"(?:plan|adapters check|key new)"
QUICK = {"init", "check", "plan"}  # of router_training
LANGUAGES = {"sh", "python", "toml", "text", "yaml"}


@dataclass(frozen=True)
class Place:
    """Where a page's commands run: a folder, and a server that has the addresses of the pages."""

    folder: Path
    serving: Running

    def readdressed(self, text: str) -> str:
        """A block with this server's ports in place of the default ones."""
        server = self.serving.server
        text = text.replace("127.0.0.1:50051", server.address)
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{server.http_port}")
        return text.replace("127.0.0.1:9464", f"127.0.0.1:{server.metrics_port}")

    def shell(self, script: str) -> str:
        """What bash prints of commands that have to go well."""
        script = re.sub(
            rf"\bmora-serve {ASKING}(?!\S)(?!.*--address)",
            rf"\g<0> --address {self.serving.server.address}",
            self.readdressed(script),
        )
        names = f'mora-serve() {{ "{sys.executable}" -m mora_serve "$@"; }}\n'
        names += f'python() {{ "{sys.executable}" "$@"; }}\n'
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", names + script],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return f"{done.stdout}\n{done.stderr}"

    def python(self, block: Block) -> str:
        """What a block of Python prints."""
        printed = io.StringIO()
        code = compile(self.readdressed(block.text), str(block), "exec")
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(printed):
            exec(code, {"__name__": "__main__"})  # noqa: S102 - the pages are the project's own
        return printed.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("adapters")
    shutil.copytree(ADAPTERS / "drop-first", root / "summarise-v1")
    configuration = {
        "server.port": 0,
        "server.http_port": 0,
        "server.metrics_port": 0,
        "adapters.root": str(root),
        "router.feedback": True,
    }
    with running(load_config(environ={}, flags=configuration)) as serving:
        yield serving


@pytest.fixture
def place(server: Running, tmp_path: Path) -> Place:
    """A folder with the reader's own, and a server with the bundled adapters alone."""
    shutil.copytree(ADAPTERS, tmp_path / ADAPTERS.relative_to(ROOT))
    shutil.copytree(ADAPTERS / "drop-first", tmp_path / "outputs/summarise")
    for name in ("examples.txt", "more.txt"):
        (tmp_path / name).write_text("sum this up: a text\nin short: another text\n")
    bundled = {a["name"] for a in json.loads(MANIFEST.read_text())["adapters"] if a["registered"]}
    with server.client() as client:
        for adapter in client.list_adapters():
            if adapter.name not in bundled:
                client.unregister_adapter(adapter.name)
    return Place(tmp_path, server)


def kind(command: str) -> str:
    """What becomes of a command: 'run', 'parsed' or 'listed'; empty where nobody knows."""
    if any(command.startswith(beginning) for beginning in NOT_RUN):
        return "listed"
    if command.startswith("make ") or re.match(r"mora-serve (serve|demo)\b", command):
        return "parsed"
    if re.match(rf"mora-serve ({ASKING}|{ALONE})(?!\S)", command):
        return "run"
    given = words(command)
    if given[:2] == ["python", "-m"]:
        return "run" if given[2] == "router_training" and QUICK & {*given[3:4]} else "parsed"
    return "run" if given[0] in SHELL else ""


SHELL_BLOCKS = blocks_of("sh")
ALL = [(str(block), command) for block in SHELL_BLOCKS for command in commands(block.text)]


@pytest.mark.parametrize(("where", "command"), ALL)
def test_it_is_known_of_each_command_whether_it_is_run(where: str, command: str) -> None:
    assert kind(command), f"{where}: {command} is neither run nor parsed nor listed"


def test_no_reason_is_without_its_command() -> None:
    listed = [c for _, c in ALL if kind(c) == "listed"]
    assert [n for n in NOT_RUN if not any(c.startswith(n) for c in listed)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_page_goes_well_from_top_to_bottom_and_prints_what_it_says(
    page: Path, place: Place
) -> None:
    for block in blocks(page):
        if block.language == "python":
            compare(block, place.python(block))
        if block.language == "sh":
            script = [c for c in commands(block.text) if kind(c) == "run"]
            if script:
                compare(block, place.shell("\n".join(script)))
            else:
                assert not block.output, f"{block}: nothing of it is run, and it shows output"


def compare(block: Block, printed: str) -> None:
    """Each line of the page's output is a line of what was printed, whatever the spaces."""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for line in block.output.splitlines():
        expected = re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*")
        found = any(re.fullmatch(expected, other) for other in lines)
        assert found or line == "...", f"{block}: {line!r} is not among\n{printed}"


PARSED = [c for _, c in ALL if kind(c) == "parsed"]


@pytest.mark.parametrize("command", [c for c in PARSED if c.startswith("mora-serve ")])
def test_a_server_takes_its_flags(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration too, where one is named: that of docs/serving.md."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mora.toml").write_text(SAMPLE.text)
    args = build_parser().parse_args(words(command)[1:])
    if args.command == "serve":
        load_config(args.config, environ={}, flags=flags(args))


@pytest.mark.parametrize("command", [c for c in PARSED if c.startswith("make ")])
def test_each_make_target_exists(command: str) -> None:
    target = words(command)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in PARSED if c.startswith("python ")])
def test_a_module_is_there_and_takes_its_arguments(command: str) -> None:
    _, _, module, *rest = words(command)
    if module == "router_training":
        parse(rest)
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None
    package = spec.submodule_search_locations
    source = Path(spec.origin or "") if package is None else Path(package[0], "__main__.py")
    assert [w for w in rest if w.startswith("-") and f'"{w}"' not in source.read_text()] == []


TOML = blocks_of("toml")
SAMPLE = next(block for block in TOML if block.page == "serving.md")


@pytest.mark.parametrize("block", TOML, ids=str)
def test_each_configuration_loads(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    file.write_text(block.text)
    assert load_config(file, environ={}) != load_config(environ={})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_says_its_language(page: Path) -> None:
    found = blocks(page)
    assert [str(b) for b in found if b.language not in LANGUAGES] == []
    assert page.read_text().count("```") == 2 * len(found)
    indented = re.findall(r"\n\n {4,}\S.*", page.read_text())
    assert [line for line in indented if not any(line.strip() in b.text for b in found)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_key_of_the_configuration_that_is_named_exists(page: Path) -> None:
    sections = {key.partition(".")[0] for key in keys()}
    named = re.findall(r"`(?:--)?([a-z]+\.[a-z_]+)(?: [^`]*)?`", page.read_text())
    files = {"py", "md", "toml", "txt", "yaml", "json", "proto", "jsonl", "html", "safetensors"}
    asked = {n for n in named if n.partition(".")[0] in sections}
    assert {n for n in asked if n.partition(".")[2] not in files} <= set(keys())
