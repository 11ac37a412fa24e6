"""The README stays true: its commands parse, its settings load, it states no unproved figure."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mora_serve.cli import build_parser
from mora_serve.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK_LINES = [line.strip() for line in README.splitlines() if line.startswith("    ")]
COMMANDS = [line for line in BLOCK_LINES if line.startswith("mora-serve ")]
MAKE = sorted({m for line in BLOCK_LINES for m in re.findall(r"^make (\w+)", line)})


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_one_that_the_command_line_takes(command: str) -> None:
    words = shlex.split(command.partition(" > ")[0], comments=True)[1:]
    args, extra = build_parser().parse_known_args(words)
    assert not extra
    assert args.command == words[0]


@pytest.mark.parametrize("target", MAKE)
def test_each_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_sample_configuration_loads(tmp_path: Path) -> None:
    start = BLOCK_LINES.index("[base]")
    lines = []
    for line in BLOCK_LINES[start:]:
        if not re.match(r"\[\w+\]$|\w+ = ", line):
            break
        lines.append(line)
    assert len(lines) > 4
    file = tmp_path / "mora.toml"
    file.write_text("\n".join(lines))
    assert load_config(file, {}).adapters.root == "./adapters"


def test_no_figure_of_speed_size_or_quality_stands_in_the_readme() -> None:
    """Figures are claims, in benchmarks/claims.toml, where a command proves them."""
    figure = r"\b\d[\d.,]*\s?(?:%|ms|s|seconds|minutes|tokens/s|[kMG]B|x faster)(?!\w)"
    assert re.findall(figure, README) == []
