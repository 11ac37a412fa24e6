"""The Node example, run: skipped where there is no node, no npm or no package index."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import node_client

OFFLINE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ENETUNREACH", "ETIMEDOUT")


@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
def test_the_examples_conversation_goes_well(tmp_path: Path) -> None:
    try:
        example = node_client.install(tmp_path)
    except subprocess.CalledProcessError as e:
        if any(sign in e.stderr for sign in OFFLINE):
            pytest.skip("npm reaches no package index")
        raise AssertionError(e.stderr) from e
    result = node_client.converse(example)
    assert result["failures"] == []
    assert result["status"] == 0
    assert result["checks"] >= 35


def test_the_lock_file_pins_every_package_and_names_no_index() -> None:
    lock = json.loads((node_client.EXAMPLE / "package-lock.json").read_text())
    packages = {name: p for name, p in lock["packages"].items() if name}
    assert packages
    for package in packages.values():
        assert package["integrity"].startswith("sha512-")
        assert "resolved" not in package
    wanted = json.loads((node_client.EXAMPLE / "package.json").read_text())["dependencies"]
    for name, version in wanted.items():
        assert packages[f"node_modules/{name}"]["version"] == version
