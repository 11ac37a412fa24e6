"""``mora-serve key``: make API keys."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mora_serve.access.file import read_rules
from mora_serve.access.keys import new_secret, sha256_of
from mora_serve.access.roles import Role
from mora_serve.adapters.untrusted import check_name
from mora_serve.errors import AlreadyExists, ConfigError, InvalidArgument

EPILOG = """\
examples:
  mora-serve key new --id acme-web --tenant acme --role generate --file access.toml
  mora-serve key new --id ops --tenant shared --role register --role admin --days 90

The key is printed once, on standard output, and kept nowhere: the file has its SHA-256. A server
that uses the file (--access.file) takes it in within a second. To withdraw a key, delete its entry.
"""


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "key", help="make API keys", description="Make API keys.", allow_abbrev=False
    )
    subcommands = parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    new = subcommands.add_parser(
        "new",
        help="make a key",
        description="Make a key, and its entry for an access file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    new.add_argument("--id", required=True, help="what logs call the key")
    new.add_argument("--tenant", required=True, help="whose adapters it is for")
    new.add_argument(
        "--role",
        required=True,
        action="append",
        choices=[role.value for role in Role],
        help="what it may do; may be given several times",
    )
    new.add_argument("--days", type=int, default=0, help="how long it is valid (for ever)")
    new.add_argument(
        "--file", type=Path, help="access file to append the entry to, made if it is not there"
    )
    new.set_defaults(run=run, parser=new)


def run(args: argparse.Namespace) -> int:
    """Print a new key; write or print its entry."""
    if args.days < 0:
        raise InvalidArgument(f"days: {args.days} is negative; leave it out for no end")
    secret = new_secret()
    text = entry(args.id, args.tenant, args.role, sha256_of(secret), args.days)
    if args.file is None:
        print(f"Append to the access file:\n\n{text}", file=sys.stderr)
    else:
        append(args.file, args.id, text)
        print(f"{args.file}: key {args.id} is in it; the key itself:", file=sys.stderr)
    print(secret)
    return 0


def entry(key_id: str, tenant: str, roles: list[str], sha256: str, days: int = 0) -> str:
    """A key's table in TOML. Raises InvalidArgument for a bad id or tenant."""
    lines = [
        "[[keys]]",
        f'id = "{check_name(key_id, "id")}"',
        f'sha256 = "{sha256}"',
        f'tenant = "{check_name(tenant, "tenant")}"',
        "roles = [{}]".format(", ".join(f'"{role}"' for role in dict.fromkeys(roles))),
    ]
    if days:
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        lines.append(f"expires = {end.strftime('%Y-%m-%dT%H:%M:%SZ')}")
    return "\n".join(lines) + "\n"


def append(path: Path, key_id: str, text: str) -> None:
    """Append an entry, in one step for whoever reads the file, after others who append.

    A link stays one, and so do the file's owner and its mode. Raises AlreadyExists for an id that
    is in use, InvalidArgument for a file that cannot be read or written or takes no entry, and
    ConfigError for one that is no access file.
    """
    try:
        path = Path(os.path.realpath(path))
        with _alone(path):
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            if before and any(key.id == key_id for key in read_rules(path).keys):
                raise AlreadyExists(
                    f"id: the file has a key {key_id!r}; choose another id, or delete its entry"
                )
            separator = "\n" if before.strip() else ""
            _replace(path, key_id, before.rstrip("\n") + separator * 2 + text)
    except OSError as e:
        raise InvalidArgument(
            f"file: it cannot be read and written ({e.strerror}); give another"
        ) from None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """The time in which nobody else appends to the file: it is replaced, its directory stays."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _replace(path: Path, key_id: str, content: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            status = path.stat()
            if (status.st_uid, status.st_gid) != (os.getuid(), os.getgid()):
                for owner in (-1, status.st_uid):  # its group can be given by whoever is in it
                    with contextlib.suppress(PermissionError):
                        os.chown(new, owner, status.st_gid)
            os.chmod(new, status.st_mode & 0o777)
        _check(new, key_id)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _check(new: Path, key_id: str) -> None:
    """Raises InvalidArgument where what was good before is not with the entry."""
    try:
        found = any(key.id == key_id for key in read_rules(new).keys)
    except ConfigError as e:
        reason = e.message.removeprefix("access.file: ")
    else:
        if found:
            return
        reason = "the entry is not found in it"
    raise InvalidArgument(
        f"file: an entry cannot be appended to it ({reason}); write its keys as [[keys]] tables, "
        "not as keys = [...], and after everything else"
    )
