"""``mora-serve demo``: the whole product at work on the bundled models."""

from __future__ import annotations

import argparse
from typing import Any

from mora_serve.cli.output import print_json

EPILOG = """\
It starts the real server on a free port of this machine with the bundled base, adapters and
router, sends prompts through the gRPC client, registers one more adapter while others stream, and
prints who answered what. The exit status is 1 if anything was not as it should be.
"""


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "demo",
        help="see it at work: server, router and adapters on the bundled models",
        description="Show the server at work on the bundled models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its table."""
    from mora_serve.demo.run import as_json, run_demo, show

    report = run_demo()
    if args.json:
        print_json(as_json(report))
    else:
        print(show(report))
    return 0 if report.ok else 1
