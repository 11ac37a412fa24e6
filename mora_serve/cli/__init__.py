"""The command line: ``mora-serve serve | demo | generate | adapters | route | feedback | info |
health | key | plan``.

Exit status: 0 when all went well, 1 for an error of the server (or a demo that fell short),
2 for a wrong command line or configuration, 3 when the engine of a server failed or hung, 130 when
interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

from mora_serve import __version__
from mora_serve.cli import (
    adapters,
    demo,
    feedback,
    generate,
    health,
    info,
    key,
    plan,
    route,
    serve,
)
from mora_serve.errors import ConfigError, MoraError

EPILOG = """\
first steps:
  mora-serve demo                                  see it at work, in one command
  mora-serve serve                                 serve the bundled models
  mora-serve generate "reverse 'stone'"    in another terminal: the router picks
  mora-serve adapters list                         what is registered
  mora-serve plan llama-3.1-8b --card 24           what a card would hold

'mora-serve COMMAND --help' tells more about each command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    parser = build_parser()
    args, extra = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    if extra:
        _reject(args.parser, extra)
    try:
        status: int = args.run(args)
    except ConfigError as e:
        return _fail(e.message, 2)
    except MoraError as e:
        return _fail(e.message, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each command sets ``run`` and ``parser``."""
    parser = argparse.ArgumentParser(
        prog="mora-serve",
        description="Serve one 4-bit language model and many LoRA adapters, mixed per request.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mora-serve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in (serve, demo, generate, adapters, route, feedback, info, health, key, plan):
        command.add_to(commands)
    return parser


def _reject(parser: argparse.ArgumentParser, extra: Sequence[str]) -> None:
    known = parser._option_string_actions  # argparse has no public list of its flags
    near = difflib.get_close_matches(extra[0].partition("=")[0], known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    parser.error(f"unknown argument {extra[0]}{hint}")


def _fail(message: str, status: int) -> int:
    print(f"mora-serve: error: {message}", file=sys.stderr)
    return status
