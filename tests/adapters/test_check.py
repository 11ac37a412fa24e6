"""What is said of a directory offline is what a registration would say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.check import check_directory
from mora_serve.adapters.validate import read_directory
from mora_serve.cli import main
from mora_serve.errors import MoraError
from tests.adapters.make import LIMITS, SHAPE, config, directory, key, tensors


def test_a_sound_adapter_is_described(tmp_path: Path) -> None:
    values = tensors(4, ("q_proj", "v_proj")) | tensors(8, ("down_proj",), [1], dtype=np.float16)
    settings = config(rank_pattern={"down_proj": 8}, base_model_name_or_path="some/base")
    path = directory(tmp_path / "a", settings, values)
    report = check_directory(path, LIMITS, SHAPE)
    assert report.refusal is None
    assert report.kind == "LoRA"
    assert report.modules == {"q_proj": 2, "v_proj": 2, "down_proj": 1}
    assert (report.ranks, report.scalings) == ((4, 8), (1.0, 2.0))
    assert report.dtypes == ("F16", "F32")
    assert report.parameters == sum(v.size for v in values.values())
    assert report.size_bytes == (path / "adapter_model.safetensors").stat().st_size
    assert (report.named_base, report.base) == ("some/base", "shapes")
    assert report.digest == read_directory(tmp_path, "a", SHAPE, LIMITS).digest


@pytest.mark.parametrize(
    "changes", [{"peft_type": "IA3"}, {"r": 8}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}]
)
def test_a_refusal_is_the_one_of_a_registration(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = directory(tmp_path / "a", config(**changes), tensors())
    with pytest.raises(MoraError) as e:
        read_directory(tmp_path, "a", SHAPE, LIMITS)
    for shape in (SHAPE, None):
        refusal = check_directory(path, LIMITS, shape).refusal
        assert refusal is not None
        assert (refusal["reason"], refusal["message"]) == (e.value.reason, e.value.message)


def test_without_a_base_the_modules_are_compared_with_each_other(tmp_path: Path) -> None:
    path = directory(tmp_path / "a", config(), tensors())
    report = check_directory(path, LIMITS)
    assert (report.refusal, report.base) == (None, "not compared")
    assert any("--base" in w for w in report.warnings)
    values = tensors()
    values[key(1, "k_proj", "B.weight")] = np.ones((24, 4), np.float32)
    uneven = check_directory(directory(tmp_path / "b", config(), values), LIMITS)
    assert uneven.refusal is not None
    assert uneven.refusal["reason"] == "SHAPE_MISMATCH"
    assert check_directory(path, LIMITS, replace(SHAPE, layers=1)).refusal is not None


def test_the_bases_fingerprint_is_asked_for_only_where_the_adapter_names_one(
    tmp_path: Path,
) -> None:
    path = directory(tmp_path / "a", config(), tensors())
    asked = []

    def fingerprint() -> str:
        asked.append(1)
        return "aaaa"

    assert check_directory(path, LIMITS, SHAPE, fingerprint).base == "shapes"
    assert not asked
    card = path / "routing_card.json"
    card.write_bytes(RoutingCard(base_fingerprint="aaaa", prompts=("x",)).to_json())
    report = check_directory(path, LIMITS, SHAPE, fingerprint)
    assert (report.base, report.warnings) == ("fingerprint", ())
    card.write_bytes(RoutingCard(base_fingerprint="bbbb").to_json())
    refusal = check_directory(path, LIMITS, SHAPE, fingerprint).refusal
    assert refusal is not None
    assert refusal["reason"] == "WRONG_BASE"


def test_what_a_user_would_wonder_about_later_is_warned_of(tmp_path: Path) -> None:
    values = {k: v * (".lora_B." not in k) for k, v in tensors().items()}
    path = directory(tmp_path / "a", config(), values)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    (path / "added_tokens.json").write_text(json.dumps({"<new>": 64}))
    warnings = " ".join(check_directory(path, LIMITS, SHAPE).warnings)
    for said in ("was not trained", "chat template", "token 64", "router will not pick", "which b"):
        assert said in warnings


def test_the_hubs_cache_is_refused_for_its_links_and_the_way_out_named(tmp_path: Path) -> None:
    path = directory(tmp_path / "a", config(), tensors())
    (path / "adapter_config.json").rename(tmp_path / "blob")
    (path / "adapter_config.json").symlink_to(tmp_path / "blob")
    report = check_directory(path, LIMITS, SHAPE)
    assert report.refusal is not None
    assert report.refusal["reason"] == "INVALID_PATH"
    assert "upload" in report.warnings[0]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"added_tokens_decoder": []}', "\0"])
def test_broken_files_beside_the_adapter_do_not_matter(tmp_path: Path, text: str) -> None:
    path = directory(tmp_path / "a", config(), tensors())
    for name in ("tokenizer_config.json", "added_tokens.json", "tokenizer.json"):
        (path / name).write_text(text)
    assert check_directory(path, LIMITS, SHAPE).refusal is None


def test_the_command_tells_directories_apart_by_its_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = directory(tmp_path / "good", config(), tensors())
    bad = directory(tmp_path / "bad", config(use_mora=True), tensors())
    (good / "evil\x1b[31m.bin").write_bytes(b"")
    assert main(["adapters", "check", str(good)]) == 0
    shown = capsys.readouterr().out
    assert "servable" in shown
    assert "\x1b" not in shown
    assert main(["adapters", "check", str(good), str(bad)]) == 1
    shown = capsys.readouterr().out
    assert "refused (UNSUPPORTED_ADAPTER)" in " ".join(shown.split())
    assert main(["adapters", "check", "--json", str(good), str(bad)]) == 1
    reports = json.loads(capsys.readouterr().out)
    assert [r["servable"] for r in reports] == [True, False]
    assert reports[1]["refusal"]["field"] == "adapter_config.json:use_mora"
    assert main(["adapters", "check", "--max-rank", "3", str(good)]) == 1
    assert main(["adapters", "check", str(tmp_path / "none")]) == 2


def test_the_command_compares_with_a_base_and_the_servers_own_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = directory(tmp_path / "good", config(), tensors())
    assert main(["adapters", "check", "--base", "demo", str(good)]) == 1
    assert "this base needs" in " ".join(capsys.readouterr().out.split())
    file = tmp_path / "mora.toml"
    file.write_text('[base]\nmodel = "demo"\n[adapters]\nmax_tensors = 3\n')
    assert main(["adapters", "check", "--json", "--config", str(file), str(good)]) == 1
    assert "max_tensors (3)" in capsys.readouterr().out


def test_checking_needs_no_torch(tmp_path: Path) -> None:
    path = directory(tmp_path / "a", config(), tensors())
    script = (
        "import sys\nfrom mora_serve.cli import main\n"
        f"status = main(['adapters', 'check', '--base', 'demo', {str(path)!r}])\n"
        "print(sorted({'torch', 'peft', 'transformers', 'safetensors', 'grpc'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_the_bundled_adapters_are_checked_against_their_base(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mora_serve.demo.bundle import bundle_path

    directories = sorted(map(str, (bundle_path() / "adapters").iterdir()))
    assert main(["adapters", "check", "--json", "--base", "demo", *directories]) == 0
    assert {r["base"] for r in json.loads(capsys.readouterr().out)} == {"fingerprint"}
