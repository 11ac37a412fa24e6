"""The claims runner, on real small commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import claims
from benchmarks.report import ROOT

PRINT = """python -c 'import json; print("log"); print(json.dumps({RESULT}))'"""


def entry(**changes: object) -> str:
    """One claim in TOML; ``changes`` override or (None) remove its keys."""
    values: dict[str, object] = {
        "id": "sum",
        "tags": ["core"],
        "statement": "a sum",
        "command": PRINT.replace("RESULT", '"rows": [{"sum": 3.5}], "ok": True'),
        "figure": "rows.0.sum",
        "compare": ">=",
        "bar": 3.0,
    }
    values.update(changes)
    lines = [f"{k} = {json.dumps(v)}" for k, v in values.items() if v is not None]
    return "\n".join(["[[claim]]", *lines, ""])


def run(tmp_path: Path, *entries: str, args: tuple[str, ...] = ("--tag", "core")) -> int:
    file = tmp_path / "claims.toml"
    file.write_text("\n".join(entries))
    out = tmp_path / "out.json"
    return claims.main([*args, "--file", str(file), "--out", str(out)])


def test_a_claim_that_holds_exits_zero_and_is_written_with_its_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, entry()) == 0
    assert "1 of 1 hold" in capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["claims"][0]["figure"] == 3.5
    assert record["claims"][0]["holds"] is True
    assert record["machine"]["cores"] >= 1
    assert record["versions"]["numpy"]


@pytest.mark.parametrize(
    ("compare", "bar", "status"),
    [(">=", 3.5, 0), (">=", 3.6, 1), ("<=", 3.5, 0), ("<=", 3.4, 1), ("==", 3.5, 0), ("==", 3, 1)],
)
def test_each_comparison_holds_exactly_up_to_its_bar(
    tmp_path: Path, compare: str, bar: float, status: int
) -> None:
    assert run(tmp_path, entry(compare=compare, bar=bar)) == status


def test_truth_values_are_figures_too(tmp_path: Path) -> None:
    assert run(tmp_path, entry(figure="ok", compare="==", bar=True)) == 0
    assert run(tmp_path, entry(figure="ok", compare="==", bar=False)) == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"figure": "rows.1.sum"}, "no figure at 'rows.1.sum'"),
        ({"figure": "rows"}, "no figure at 'rows'"),
        ({"command": "python -c 'print(1)'"}, "no JSON object"),
        ({"command": """python -c 'print("{}"); raise SystemExit(3)'"""}, "exit status 3"),
        ({"command": "no-such-program-here"}, "cannot start"),
        ({"command": "python -c 'import time; time.sleep(60)'", "timeout": 0.2}, "not done after"),
        ({"bar": "three"}, "of different kinds"),
    ],
)
def test_a_command_that_gives_no_figure_falls_short_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], why: str
) -> None:
    assert run(tmp_path, entry(**changes)) == 1
    assert why in capsys.readouterr().out


def test_a_failed_command_holds_nothing_even_if_its_figure_is_good(tmp_path: Path) -> None:
    failing = PRINT.replace("RESULT", '"sum": 9').replace("))'", ")); raise SystemExit(1)'")
    assert run(tmp_path, entry(command=failing, figure="sum")) == 1


def test_a_figure_that_is_not_a_number_holds_nothing_and_leaves_the_record_readable(
    tmp_path: Path,
) -> None:
    nan = PRINT.replace("RESULT", '"sum": float("nan")')
    for compare in (">=", "<=", "=="):
        assert run(tmp_path, entry(command=nan, figure="sum", compare=compare)) == 1
        assert json.loads((tmp_path / "out.json").read_text())["claims"][0]["figure"] is None


def test_claims_with_one_command_run_it_once(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    command = (
        f"""python -c 'open("{marks}", "a").write("x"); print("{{\\"a\\": 1, \\"b\\": 2}}")'"""
    )
    one = entry(id="one", command=command, figure="a", bar=1)
    two = entry(id="two", command=command, figure="b", bar=2)
    assert run(tmp_path, one, two) == 0
    assert marks.read_text() == "x"


def test_only_the_claims_of_a_tag_or_an_id_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = entry(id="other", tags=["slow"], bar=99)
    assert run(tmp_path, entry(), other) == 0
    assert run(tmp_path, entry(), other, args=("--tag", "slow")) == 1
    assert run(tmp_path, entry(), other, args=("--id", "sum")) == 0
    capsys.readouterr()
    assert run(tmp_path, entry(), other, args=("--list",)) == 0
    assert "other [slow]: a sum" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([entry(bra=1)], "did you mean 'bar'"),
        ([entry(bar=None)], "'bar' is missing"),
        ([entry(compare=">")], "is not one of"),
        ([entry(), entry()], "stands twice"),
        (["[[claim]"], "claims.toml"),
        ([entry(tags=["slow"])], "tags in use: slow"),
    ],
)
def test_a_wrong_file_of_claims_exits_two_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], entries: list[str], why: str
) -> None:
    assert run(tmp_path, *entries) == 2
    assert why in capsys.readouterr().err


def test_the_projects_own_claims_are_well_formed() -> None:
    known = claims.read_claims(ROOT / "benchmarks" / "claims.toml")
    assert any("core" in claim.tags for claim in known)
