"""``mora-serve feedback``: the prompts of task hints, exported as training data."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mora_serve.cli import connection
from mora_serve.cli import prompt as shared
from mora_serve.cli.output import print_json
from mora_serve.errors import ConfigError

if TYPE_CHECKING:
    from mora_serve.v1.router_pb2 import FeedbackRow

EPILOG = """\
examples:
  mora-serve feedback export labelled.jsonl
  mora-serve feedback export week.jsonl --since 2026-11-24
  mora-serve feedback export more.jsonl --cursor 19ab5c9d2e0.3f1

A row is {"prompt": ..., "tasks": [...], "adapters": [...]}: a prompt, the tasks that its caller
named and the adapters that answered; python -m router_training reads such files. Where a task has
several adapters, the server chose among them, and the row says no adapters. The server keeps
prompts only with router.feedback = true.
"""


def add_to(commands: Any) -> None:
    """Add the command and its own subcommand to the command line."""
    parser = commands.add_parser(
        "feedback",
        help="export labelled prompts as training data",
        description="Export the prompts of requests that named their tasks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=lambda args: _help(parser), parser=parser)
    actions = parser.add_subparsers(metavar="ACTION", title="actions")
    export = actions.add_parser(
        "export",
        help="write the rows to a file, oldest first",
        description="Write the tenant's labelled prompts to a file, oldest first.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    export.add_argument(
        "file", metavar="FILE.jsonl", help="replaced when all rows are there; - is standard output"
    )
    export.add_argument(
        "--cursor", default="", help="only what follows; an earlier export has told it"
    )
    export.add_argument(
        "--since",
        type=_time,
        default=None,
        metavar="TIME",
        help="only from this time on, as in 2026-11-24 or 2026-11-24T15:00+01:00 (UTC unless said)",
    )
    connection.add_to(export)
    export.set_defaults(run=run_export, parser=export)


def run_export(args: argparse.Namespace) -> int:
    """Write the rows; tell how many, and where to go on."""
    count = agreed = 0
    cursor = args.cursor
    with connection.connect(args) as client, _written(args.file) as file:
        for part in client.export_feedback(args.cursor, since=args.since):
            for row in part.rows:
                file.write(_line(row))
                count += 1
                same = sorted(row.routed_adapters) == sorted(row.adapters)
                agreed += bool(row.adapters) and same
            cursor = part.cursor
    if args.json and args.file != "-":
        print_json({"file": args.file, "rows": count, "agreed": agreed, "cursor": cursor})
    else:
        shared.note(
            f"{count} rows; for {agreed} of them the router would have picked what answered; "
            f"for what comes later: --cursor {cursor}"
        )
    return 0


def _line(row: FeedbackRow) -> str:
    values = {"prompt": row.prompt, "tasks": list(row.tasks)}
    if row.adapters:
        values["adapters"] = list(row.adapters)
    return json.dumps(values, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _written(name: str) -> Iterator[IO[str]]:
    """The file to write to; it takes its name when all went well.

    Its owner alone can read it, as with what the server keeps. Raises ConfigError where it cannot
    be written.
    """
    if name == "-":
        yield sys.stdout
        return
    path = Path(name)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        if path.exists() and not path.is_file():  # a pipe or a device keeps its place
            with path.open("w", encoding="utf-8") as file:
                yield file
            return
        with open(temporary, "x", encoding="utf-8", opener=_private) as file:
            yield file
        os.replace(temporary, path)
    except OSError as e:
        raise ConfigError(f"FILE: {name} cannot be written: {e.strerror}") from e
    finally:
        temporary.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, e.g. 2026-11-24T15:00") from None


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 2
