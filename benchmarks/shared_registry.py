"""One registry in a store that servers share: nothing is lost, and all see the same soon.

Two processes register at the same time, each adapters of its own and some under names that both
want with contents of their own; what was acknowledged has to be there, and each wanted name to be
one's and refused to the other. A registry of a third process polls meanwhile: how long after its
acknowledgement it lists each registration and each removal. Then, with the store in a directory,
two servers of the demo bundle: an adapter registered at one is asked for at the other until it
answers, and after its removal until it is refused.

With ``--s3`` the store is moto's S3 server on loopback. That shows that the requests are right and
that a conditional put decides; moto is one process that does one thing at a time, so it shows
nothing of how a real store behaves in a partition, under throttling, or at its distance.

    python -m benchmarks.shared_registry --json
    python -m benchmarks.shared_registry --json --s3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import report, tiny
from mora_serve.adapters.registry import Registry
from mora_serve.adapters.storage import SharedStorage
from mora_serve.errors import AlreadyExists

WRITERS = 2
WANTED = 20  # names that both writers want
TENANT = "default"
POLL_SECONDS = 1.0  # the servers' default
LIMIT = 120.0  # seconds that anything may take
CACHE_BYTES = 1 << 30


def main() -> None:
    """Register, watch, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--s3", action="store_true", help="moto's server; no servers of ours")
    parser.add_argument("--count", type=int, default=100, help="registrations a writer")
    parser.add_argument("--rounds", type=int, default=5, help="of the two servers; 0 for none")
    parser.add_argument("--write", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write is not None:
        write(args.url, args.write, args.count)
        return
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = s3() if args.s3 else contextlib.nullcontext(f"file://{folder}/store")
        with place as url:
            result = together(url, args.count)
        if not args.s3 and args.rounds:
            from benchmarks.shared_servers import seen

            result["servers"] = seen(Path(folder), args.rounds, POLL_SECONDS)
    report.emit({**result, "environment": report.environment()})


def opened(url: str) -> Registry:
    """A registry of the store, with a cache of its own."""
    storage = SharedStorage(url, None, CACHE_BYTES)
    return Registry(storage, tiny.LIMITS, tiny.SHAPE, snapshot_every=64)


def write(url: str, writer: int, count: int) -> None:
    """Register, saying on stdout what is acknowledged and when; then remove a tenth."""
    with opened(url) as registry:
        print("ready", flush=True)
        sys.stdin.readline()
        own = [f"w{writer}-{i}" for i in range(count - WANTED)]
        wanted = [f"wanted-{i}" for i in range(WANTED)]
        every = max(1, len(own) // WANTED)
        for i, name in enumerate(own):
            registry.register(TENANT, name, tiny.adapter(1000 * writer + i, 2))
            say("made", name)
            if i % every == 0 and wanted:
                name = wanted.pop(0)
                try:
                    registry.register(TENANT, name, tiny.adapter(1000 * writer + 900 + i, 2))
                    say("made", name)
                except AlreadyExists:
                    say("refused", name)
        for name in own[::10]:
            registry.unregister(TENANT, name)
            say("removed", name)


def say(what: str, name: str) -> None:
    """A line for the parent."""
    print(json.dumps([what, name, time.time()]), flush=True)


def together(url: str, count: int) -> dict[str, Any]:
    """Let the writers write, and hold what they say against what another process sees."""
    with opened(url) as registry, contextlib.ExitStack() as stack:
        first_seen: dict[str, float] = {}
        last_seen: dict[str, float] = {}
        children = [stack.enter_context(_writer(url, w, count)) for w in range(WRITERS)]
        for child in children:
            if child.stdout is None or child.stdout.readline() != "ready\n":
                raise RuntimeError("a writer did not start")
        start = time.time()
        for child in children:
            if child.stdin is not None:
                child.stdin.write("go\n")
                child.stdin.flush()

        def look() -> None:
            registry.poll()
            now = time.time()
            for record in registry.list(TENANT):
                first_seen.setdefault(record.name, now)
                last_seen[record.name] = now

        def finished() -> bool:
            look()
            return all(child.poll() is not None for child in children)

        _until(finished)
        seconds = time.time() - start
        said = [
            (writer, *json.loads(line))
            for writer, child in enumerate(children)
            for line in (child.stdout or [])
        ]
        if any(child.returncode for child in children):
            raise RuntimeError("a writer failed")
        time.sleep(POLL_SECONDS)
        look()
        held = {r.name: r.digest for r in registry.list(TENANT)}
        sound = sum(registry.open(digest).digest == digest for digest in held.values())
    made = {name: (writer, at) for writer, what, name, at in said if what == "made"}
    removed = {name: at for _, what, name, at in said if what == "removed"}
    refused = [name for _, what, name, _ in said if what == "refused"]
    lost = [name for name in made if name not in held and name not in removed]
    extra = [name for name in held if name not in made or name in removed]
    wanted = [name for _, what, name, _ in said if what == "made" and name.startswith("wanted")]
    listed = [first_seen[name] - at for name, (_, at) in made.items() if name in first_seen]
    gone = [last_seen[name] - at for name, at in removed.items() if name in last_seen]
    return {
        "registrations": len(made) + len(refused),
        "acknowledged": len(made),
        "lost": len(lost),
        "not_removed": len(extra),
        "given_twice": len(wanted) - len(set(wanted)),
        "refused": len(refused),
        "unsound": len(held) - sound,
        "wrong": len(lost) + len(extra) + len(wanted) - len(set(wanted)) + len(held) - sound,
        "seconds": round(seconds, 2),
        "listed_seconds": round(max(listed), 3),
        "removed_seconds": round(max([0.0, *gone]), 3),
    }


@contextlib.contextmanager
def _writer(url: str, writer: int, count: int) -> Iterator[subprocess.Popen[str]]:
    flags = ["--write", str(writer), "--url", url, "--count", str(count)]
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.shared_registry", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=report.ROOT,
        text=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def _until(done: Callable[[], bool]) -> None:
    """Look every POLL_SECONDS until it is done."""
    end = time.monotonic() + LIMIT
    while not done():
        if time.monotonic() > end:
            raise RuntimeError(f"not done in {LIMIT:g} s")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def s3() -> Iterator[str]:
    """The URL of a bucket on moto's server, which the environment leads to."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("adapters")
        yield "s3://adapters/registry"
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


if __name__ == "__main__":
    main()
