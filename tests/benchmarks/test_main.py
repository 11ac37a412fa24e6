"""``python -m benchmarks``: parts are run, kept, drawn, and shown in the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import tables
from benchmarks.turns import OURS

ENVIRONMENT = {
    "date": "2026-11-25T04:00:00+00:00",
    "machine": {"cores": 2, "processor": "AMD EPYC"},
    "versions": dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1.2"),
    "load": [0.1, 0.2, 0.3],
}
LATENCIES = {
    "first_token_ms": {"p50": 10.0, "p99": 20.0},
    "inter_token_ms": {"p50": 3.0, "p99": 4.0},
}


def row(rate: float, system: str = OURS, **described: Any) -> dict[str, Any]:
    rates = {"tokens_per_second": rate, "least": rate - 1, "most": rate + 1}
    counts = {"repetitions": 5, "new_tokens": 256, "ours_until_there": 400.0}
    return {**described, "system": system, **rates, **counts, **LATENCIES}


THROUGHPUT = {
    "rows": [
        row(400.0, adapters="none", requests=16),
        row(200.0, "transformers generate", adapters="none", requests=16),
        row(100.0, "transformers continuous batching", adapters="none", requests=16),
        row(300.0, adapters="mixtures", requests=16),
        {
            "adapters": "distinct",
            "requests": 4,
            "system": "PEFT mixed batch",
            "failure": "no memory",
        },
    ],
    "figures": {"none_16_over_generate": 2.0},
    "peers": {"notes": ["a note"], "ratios": {}},
    "arguments": {"layers": 12, "hidden": 1024, "prompt": 32, "rank": 16},
    "environment": ENVIRONMENT,
}
GROWTH = {
    "sweeps": {
        "active": [row(100.0, active=n, requests=64) for n in (1, 8, 64)],
        "prompt": [
            row(90.0, prompt=n, adapters=kind, requests=16)
            for n in (16, 1024)
            for kind in ("none", "distinct")
        ],
    },
    "figures": {},
    "environment": ENVIRONMENT,
}
OVERHEAD = {
    "streaming": {
        kind: {"in_process": 100.0, "streamed": 90.0, "lost": 0.1} for kind in ("none", "distinct")
    },
    "memory": {"bytes": {"slots": 5_000_000}},
    "environment": ENVIRONMENT,
}


def store(out: Path, **results: dict[str, Any]) -> None:
    for name, result in results.items():
        (out / f"{name}.json").write_text(json.dumps(result))


def test_stored_results_become_tables_and_small_pictures(tmp_path: Path) -> None:
    store(tmp_path, throughput=THROUGHPUT, growth=GROWTH, overhead=OVERHEAD)
    assert command.main(["--redraw", "--out", str(tmp_path)]) == 0
    for name in ("throughput", "growth", "overhead"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 60_000
        text = (tmp_path / f"{name}.md").read_text()
        assert "2026-11-25, 2 cores (AMD EPYC)" in text
        widths = {line.count("|") for line in text.splitlines() if line.startswith("| no adapter")}
        assert len(widths) <= 1
    text = (tmp_path / "throughput.md").read_text()
    assert "cannot: no memory" in text
    assert "- a note" in text


def test_a_part_is_run_and_its_json_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--adapters", "20", "--requests", "5", "--registrations", "5")
    monkeypatch.setattr(command, "PARTS", {"routing": command.Part("routing", flags)})
    assert command.main(["--out", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "routing.json").read_text())
    assert stored["by_adapters"]["20"]["routing_ms"] > 0
    assert stored["seconds"] > 0
    assert "| by_adapters.20.routing_ms | " in (tmp_path / "routing.md").read_text()


def test_a_part_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = command.Part("routing", ("--adapters", "5", "--requests", "5", "--registrations", "5"))
    monkeypatch.setattr(
        command, "PARTS", {"bad": command.Part("routing", ("--no-such-flag",)), "good": good}
    )
    assert command.main(["--out", str(tmp_path)]) == 1
    assert "bad failed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.json", "good.md"]


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["thruput"])
    assert "'thruput'; give some of throughput, growth, overhead" in capsys.readouterr().err


def test_the_readme_shows_ours_beside_the_best_peer(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    section = tables.readme({"throughput": THROUGHPUT}, {"throughput": "a.png", "growth": "b.png"})
    tables.write_readme(readme, section)
    text = readme.read_text()
    assert "| no adapter | 16 | 400 | transformers generate | 200 | 2.00 |" in text
    assert "| two-adapter mixtures | 16 | 300 | none can |  |  |" in text
    assert "![throughput](a.png)" in text
    assert "b.png" not in text
    assert text.startswith("before\n")
    assert text.endswith(f"{tables.END}\nafter\n")
    assert "old" not in text
    tables.write_readme(readme, section)
    assert readme.read_text() == text


def test_a_readme_without_markers_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    with pytest.raises(ValueError, match="no markers"):
        tables.write_readme(readme, "section")
    assert readme.read_text() == "no markers\n"


def test_the_projects_readme_has_the_markers() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert text.index(tables.BEGIN) < text.index(tables.END)
