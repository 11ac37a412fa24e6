"""A live server as the images run it: another user, nothing to write to but the volumes' places.

There is no container runtime here; the kernel's namespaces make the same surroundings: user 10001,
of which the system has no entry, no capabilities, a root that is read only, and the volumes' places
empty. Where they may not be made, the server runs without, and the tests of them are skipped.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import monitoring
from benchmarks.report import ROOT
from mora_serve.cli import main
from mora_serve.client import Client
from mora_serve.core import Source
from mora_serve.demo.bundle import bundle_path
from mora_serve.demo.process import free_port
from tests.deploy.test_images import DOCKERFILE, USER
from tests.deploy.test_prometheus import QUERIES, promtool

REPLACED = ("/tmp", "/var/lib", "/var/cache")  # noqa: S108 - places that are made anew
VOLUMES = ("/var/lib/mora-serve", "/var/cache/mora-serve")
_USER, _GROUP = USER.split(":")
CONTAINED = ["unshare", f"--map-user={_USER}", f"--map-group={_GROUP}", "--mount", "--keep-caps"]
# The places' parents are replaced, since nothing can be made in a root that is read only.
SURROUNDINGS = """
mount -o remount,bind,ro /
for place in /tmp /var/lib /var/cache; do mount -t tmpfs tmpfs $place; done
mkdir -p /var/lib/mora-serve/adapters /var/lib/mora-serve/state /var/cache/mora-serve
mount -o remount,ro /var/lib
mount -t tmpfs tmpfs /var/lib/mora-serve
mkdir /var/lib/mora-serve/adapters /var/lib/mora-serve/state
exec setpriv --no-new-privs --inh-caps=-all --ambient-caps=-all "$@"
"""


@dataclass(frozen=True)
class Live:
    process: subprocess.Popen[bytes]
    client: Client
    metrics_port: int
    contained: bool

    def status(self, key: str) -> str:
        """A line of what the kernel says of the process."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return dict(re.findall(r"^(\w+):\s+(.*)$", text, re.MULTILINE))[key]


def can_contain() -> bool:
    if not all(map(shutil.which, ("unshare", "setpriv"))):
        return False
    if any(Path(p).is_relative_to(place) for p in (ROOT, sys.prefix) for place in REPLACED):
        return False  # what runs would not be there
    probe = [*CONTAINED, "bash", "-ec", SURROUNDINGS, "-", "true"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def image_environment() -> dict[str, str]:
    """ENV of the stage that both images are made of."""
    stage = re.search(r" AS runtime\n(.+?)\nFROM ", DOCKERFILE, re.DOTALL)
    assert stage is not None
    env = re.search(r"^ENV (.+?[^\\])\n", stage[1], re.MULTILINE | re.DOTALL)
    assert env is not None
    settings = dict(word.split("=", 1) for word in shlex.split(env[1].replace("\\\n", " ")))
    return {k: v for k, v in settings.items() if k != "PATH"}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    contained = can_contain()
    port, metrics_port = free_port(), free_port()
    config = monitoring.DEPLOY / "docker" / "mora.toml"
    command = [sys.executable, "-m", "mora_serve", "serve", f"--config={config}"]
    command += [f"--server.port={port}", f"--server.metrics_port={metrics_port}"]
    command += [f"--server.http_port={free_port()}"]
    if contained:
        command = [*CONTAINED, "bash", "-ec", SURROUNDINGS, "-", *command]
    else:
        command.append("--server.state=")
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "TMPDIR", "USER")}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment, **image_environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        with Client(f"127.0.0.1:{port}") as client:
            client.wait_until_ready(120)
            yield Live(process, client, metrics_port, contained)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def page(live: Live) -> str:
    """The metrics after an answer."""
    live.client.generate("hello", adapters={"reverse": 1.0}, max_tokens=4)
    url = f"http://127.0.0.1:{live.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
    return text


@pytest.fixture
def contained(live: Live) -> Live:
    if not live.contained:
        pytest.skip("namespaces cannot be made here")
    return live


def test_it_is_nobody_the_system_knows_and_may_do_nothing(contained: Live):
    assert contained.status("CapEff") == contained.status("CapPrm") == "0" * 16
    assert contained.status("NoNewPrivs") == "1"
    maps = Path(f"/proc/{contained.process.pid}/uid_map").read_text().split()
    assert maps[0] == _USER


def test_all_it_can_write_to_is_the_volumes_and_temporary_files(contained: Live):
    seen = Path(f"/proc/{contained.process.pid}/root")
    for place in ("", "etc", "var/lib", str(ROOT).lstrip("/")):
        with pytest.raises(OSError, match="Read-only file system"):
            (seen / place / "file").touch()
    for place in ("tmp", "var/lib/mora-serve/state", "var/cache/mora-serve"):
        (seen / place / "file").touch()


def test_it_answers_and_the_router_picks(live: Live):
    answer = live.client.generate("reverse 'stone'", max_tokens=16)
    assert answer.decision.source is Source.ROUTER
    assert answer.text.strip() == "enots"


def test_it_keeps_what_is_registered(contained: Live):
    contained.client.upload_adapter("mine", bundle_path() / "adapters" / "reverse")
    assert contained.client.generate("hello", adapters={"mine": 1.0}, max_tokens=4).text
    state = Path(f"/proc/{contained.process.pid}/root/var/lib/mora-serve/state")
    assert any((state / "blobs").iterdir())


def test_the_images_health_check_finds_it_well(live: Live):
    assert main(["health", "--timeout", "5", "--address", live.client.address]) == 0


class TestMetrics:
    def test_each_one_that_rules_and_dashboard_name_is_there(self, page: str):
        typed = dict(re.findall(r"^# TYPE (\S+) (\w+)$", page, re.MULTILINE))
        named = {name for query in QUERIES for name in query.metrics}
        families = {
            name if name in typed else re.sub("_(bucket|sum|count)$", "", name) for name in named
        }
        assert len(named) > 40
        assert families <= set(typed)

    def test_promtool_finds_nothing_wrong_with_the_page(self, page: str):
        assert promtool("check", "metrics", input=page) == ""


def test_it_drains_and_ends_well(live: Live):
    """The last test: after it the server is gone."""
    live.process.terminate()
    assert live.process.wait(60) == 0
