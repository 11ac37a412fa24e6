"""The .proto files by buf's rules. buf comes from npm; where it cannot be had, these are skipped.

``npm install @bufbuild/buf`` brings the binary; BUF names it, else it is looked for on the PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUF = os.environ.get("BUF") or shutil.which("buf") or ""

pytestmark = pytest.mark.skipif(not BUF, reason="buf is not installed (npm i -g @bufbuild/buf)")


def test_a_change_that_would_break_a_client_is_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "proto", tmp_path / "proto", ignore=shutil.ignore_patterns("examples"))
    file = tmp_path / "proto/mora_serve/v1/server.proto"
    file.write_text(file.read_text().replace("string version = 1;", "string version = 9;"))
    done = subprocess.run(
        [BUF, "breaking", "--against", str(ROOT / "proto")],
        cwd=tmp_path / "proto",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "version" in done.stdout
    assert done.returncode != 0


def buf(*arguments: str) -> str:
    done = subprocess.run(
        [BUF, *arguments], cwd=ROOT / "proto", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_files_keep_bufs_standard_rules_and_have_comments() -> None:
    buf("lint")


def test_the_files_are_formatted() -> None:
    assert buf("format", "--diff") == ""


def test_the_module_builds() -> None:
    buf("build", "-o", "/dev/null")


def test_nothing_that_a_client_relies_on_differs_from_main(tmp_path: Path) -> None:
    """By the rule FILE: names, numbers, types, and in which file a message stands."""
    before = tmp_path / "before"
    git = ["git", "-C", str(ROOT)]
    main = subprocess.run([*git, "rev-parse", "-q", "--verify", "main"], capture_output=True)
    reference = "HEAD" if main.returncode else "main"  # a clone may have no branch of this name
    archive = subprocess.run(
        [*git, "archive", reference, "proto"], capture_output=True, check=True
    ).stdout
    before.mkdir()
    subprocess.run(["tar", "x", "-C", str(before)], input=archive, check=True)
    buf("breaking", "--against", str(before / "proto"))
