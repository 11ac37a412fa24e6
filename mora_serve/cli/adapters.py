"""``mora-serve adapters``: list, show, check, register, upload, update, unregister, pin."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mora_serve.cli import check, connection
from mora_serve.cli import prompt as shared
from mora_serve.cli.output import megabytes, print_json, table
from mora_serve.errors import AlreadyExists, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mora_serve.client import Client
    from mora_serve.client.requests import CardOptions
    from mora_serve.v1.adapters_pb2 import Adapter

EPILOG = """\
examples:
  mora-serve adapters list
  mora-serve adapters check ./out/summarise-v1
  mora-serve adapters register summarise summarise-v1 --task summarise --prompts examples.txt
  mora-serve adapters upload summarise ./out/summarise-v1 --replace
  mora-serve adapters update summarise --task summarise --task shorten --prompts examples.txt
  mora-serve adapters pin summarise
  mora-serve adapters unregister summarise

An adapter is a PEFT directory: adapter_config.json and safetensors. With example prompts (16 are
plenty) the router can pick it; without, it is reached by its name or its tasks. Registering the
same content again makes no new version; with --replace it takes over the card that is given.
"""


def add_to(commands: Any) -> None:
    """Add the command and its own subcommands to the command line."""
    parser = commands.add_parser(
        "adapters",
        help="list, check, register, pin and remove adapters",
        description="List, register, pin and remove the adapters of a server; check directories.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=lambda args: _help(parser), parser=parser)
    actions = parser.add_subparsers(metavar="ACTION", title="actions")

    def action(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = actions.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        sub.set_defaults(run=run, parser=sub)
        return sub

    connection.add_to(action("list", run_list, "list the adapters"))
    check.add_to(action("check", check.run, "say what would be served of directories, offline"))
    named = {
        "show": action("show", run_show, "show one adapter"),
        "register": action("register", run_register, "register a directory of the server"),
        "upload": action("upload", run_upload, "register a directory of this machine"),
        "update": action("update", run_update, "replace an adapter's routing card"),
        "unregister": action("unregister", run_unregister, "remove an adapter"),
        "pin": action("pin", run_pin, "keep an adapter on the device"),
        "unpin": action("unpin", run_unpin, "let an adapter leave the device"),
    }
    for name, sub in named.items():
        sub.add_argument("name", metavar="NAME", help="the adapter's name")
        if name in ("register", "upload"):
            under = "under the server's adapters.root" if name == "register" else "on this machine"
            sub.add_argument("directory", metavar="DIR", help=f"the PEFT directory, {under}")
            if name == "register":
                sub.add_argument(
                    "--sha256",
                    default="",
                    metavar="HEX",
                    help="SHA-256 of the configuration, the weights and the card, in this order",
                )
            _add_card(sub, "when given, it takes the place of the card in the directory")
            sub.add_argument(
                "--replace",
                action="store_true",
                help="if the name is in use, make a new version, or give the same content the card",
            )
        elif name == "update":
            _add_card(sub, "the whole new card: what is not given becomes empty")
        connection.add_to(sub)


def _add_card(parser: argparse.ArgumentParser, text: str) -> None:
    card = parser.add_argument_group("routing card", text)
    card.add_argument(
        "--task", action="append", default=[], help="a task that it does, for hints (repeat)"
    )
    card.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="an example prompt (repeat)"
    )
    card.add_argument("--prompts", metavar="FILE", help="a file of example prompts, one a line")
    card.add_argument("--description", default="", metavar="TEXT", help="what it does")
    card.add_argument(
        "--group", default="", help="the router runs at most one adapter of a group at a time"
    )


def run_list(args: argparse.Namespace) -> int:
    """Print all adapters of the tenant."""
    with connection.connect(args) as client:
        adapters = client.list_adapters()
    if args.json:
        print_json([shared.plain(a) for a in adapters])
    elif not adapters:
        shared.note("no adapters; 'mora-serve adapters register --help' says how to add one")
    else:
        print(_table(adapters))
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print one adapter."""
    with connection.connect(args) as client:
        return _show(client.get_adapter(args.name), args)


def run_register(args: argparse.Namespace) -> int:
    """Register a directory that the server can read."""
    card = _card(args)
    with connection.connect(args) as client:
        adapter = client.register_adapter(
            args.name, args.directory, replace=args.replace, sha256=args.sha256, **card
        )
        return _show(_carded(client, adapter, card, args), args)


def run_upload(args: argparse.Namespace) -> int:
    """Register a directory of this machine."""
    directory = Path(args.directory)
    if not directory.is_dir():
        raise ConfigError(
            f"DIR: {args.directory} is no directory; give a PEFT adapter's, which holds its "
            "adapter_config.json"
        )
    card = _card(args)
    with connection.connect(args) as client:
        adapter = client.upload_adapter(args.name, directory, replace=args.replace, **card)
        return _show(_carded(client, adapter, card, args), args)


def run_update(args: argparse.Namespace) -> int:
    """Replace an adapter's routing card."""
    card = _card(args)
    if not any(card.values()):
        raise ConfigError("card: nothing of it is given; give it whole, e.g. --task and --prompts")
    with connection.connect(args) as client:
        return _show(client.update_adapter(args.name, **card), args)


def run_unregister(args: argparse.Namespace) -> int:
    """Remove an adapter."""
    with connection.connect(args) as client:
        client.unregister_adapter(args.name)
    if args.json:
        print_json({"unregistered": args.name})
    else:
        print(f"{args.name} is unregistered; requests in flight finish with it")
    return 0


def run_pin(args: argparse.Namespace) -> int:
    """Keep an adapter on the device."""
    with connection.connect(args) as client:
        return _show(client.pin_adapter(args.name, True), args)


def run_unpin(args: argparse.Namespace) -> int:
    """Let an adapter leave the device."""
    with connection.connect(args) as client:
        return _show(client.pin_adapter(args.name, False), args)


def _card(args: argparse.Namespace) -> CardOptions:
    prompts = list(args.prompt)
    if args.prompts:
        try:
            lines = Path(args.prompts).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"--prompts: {args.prompts} cannot be read as text: {e}") from e
        prompts += [line for line in lines if line.strip()]
    return {
        "tasks": args.task,
        "prompts": prompts,
        "description": args.description,
        "group": args.group,
    }


def _carded(
    client: Client, adapter: Adapter, card: CardOptions, args: argparse.Namespace
) -> Adapter:
    """The registered adapter with the card that was given: old content keeps its own until told.

    Raises AlreadyExists where the card is another one and --replace was not given.
    """
    if not any(card.values()):
        return adapter
    if all(getattr(adapter.card, key) == value for key, value in card.items()):
        return adapter
    if args.replace:
        return client.update_adapter(args.name, **card)
    raise AlreadyExists(
        f"card: {args.name!r} has this content already, with another card, and nothing has "
        "changed; change the card by 'mora-serve adapters update', or repeat with --replace",
        field="card",
    )


def _show(adapter: Adapter, args: argparse.Namespace) -> int:
    if args.json:
        print_json(shared.plain(adapter))
    else:
        print(_table([adapter]))
        if adapter.card.description:
            print(adapter.card.description)
    return 0


def _table(adapters: Iterable[Adapter]) -> str:
    rows = [
        (
            a.name,
            str(a.version),
            ", ".join(a.card.tasks) or "-",
            f"{'DoRA' if a.dora else 'rsLoRA' if a.rslora else 'LoRA'} r{a.rank}",
            megabytes(a.size_bytes),
            "yes" if a.routable else "no",
            "pinned" if a.pinned else "resident" if a.resident else "on disk",
            "yes" if a.verified else "shapes fit",
            a.digest[:12],
        )
        for a in adapters
    ]
    headers = ("name", "version", "tasks", "kind", "size", "routable", "where", "base", "digest")
    return table(headers, rows, right=(1, 4))


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 2
