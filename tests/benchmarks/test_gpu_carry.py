"""What is taken along to a machine with a card but without a network."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_carry
from benchmarks.report import ROOT


def test_of_bitsandbytes_only_one_version_of_cuda_is_taken(tmp_path: Path) -> None:
    names = ["bitsandbytes/nn.py"]
    names += [f"bitsandbytes/libbitsandbytes_{x}.so" for x in ("cpu", "cuda126", "cuda130", "xpu")]
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as wheel:
        for name in names:
            wheel.writestr(name, name)
    gpu_carry.unpack(tmp_path / "b.whl", tmp_path / "out", "130")
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert found == {names[0], names[1], names[3]}


def test_every_package_has_a_version_that_was_tested() -> None:
    pins = gpu_carry.pinned((ROOT / "constraints.txt").read_text())
    assert set(gpu_carry.PACKAGES) <= set(pins)
    assert pins["grpcio"].startswith("grpcio==")


def test_the_folder_is_found_by_this_process_and_those_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setattr(gpu_carry, "FOLDER", tmp_path / "none")
    gpu_carry.use()
    assert os.environ["PYTHONPATH"] == "before"
    monkeypatch.setattr(gpu_carry, "FOLDER", tmp_path)
    gpu_carry.use()
    assert sys.path[0] == str(tmp_path)
    assert os.environ["PYTHONPATH"] == f"{tmp_path}{os.pathsep}before"
