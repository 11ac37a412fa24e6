"""``mora-serve serve``: one flag for every key of the configuration."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import typing
from dataclasses import fields
from typing import Any

from mora_serve import config
from mora_serve.errors import ConfigError

EPILOG = """\
examples:
  mora-serve serve                                          the bundled models
  mora-serve serve --base.model Qwen/Qwen2.5-7B-Instruct    a model of the hub
  mora-serve serve --base.model ./llama --adapters.root ./adapters --server.state ./state
  mora-serve serve --http-address 127.0.0.1:8000            OpenAI's API besides
  mora-serve serve --config mora.toml --server.port 0       a file; a free port

A flag overrides the environment (MORA_SERVER_PORT=...), which overrides the file ([server] with
port = ...). The server listens on this machine only, unless --server.host says otherwise.
Ctrl-C drains: running requests finish, new ones are refused.
Exit status 3: the engine failed, or a step hung (engine.step_seconds); start the server again.
"""


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "serve",
        usage="mora-serve serve [-h] [--config FILE] [--log-level LEVEL] [--SECTION.KEY VALUE ...]",
        help="run the server",
        description="Load the base model and serve it over gRPC, and over HTTP if asked.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with one table a section")
    parser.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning", "error"), help="(info)"
    )
    parser.add_argument(
        "--http-address",
        metavar="HOST:PORT",
        help="serve the OpenAI-compatible HTTP API there: --server.http_host and .http_port",
    )
    groups = {
        section.name: parser.add_argument_group(
            section.name, inspect.getdoc(typing.cast("type", section.default_factory))
        )
        for section in fields(config.Config)
    }
    for key, (hint, default, text) in config.keys().items():
        groups[key.partition(".")[0]].add_argument(
            f"--{key}",
            dest=f"flag:{key}",
            metavar=_metavar(hint),
            default=None,
            help=f"{text} (default: {_shown(default)})".replace("%", "%%"),
        )
    parser.set_defaults(run=run, parser=parser)


def flags(args: argparse.Namespace) -> dict[str, str]:
    """The configuration flags that were given, as ``section.key`` -> text."""
    given = {
        name.removeprefix("flag:"): value
        for name, value in vars(args).items()
        if name.startswith("flag:") and value is not None
    }
    if args.http_address is None:
        return given
    host, colon, port = args.http_address.rpartition(":")
    if not colon:
        raise ConfigError(
            f"flag --http-address: {args.http_address!r} has no port; give HOST:PORT, such as "
            "127.0.0.1:8000",
            field="server.http_port",
        )
    address = {"server.http_host": host.strip("[]"), "server.http_port": port}
    return {key: value for key, value in address.items() if value} | given


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted or terminated."""
    # What strangers get wrong on a connection would fill the log, in lines that are not its own.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from mora_serve.server import logs

    tree = config.load_config(args.config, flags=flags(args))
    logs.configure(args.log_level, tree.server.log_format)
    # It recommends a package for a kernel that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from mora_serve.server.app import serve

    return serve(tree)


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(typing.get_args(hint)) + "}"
    return {bool: "true|false", int: "N", float: "X"}.get(hint, "TEXT")


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return "empty" if default == "" else str(default)
