"""What deploy/'s documents tell people to type is taken, and the files that they name are there."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest

from benchmarks.monitoring import DEPLOY
from benchmarks.report import ROOT
from mora_serve.cli import build_parser
from mora_serve.config import keys

README = (DEPLOY / "README.md").read_text()
RUNBOOK = (DEPLOY / "RUNBOOK.md").read_text()
BLOCKS = [line.strip() for line in README.splitlines() if line.startswith("    ")]
COMMANDS = sorted(
    {line.partition(" > ")[0] for line in BLOCKS if line.startswith("mora-serve ")}
    | {line.partition(" mora ")[2] for line in BLOCKS if line.startswith("docker exec mora ")}
    | set(re.findall(r"`(mora-serve [a-z][^`]+)`", README + RUNBOOK))
)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_one_that_the_command_line_takes(command: str):
    words = shlex.split(command)[1:]
    parser, named = build_parser(), words[0]
    if words == ["adapters", "update"]:  # named without its arguments
        words += ["NAME"]
    args, extra = parser.parse_known_args([w for w in words if w != "..."])
    assert (args.command, extra) == (named, [])


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"deploy/[\w./-]+\w", " ".join(BLOCKS)))), ids=str
)
def test_each_file_that_a_command_names_is_there(path: str):
    assert (ROOT / path).exists()


def test_the_table_names_what_is_there():
    names = re.findall(r"^\| `([^`]+)`(?:, `([^`]+)`)?", README, re.MULTILINE)
    found = {name.split("/")[0] for pair in names for name in pair if name}
    here = {path.name for path in DEPLOY.iterdir()} - {"README.md", "__pycache__"}
    assert found == here


def test_each_measurement_that_it_names_is_there():
    modules = re.findall(r"python -m (benchmarks\.\w+)", README)
    assert modules
    assert all(importlib.util.find_spec(module) for module in modules)


def test_each_setting_that_the_runbook_names_is_one_of_the_servers():
    sections = "|".join(sorted({key.partition(".")[0] for key in keys()}))
    named = set(re.findall(rf"`((?:{sections})\.\w+)(?: = \w+)?`", RUNBOOK))
    assert len(named) > 10
    assert named <= set(keys())


def test_each_reason_that_the_runbook_names_is_one_that_the_server_gives():
    reasons = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", RUNBOOK))
    source = "".join(p.read_text() for p in (ROOT / "mora_serve").rglob("*.py"))
    assert len(reasons) > 5
    assert all(f'"{reason}"' in source for reason in reasons)
