"""``mora-serve info``: what a running server serves."""

from __future__ import annotations

import argparse
from typing import Any

from mora_serve.cli import connection
from mora_serve.cli import prompt as shared
from mora_serve.cli.output import print_json, table


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "info",
        help="describe a running server",
        description="Describe a running server: its base model, limits and versions.",
        allow_abbrev=False,
    )
    connection.add_to(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Print the description."""
    with connection.connect(args) as client:
        described = shared.plain(client.server_info())
    if args.json:
        print_json(described)
        return 0
    rows = []
    for key, value in described.items():
        parts = value if isinstance(value, dict) else {"": value}
        rows += [(f"{key}.{k}".rstrip("."), _text(v)) for k, v in parts.items()]
    print(table(("", ""), rows).strip())
    return 0


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) or "-"
