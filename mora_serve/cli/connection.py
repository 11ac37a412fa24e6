"""What every command that talks to a server shares: where it is, who asks, how it is protected.

A key comes from a file or from the environment, never from the command line, which other users
of the machine can see.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mora_serve.config import ServerConfig
from mora_serve.core import API_KEY
from mora_serve.errors import ConfigError

if TYPE_CHECKING:
    from mora_serve.client import Client


def add_to(parser: argparse.ArgumentParser, seconds: float = 120.0) -> None:
    """Add the flags that say which server is meant, and in which form to answer."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--address",
        default=f"{ServerConfig.host}:{ServerConfig.port}",
        metavar="HOST:PORT",
        help="the server (default: %(default)s)",
    )
    group.add_argument("--tenant", default="", help="whose adapters are meant (default: default)")
    group.add_argument(
        "--timeout",
        type=_seconds,
        default=seconds,
        metavar="SECONDS",
        help="(default: %(default)g)",
    )
    group.add_argument("--json", action="store_true", help="print JSON for programs")
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"file that holds the API key (default: the key in {API_KEY}, if set)",
    )
    group.add_argument("--tls", action="store_true", help="speak TLS; what follows implies it")
    group.add_argument(
        "--tls-ca", metavar="FILE", help="CA of the server's certificate (default: public ones)"
    )
    group.add_argument("--tls-cert", metavar="FILE", help="your certificate, if one is asked for")
    group.add_argument("--tls-key", metavar="FILE", help="its private key")
    group.add_argument(
        "--tls-name",
        metavar="NAME",
        help="whom the server's certificate names, if not the address",
    )
    group.add_argument(
        "--plaintext",
        action="store_true",
        help="send the key without TLS to other machines too; only where the network is protected",
    )


def connect(args: argparse.Namespace) -> Client:
    """A client of the server that the flags name. Raises ConfigError for flags that cannot be."""
    from mora_serve.client import Client, Tls

    files = {name: getattr(args, f"tls_{name}") for name in ("ca", "cert", "key")}
    name = args.tls_name or ""
    tls: Tls | bool = Tls(**files, name=name) if name or any(files.values()) else args.tls
    if tls and args.plaintext:
        raise ConfigError("--plaintext: it is for connections without TLS; leave one of them out")
    return Client(
        args.address,
        tenant=args.tenant,
        timeout=args.timeout,
        api_key=_key(args.api_key_file),
        tls=tls,
        allow_plaintext=args.plaintext,
    )


def _key(file: str | None) -> str | None:
    """The key of the file, or of the environment; None where there is neither."""
    if file is None:
        return os.environ.get(API_KEY) or None
    try:
        key = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is no ASCII text"
        raise ConfigError(
            f"--api-key-file: it cannot be read ({reason}); give a file with nothing but the key"
        ) from None
    if not key:
        raise ConfigError("--api-key-file: it is empty; give a file with nothing but the key")
    return key


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
