"""Is every call refused without credentials, and with the wrong role?

Every call that the descriptors have is made on a running server with keys: without one, with keys
that are wrong, over or in another form, with a key of each role that may not make it, with another
tenant's name, and, for administrators' calls, on the address that is not theirs. Every one of these
has to end as UNAUTHENTICATED or PERMISSION_DENIED with its reason, before the request is looked
at; a key of a role that may make the call has to get past both.

    python -m benchmarks.refusals [--json]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from benchmarks import report
from benchmarks.keys import OVER, add_key, bearer
from benchmarks.rpcs import Rpc, call, rpcs
from mora_serve.access.keys import new_secret, sha256_of
from mora_serve.access.roles import ADMINISTRATIVE, ALLOWED, Role
from mora_serve.client import Client
from mora_serve.demo.process import ServerProcess, free_port

Metadata = tuple[tuple[str, str], ...]
DENIED = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN = grpc.StatusCode.UNAUTHENTICATED


def main() -> None:
    """Measure, print what went wrong, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    for line in result["wrong"]:
        report.log(line)
    report.log(
        f"{result['rpcs']} calls, tried in {result['tried']} ways: "
        f"{len(result['wrong'])} were not refused as they have to be"
    )
    report.emit({**result, "wrong": len(result["wrong"]), "environment": report.environment()})


def measure(folder: Path) -> dict[str, Any]:
    """Start a server with keys and try every call."""
    file, admin_port = folder / "access.toml", free_port()
    secrets = {role: add_key(file, f"only-{role.value}", "acme", [role]) for role in Role}
    over = add_key(file, "over", "acme", more=OVER)
    flags = {
        "access.file": file,
        "access.audit": folder / "audit",
        "server.admin_port": admin_port,
    }
    with ServerProcess(flags) as server, Client(server.address) as client:
        server.wait_until_ready(client)
        with grpc.insecure_channel(f"127.0.0.1:{admin_port}") as admin:
            return tried(client.channel, admin, secrets, over)


def tried(
    main: grpc.Channel, admin: grpc.Channel, secrets: dict[Role, str], over: str
) -> dict[str, Any]:
    """Every call in every way that has to be refused, and in one that has not."""
    wrong: list[str] = []
    count, found = 0, list(rpcs())
    for rpc in found:
        for how, metadata, code, reasons in ways(rpc, secrets, over):
            for where, on in (("server.port", main), ("server.admin_port", admin)):
                outcome = call(on, rpc, (b"\xff not a message",), metadata)
                count += 1
                if outcome.code is not code or outcome.reason not in reasons or outcome.answers:
                    wrong.append(f"{rpc.method} on {where}, {how}: {outcome.code}, {outcome.text}")
        for role in sorted(ALLOWED[rpc.method], key=lambda role: role.value):
            count += 1
            elsewhere = rpc.method in ADMINISTRATIVE
            if elsewhere:
                outcome = call(main, rpc, metadata=bearer(secrets[role]))
                if (outcome.code, outcome.reason) != (DENIED, "ADMIN_ADDRESS"):
                    wrong.append(f"{rpc.method} on server.port as {role}: {outcome.code}")
            outcome = call(admin if elsewhere else main, rpc, metadata=bearer(secrets[role]))
            if outcome.code in (DENIED, UNKNOWN):
                wrong.append(f"{rpc.method} as {role} was refused: {outcome.text}")
    return {"rpcs": len(found), "tried": count, "wrong": wrong}


def ways(
    rpc: Rpc, secrets: dict[Role, str], over: str
) -> Iterator[tuple[str, Metadata, grpc.StatusCode, tuple[str, ...]]]:
    """What has to be refused: its description, metadata, code and reasons."""
    right = secrets[min(ALLOWED[rpc.method], key=lambda role: role.value)]
    yield "without a key", (), UNKNOWN, ("NO_KEY",)
    for scheme in ("Basic", "Token"):
        yield scheme, (("authorization", f"{scheme} {right}"),), UNKNOWN, ("NO_KEY",)
    yield "in other metadata", (("x-api-key", right),), UNKNOWN, ("NO_KEY",)
    yield "the bare key", (("authorization", right),), UNKNOWN, ("NO_KEY",)
    for how, secret in {
        "a key that never was": new_secret(),
        "a key cut short": right[:-1],
        "a key with more behind it": right + "x",
        "a key in capitals": right.upper(),
        "its digest": sha256_of(right),
        "a key whose time is over": over,
        "a very long key": "x" * 4000,
    }.items():
        yield how, bearer(secret), UNKNOWN, ("BAD_KEY",)
    for role in sorted(set(Role) - ALLOWED[rpc.method], key=lambda role: role.value):
        yield f"as {role.value}", bearer(secrets[role]), DENIED, ("WRONG_ROLE",)
    other = (*bearer(right), ("mora-tenant", "other"))
    yield "for another tenant", other, DENIED, ("WRONG_TENANT",)


if __name__ == "__main__":
    main()
