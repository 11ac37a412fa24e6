"""``mora-serve adapters check``: what a server would say of directories, without one."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from mora_serve import config
from mora_serve.cli.output import megabytes, paint, print_json, table, terminal_columns, visible
from mora_serve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mora_serve.adapters.check import Report

EPILOG = """\
examples:
  mora-serve adapters check ./outputs/checkpoint-500
  mora-serve adapters check --base ./llama-3.1-8b ./adapters/*
  mora-serve adapters check --config mora.toml --json ./outputs

Nothing is sent anywhere and nothing is unpickled. Exit status 1 if any directory is refused.
"""


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directories", metavar="DIR", nargs="+", help="a PEFT adapter's directory")
    parser.add_argument(
        "--base", default="", metavar="MODEL", help="the base to compare with: as base.model"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="the server's TOML file: its limits and its base"
    )
    parser.add_argument(
        "--max-rank", type=int, default=0, metavar="N", help="the server's adapters.max_rank"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: argparse.Namespace) -> int:
    """Print what each directory is; 1 if one of them is refused."""
    from mora_serve.adapters.check import check_directory
    from mora_serve.model.files import read_shape

    tree = config.load_config(args.config)
    limits = tree.adapters
    if args.max_rank:
        limits = dataclasses.replace(limits, max_rank=args.max_rank)
    base = args.base or (tree.base.model if args.config else "")
    shape = read_shape(base) if base else None
    fingerprint = functools.cache(lambda: _fingerprint(base)) if base else None
    missing = [d for d in args.directories if not Path(d).is_dir()]
    if missing:
        raise ConfigError(f"DIR: {missing[0]} is no directory; give the adapter's")
    reports = [check_directory(d, limits, shape, fingerprint) for d in args.directories]
    if args.json:
        print_json([r.to_json() for r in reports])
    else:
        show(reports)
    return int(any(r.refusal for r in reports))


def show(reports: Iterable[Report]) -> None:
    """A table, then what is to say of each directory."""
    headers = ("directory", "", "kind", "rank", "scaling", "modules", "type", "size")
    print(table(headers, [_row(r) for r in reports], right=(7,)))
    for report in reports:
        lines = [f"warning: {w}" for w in report.warnings]
        if report.refusal:
            lines.insert(0, f"refused ({report.refusal['reason']}): {report.refusal['message']}")
        if report.named_base:
            lines.append(f"trained on {report.named_base}, by its own words")
        if report.ignored:
            lines.append(f"not read: {', '.join(report.ignored)}")
        print()
        print(paint(report.directory, "bold"))
        for line in lines:
            print(
                textwrap.fill(
                    visible(line),
                    terminal_columns(),
                    initial_indent="  ",
                    subsequent_indent="    ",
                    break_on_hyphens=False,
                )
            )


def _row(report: Report) -> tuple[str, ...]:
    if report.refusal:
        return (report.directory, paint("refused", "red"), *["-"] * 6)
    return (
        report.directory,
        paint("servable", "green"),
        report.kind,
        _span(report.ranks),
        _span(report.scalings),
        _modules(report),
        ", ".join(report.dtypes),
        megabytes(report.size_bytes),
    )


def _span(values: tuple[float, ...]) -> str:
    low, high = f"{values[0]:g}", f"{values[-1]:g}"
    return low if low == high else f"{low} to {high}"


def _modules(report: Report) -> str:
    """Layers by projection, e.g. ``q_proj v_proj x32``; several groups where counts differ."""
    groups: dict[int, list[str]] = {}
    for projection, layers in report.modules.items():
        groups.setdefault(layers, []).append(projection.removesuffix("_proj"))
    return ", ".join(f"{' '.join(names)} x{layers}" for layers, names in groups.items())


def _fingerprint(base: str) -> str:
    """The base's, which takes its weights; empty where they are not there."""
    from mora_serve.model.loading import read_base

    try:
        return read_base(base).fingerprint
    except ConfigError:
        return ""
