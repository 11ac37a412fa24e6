"""``mora-serve health``: whether a server serves, for whoever supervises it."""

from __future__ import annotations

import argparse
from typing import Any

from mora_serve.cli import connection
from mora_serve.cli.output import print_json

SECONDS = 5.0

EPILOG = """\
It asks for the health of grpc.health.v1, which needs no key, and again until the server serves or
--timeout is over. Exit status 0: it serves; 1: it is loading or draining, or nobody answers.
"""


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "health",
        help="ask whether a server serves",
        description="Ask whether a server serves.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    connection.add_to(parser, seconds=SECONDS)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Return when the server serves. Raises Unavailable when it does not in time."""
    with connection.connect(args) as client:
        client.wait_until_ready(args.timeout)
    if args.json:
        print_json({"status": "SERVING"})
    else:
        print("serving")
    return 0
