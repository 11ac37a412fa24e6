"""The plan of a card: its parts against published models and real tensors, and what it leaves."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import memory, serving_plan
from mora_serve.cli import main
from mora_serve.errors import ConfigError, InvalidArgument
from mora_serve.model.footprint import GIB, card_bytes, kv_token_bytes, linear_bytes
from mora_serve.model.known import KNOWN, find_shape
from mora_serve.plan import Wanted, fewest_changes, plan

# Parameters as the models' own files state them (safetensors metadata of the hub).
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
LLAMA = find_shape("llama-3.1-8b")
CARD = Wanted(card=24 * GIB)


def test_known_shapes_have_the_parameters_that_their_models_have() -> None:
    assert {name: find_shape(name).parameters for name in KNOWN} == PUBLISHED


@pytest.mark.parametrize(
    ("kernels", "quantization", "adapters"),
    [("auto", "nf4", "auto"), ("torch", "none", "auto"), ("torch", "nf4", "int8")],
)
def test_every_part_that_is_allocated_once_is_calculated_exactly(
    tmp_path: Path, kernels: str, quantization: str, adapters: Literal["auto", "int8"]
) -> None:
    """By the settings that the plan itself gives; the tables and all else to the byte."""
    memory.write_model(tmp_path, memory.llama_config(256, 448, 2, 512))
    wanted = Wanted(192 << 20, slots=4, rank=8, adapter_dtype=adapters, context=64, cuda=False)
    run = serving_plan.measure(tmp_path, kernels, quantization, wanted)
    assert run["planned"] == run["tensors"]


def test_figures_of_a_known_card_are_what_arithmetic_by_hand_gives() -> None:
    found = plan(LLAMA, CARD)
    assert linear_bytes(LLAMA, "nf4", 2) == LLAMA.linear_parameters * 4.5 / 8
    assert linear_bytes(LLAMA, "none", 2) == LLAMA.linear_parameters * 2
    assert 4.1 < linear_bytes(LLAMA, "gptq", 2) * 8 / LLAMA.linear_parameters < 4.2
    assert kv_token_bytes(LLAMA, 2) == 131_072  # 2 x 32 layers x 8 heads x 128 x 2 bytes
    assert found.parts["embedding and head"] == 2 * 128_256 * 4096 * 2
    assert found.parts["adapter slots"] == 32 * 83_886_080  # 41.9 million parameters at rank 16
    assert found.fits


@given(
    st.sampled_from(KNOWN),
    st.integers(1, 200),
    st.integers(1, 64),
    st.integers(1, 128),
    st.sampled_from([0, 1, 100, 4096, 1 << 20]),
    st.sampled_from(["nf4", "gptq", "none"]),
    st.booleans(),
)
def test_a_plan_never_gives_away_more_than_the_card_has(
    name: str, gib: int, slots: int, rank: int, context: int, quantization: str, dora: bool
) -> None:
    """And its answer stands: one request more would not be had."""
    wanted = Wanted(
        gib * GIB,
        quantization,
        slots=slots,
        rank=rank,
        context=context,
        dora=dora,
        cuda=gib % 2 > 0,
    )
    found = plan(find_shape(name), wanted)
    used = sum(found.parts.values())
    assert used + found.kv_bytes == found.card
    assert found.tokens == found.pages * wanted.page_size
    if found.pages:
        assert used + (found.pages + 1) * found.page_bytes <= found.card
    assert found.concurrent * found.context <= found.tokens
    assert found.concurrent <= wanted.max_batch
    assert found.fits == (found.concurrent >= 1)
    assert not plan(
        find_shape(name), dataclasses.replace(wanted, requests=found.concurrent + 1)
    ).fits


def test_more_of_anything_leaves_fewer_pages() -> None:
    before = plan(LLAMA, CARD).pages
    for change in ({"slots": 64}, {"rank": 32}, {"quantization": "none"}):
        assert plan(LLAMA, dataclasses.replace(CARD, **change)).pages < before


def test_a_card_has_room_for_the_scales_of_dora_whatever_comes() -> None:
    """A machine without one takes it with the first such adapter."""
    scales = "DoRA scales of the slots"
    found = plan(LLAMA, CARD)
    assert found.parts[scales] == 32 * 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096) * 2
    assert found == plan(LLAMA, dataclasses.replace(CARD, dora=True))
    machine = dataclasses.replace(CARD, cuda=False)
    assert scales not in plan(LLAMA, machine).parts
    with_dora = plan(LLAMA, dataclasses.replace(machine, dora=True))
    assert with_dora.parts[scales] == found.parts[scales]


def test_the_change_that_is_named_makes_it_fit() -> None:
    tight = dataclasses.replace(CARD, card=16 * GIB, slots=128, context=32768)
    assert not plan(LLAMA, tight).fits
    said, changed = fewest_changes(LLAMA, tight) or ("", tight)
    assert said.startswith("slots ")
    assert plan(LLAMA, changed).fits
    assert fewest_changes(LLAMA, dataclasses.replace(CARD, card=4 * GIB)) is None


def test_the_command_answers_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "Llama-3.1-8B", "--card-gb", "24", "--requests", "8"]
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "calculated, not measured" in shown
    assert "it fits" in shown
    assert "--engine.kv_bytes=" in shown
    assert main([*flags, "--json", "--targets", "q_proj,v_proj"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"]
    assert said["calculated"]
    assert said["adapter_bytes"] == 2 * 16 * 32 * (4096 + 4096 + 4096 + 1024)
    assert main([*flags, "--json", "--adapter-dtype", "int8"]) == 0
    small = json.loads(capsys.readouterr().out)
    assert small["settings"]["adapters.dtype"] == "int8"
    assert small["parts"]["adapter slots"] == 32 * (41_943_040 + 32 * 7 * 16 * 4)
    assert small["pages"] > said["pages"]
    assert "adapters.dtype" not in said["settings"]
    assert main(["plan", "llama-3.1-70b", "--card", "a10"]) == 1
    assert "larger card" in capsys.readouterr().out
    assert main(["plan", "demo", "--cpu", "--card-gb", "1"]) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["llama-3.1-8b", "--card", "tpu"], "h200"),
        (["llama-3.1-8b", "--card", "-1"], "neither GiB"),
        (["llama-3.1-8b", "--card", "24", "--slots", "0"], "slots: 0"),
        (["llama-3.1-8b", "--card", "24", "--targets", "q"], "q_proj"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["plan", *flags]) in (1, 2)
    assert said in capsys.readouterr().err


def test_a_name_that_is_nearly_known_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"'llama-3\.1-8b' is known"):
        find_shape("meta-llama/Llama-3.1-8B")


def test_a_card_is_a_name_or_gib() -> None:
    assert card_bytes("H100") == 80 * GIB
    assert card_bytes("1.5") == 3 * GIB // 2
    for wrong in ("", "nan", "inf", "0"):
        with pytest.raises(InvalidArgument):
            card_bytes(wrong)


def test_planning_needs_no_torch() -> None:
    script = (
        "import sys\nfrom mora_serve.cli import main\n"
        "main(['plan', 'qwen2.5-7b', '--card', '24'])\n"
        "print(sorted({'torch', 'transformers', 'grpc', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
