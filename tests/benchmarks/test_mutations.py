"""Mutants for fuzzers: reproducible, different, and of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mora_serve.adapters
from benchmarks import fuzz_intake, tiny
from benchmarks.coverage import Coverage
from benchmarks.mutations import Mutator, parts, safetensors
from mora_serve.adapters.peft_config import parse_config
from mora_serve.adapters.untrusted import load_json
from mora_serve.errors import Internal, MoraError

CONFIG = tiny.config(rank_pattern={"q_proj": 2})


def test_a_seed_gives_the_same_mutants_again() -> None:
    def made(seed: int) -> list[bytes]:
        mutator = Mutator(seed)
        value = json.loads(CONFIG)
        return [mutator.data(CONFIG) + mutator.json(mutator.value(value)) for _ in range(50)]

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_most_mutants_differ_from_what_they_are_made_of() -> None:
    mutator, value = Mutator(0), json.loads(CONFIG)
    assert sum(mutator.value(value, value) != value for _ in range(300)) > 250
    assert sum(mutator.data(CONFIG, CONFIG) != CONFIG for _ in range(300)) > 250
    assert value == json.loads(CONFIG)


def test_a_container_is_taken_apart_and_put_together() -> None:
    file = tiny.weights()
    header, data = parts(file)
    assert safetensors(json.dumps(header).encode(), data) == file
    assert safetensors(b"{}", b"", -1)[:8] == b"\xff" * 8


def test_coverage_counts_each_line_once_and_only_of_its_package() -> None:
    coverage = Coverage(Path(mora_serve.adapters.__path__[0]))
    with coverage:
        parse_config(CONFIG)
    first = coverage.reached
    assert 0 < first <= coverage.known
    with coverage:
        parse_config(CONFIG)
        json.dumps({"a": [1]}, indent=1)
    assert coverage.reached == first
    with coverage, pytest.raises(MoraError):
        load_json(b"[]", "x", max_bytes=10)
    assert coverage.reached > first


def test_the_fuzzer_accepts_what_is_valid_and_refuses_with_types() -> None:
    result = fuzz_intake.fuzz(600, 60.0, seed=1)
    assert result["right"], result["what"]
    assert result["cases"] == 600
    assert result["lines"] > result["lines_by_valid_adapters"]
    assert len(result["outcomes"]) > 5


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ValueError("x"), "ValueError"),
        (Internal("a: b; see /srv/state/log", field="a"), "leaks"),
        (Internal("a: at 0x7f2212ab; c", field="a"), "leaks"),
        (Internal("nothing to do", field="a"), "no remedy"),
    ],
)
def test_the_fuzzer_sees_what_is_wrong(
    error: Exception, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can fail: an error without a type, or one that tells of the server's insides."""

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(fuzz_intake, "read_upload", broken)
    case = fuzz_intake.seeds()[0]
    assert what in fuzz_intake.Intake(tmp_path).take(case, on_disk=False)
