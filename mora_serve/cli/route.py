"""``mora-serve route``: what the router would pick, without generating."""

from __future__ import annotations

import argparse
from typing import Any

from mora_serve.cli import connection
from mora_serve.cli import prompt as shared
from mora_serve.cli.output import paint, print_json, table

EPILOG = """\
examples:
  mora-serve route "reverse 'stone'"
  mora-serve route "..." --candidate reverse --candidate json --max-adapters 1
"""


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "route",
        help="show which adapters would answer a prompt",
        description="Show which adapters would answer a prompt, and what the router says of each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads standard input")
    shared.add_selection(parser)
    connection.add_to(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Print one decision."""
    text = shared.read_prompt(args)
    with connection.connect(args) as client:
        decision = client.route(prompt=text, **shared.selection(args))
    if args.json:
        print_json(shared.decision_json(decision))
        return 0
    print(paint(shared.describe(decision), "bold"))
    if decision.candidates:
        rows = [(c.adapter, f"{c.probability:.3f}", f"{c.score:.2f}") for c in decision.candidates]
        print(table(("candidate", "probability", "score"), rows, right=(1, 2)))
    return 0
