"""A PEFT adapter is read once, checked against the base, and named by what it computes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.files import check_file
from mora_serve.adapters.validate import (
    ValidatedAdapter,
    read_directory,
    read_stored,
    read_upload,
)
from mora_serve.errors import FailedPrecondition, InvalidArgument, MoraError, NotFound
from mora_serve.model.shape import PROJECTIONS
from tests.adapters.make import LIMITS, SHAPE, config, directory, files, key, tensors


def read(config: dict[str, Any], tensors: dict[str, np.ndarray], **limits: int) -> ValidatedAdapter:
    return read_upload(*files(config, tensors), None, SHAPE, replace(LIMITS, **limits))


def test_every_module_is_found_with_its_place_rank_and_scaling() -> None:
    values = tensors(rank=4)
    adapter = read(config(), values)
    assert [(m.layer, m.projection) for m in adapter.modules] == sorted(
        (layer, p) for layer in range(SHAPE.layers) for p in PROJECTIONS
    )
    assert (adapter.rank, adapter.dora, adapter.rslora) == (4, False, False)
    assert adapter.nbytes == len(adapter.weights)
    assert adapter.targets == PROJECTIONS
    for m in adapter.modules:
        assert (m.rank, m.scaling, m.magnitude) == (4, 2.0, None)
        np.testing.assert_array_equal(
            adapter.array(m.a), values[key(m.layer, m.projection, "A.weight")]
        )
        np.testing.assert_array_equal(
            adapter.array(m.b), values[key(m.layer, m.projection, "B.weight")]
        )


def test_the_largest_rank_is_reported_where_ranks_differ() -> None:
    values = tensors(2, ("q_proj",)) | tensors(16, ("down_proj",), [1])
    adapter = read(config(2, rank_pattern={"layers.1.mlp.down_proj": 16}), values)
    assert adapter.rank == 16
    assert [m.rank for m in adapter.modules] == [2, 16, 2]
    assert adapter.targets == ("q_proj", "down_proj")


def test_a_dora_adapter_has_magnitudes() -> None:
    values = tensors(dora=True)
    adapter = read(config(use_dora=True), values)
    assert adapter.dora
    for m in adapter.modules:
        assert m.magnitude is not None
        np.testing.assert_array_equal(
            adapter.array(m.magnitude), values[key(m.layer, m.projection, "magnitude_vector")]
        )


@pytest.mark.parametrize("suffix", [".weight", ".default.weight", ".default", ""])
def test_keys_are_understood_with_and_without_what_versions_append(suffix: str) -> None:
    values = {k.replace(".weight", "") + suffix: v for k, v in tensors(dora=True).items()}
    assert len(read(config(use_dora=True), values).modules) == 14


def test_the_digest_is_that_of_the_computation() -> None:
    """Not of who saved the files, nor of the card; but of every weight and of the scaling."""
    values = tensors()
    data, weights = files(config(), values)
    card = RoutingCard(prompts=("a",)).to_json()
    base = read_upload(data, weights, None, SHAPE, LIMITS)
    with_card = read_upload(data, weights, card, SHAPE, LIMITS)
    elsewhere = read(config(base_model_name_or_path="/somewhere", lora_dropout=0.1), values)
    assert base.digest == with_card.digest == elsewhere.digest
    assert len(bytes.fromhex(base.digest)) == 32
    assert with_card.card == RoutingCard(prompts=("a",))
    assert base.digest != read(config(lora_alpha=9), values).digest
    values[key(1, "o_proj", "B.weight")][0, 0] += 1
    assert base.digest != read(config(), values).digest


def test_a_stored_adapter_is_the_one_that_was_validated() -> None:
    adapter = read(config(rank_pattern={"q_proj": 4}), tensors(dora=False))
    stored = read_stored(adapter.digest, adapter.config, adapter.weights, SHAPE, LIMITS)
    assert stored == adapter


def test_a_directory_is_read_with_its_card(tmp_path: Path) -> None:
    directory(tmp_path / "some" / "adapter", config(), tensors())
    card = RoutingCard(tasks=("reverse",), prompts=("x",), base_fingerprint="abc")
    (tmp_path / "some" / "adapter" / "routing_card.json").write_bytes(card.to_json())
    (tmp_path / "some" / "adapter" / "README.md").write_text("not read")
    adapter = read_directory(tmp_path, "some/adapter", SHAPE, LIMITS, "abc")
    assert (adapter.card, adapter.base_fingerprint) == (card, "abc")
    absolute = read_directory(str(tmp_path), str(tmp_path / "some/adapter"), SHAPE, LIMITS, "abc")
    assert absolute == adapter
    assert read_directory(tmp_path / "some/adapter", ".", SHAPE, LIMITS, "abc") == adapter


def test_an_adapter_of_another_base_is_refused_with_both_named() -> None:
    data = files(config(), tensors())
    card = RoutingCard(base_fingerprint="aaaa").to_json()
    with pytest.raises(InvalidArgument, match=r"base aaaa, this server runs bbbb; ") as e:
        read_upload(*data, card, SHAPE, LIMITS, "bbbb")
    assert e.value.reason == "WRONG_BASE"


@pytest.mark.parametrize(
    ("card", "server"),
    [(None, "bbbb"), (RoutingCard(), "bbbb"), (RoutingCard(base_fingerprint="aaaa"), "")],
)
def test_an_adapter_whose_base_cannot_be_compared_is_unverified(
    card: RoutingCard | None, server: str
) -> None:
    data = files(config(), tensors())
    adapter = read_upload(*data, card.to_json() if card else None, SHAPE, LIMITS, server)
    assert adapter.base_fingerprint is None


def without(part: str) -> dict[str, np.ndarray]:
    values = tensors(dora=part == "magnitude_vector")
    del values[key(1, "q_proj", part)]
    return values


def with_shape(part: str, *shape: int) -> dict[str, np.ndarray]:
    values = tensors(dora=part == "magnitude_vector")
    values[key(1, "k_proj", part)] = np.zeros(shape, np.float32)
    return values


def renamed(old: str, new: str) -> dict[str, np.ndarray]:
    return {k.replace(old, new): v for k, v in tensors().items()}


EXTRA = np.zeros((4, 32), np.float32)
UNFIT: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str, str]] = {
    "A without B": (without("B.weight"), {}, "SHAPE_MISMATCH", "1.self_attn.q_proj: lora_B is mis"),
    "B without A": (without("A.weight"), {}, "SHAPE_MISMATCH", "lora_A is missing"),
    "DoRA without magnitude": (
        without("magnitude_vector"), {"use_dora": True}, "SHAPE_MISMATCH", "magnitude_vector is mis"
    ),
    "magnitude without DoRA": (tensors(dora=True), {}, "SHAPE_MISMATCH", "use_dora false"),
    "magnitude too long": (
        with_shape("magnitude_vector", 17), {"use_dora": True}, "SHAPE_MISMATCH", r"\[17\].*\[16\]"
    ),
    "A for another width": (with_shape("A.weight", 4, 31), {}, "SHAPE_MISMATCH", r"\[4, 32\]"),
    "A of one dimension": (with_shape("A.weight", 4), {}, "SHAPE_MISMATCH", r"\[4\].*\[4, 32\]"),
    "B for other heads": (with_shape("B.weight", 32, 4), {}, "SHAPE_MISMATCH", r"\[16, 4\]"),
    "B of another rank": (with_shape("B.weight", 16, 3), {}, "SHAPE_MISMATCH", r"\[16, 4\]"),
    "rank against r": (tensors(rank=8), {}, "SHAPE_MISMATCH", "rank 8, .* says 4"),
    "rank against rank_pattern": (
        tensors(), {"rank_pattern": {"up_proj": 2}}, "SHAPE_MISMATCH", "up_proj: .* says 2"
    ),
    "layer beyond the base": (
        renamed("layers.1.", "layers.2."), {}, "SHAPE_MISMATCH", "has only 2 layers"
    ),
    "a rank too large": (
        tensors(rank=65), {"r": 65}, "RANK_TOO_LARGE", r"rank 65 is above adapters\.max_rank"
    ),
    "lm_head": (
        tensors() | {"base_model.model.lm_head.lora_A.weight": EXTRA}, {}, "UNSUPPORTED_ADAPTER",
        "lm_head",
    ),
    "embeddings": (
        tensors() | {"base_model.model.model.embed_tokens.weight": EXTRA}, {},
        "UNSUPPORTED_ADAPTER", "neither embeddings nor whole modules",
    ),
    "lora_bias": (
        tensors() | {key(0, "q_proj", "B.bias"): EXTRA}, {}, "UNSUPPORTED_ADAPTER", "not lora_A"
    ),
    "another architecture": (
        renamed("self_attn.q_proj", "attention.q_proj"), {}, "UNSUPPORTED_ADAPTER", "q_proj, k_proj"
    ),
    "another projection": (
        renamed("q_proj", "qkv_proj"), {}, "UNSUPPORTED_ADAPTER", "qkv_proj"
    ),
    "the wrong block": (
        renamed("self_attn.q_proj", "mlp.q_proj"), {}, "SHAPE_MISMATCH", "wrong block"
    ),
    "a module twice": (
        tensors() | {key(0, "q_proj", "A.default.weight"): EXTRA}, {}, "SHAPE_MISMATCH", "twice"
    ),
    "a layer with a leading zero": (
        renamed("layers.1.", "layers.01."), {}, "UNSUPPORTED_ADAPTER", "layers.01"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_tensors_that_do_not_fit_are_refused_by_name_with_a_remedy(name: str) -> None:
    values, changes, reason, message = UNFIT[name]
    with pytest.raises(InvalidArgument, match=rf"^adapter_model\.safetensors: .*{message}") as e:
        read(config(**changes), values)
    assert e.value.reason == reason
    assert "; " in e.value.message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_single_value_that_is_not_finite_is_found(bad: float, dtype: Any) -> None:
    values = tensors(dtype=dtype)
    values[key(1, "down_proj", "B.weight")][-1, -1] = bad
    with pytest.raises(InvalidArgument, match=r"layers\.1\.mlp\.down_proj.*NaN or infinite") as e:
        read(config(), values)
    assert e.value.reason == "NOT_FINITE"


def test_limits_are_configurable_and_named() -> None:
    assert read(config(65), tensors(rank=65), max_rank=65).rank == 65
    with pytest.raises(InvalidArgument, match=r"28 tensors .*adapters\.max_tensors \(27\)"):
        read(config(), tensors(), max_tensors=27)
    with pytest.raises(InvalidArgument, match=r"more than the 1000 .* raise adapters\.max_bytes"):
        read(config(), tensors(), max_bytes=1000)


def test_files_of_an_upload_are_limited_by_name() -> None:
    assert check_file("adapter_model.safetensors", replace(LIMITS, max_bytes=7)) == 7
    assert check_file("adapter_config.json", LIMITS) == 1 << 20
    assert check_file("routing_card.json", LIMITS) == 4 << 20
    with pytest.raises(InvalidArgument, match="is no part of an adapter") as e:
        check_file("../adapter_config.json", LIMITS)
    assert e.value.field == "file"


ABSENT: list[tuple[str, type[MoraError]]] = [
    ("nothing/here", NotFound),
    ("adapter/adapter_config.json", InvalidArgument),
    ("adapter/adapter_config.json/x", InvalidArgument),
    ("", InvalidArgument),
    ("a\0b", InvalidArgument),
    ("x" * 5000, InvalidArgument),
]


@pytest.mark.parametrize(("path", "error"), ABSENT)
def test_a_path_that_names_no_directory_is_refused(
    tmp_path: Path, path: str, error: type[MoraError]
) -> None:
    directory(tmp_path / "adapter", config(), tensors())
    with pytest.raises(error, match=r"^path: ") as e:
        read_directory(tmp_path, path, SHAPE, LIMITS)
    assert str(tmp_path) not in e.value.message


def test_a_root_that_is_unset_or_gone_is_the_servers_fault(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"set adapters.root, or upload the files"):
        read_directory("", "adapter", SHAPE, LIMITS)
    with pytest.raises(FailedPrecondition, match=r"adapters.root, .* does not exist"):
        read_directory(tmp_path / "gone", "adapter", SHAPE, LIMITS)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (directory(tmp_path / "adapter", config(), tensors()) / name).unlink()
    with pytest.raises(InvalidArgument, match=rf"^{name}: the adapter has no such file"):
        read_directory(tmp_path, "adapter", SHAPE, LIMITS)


def test_a_tensor_without_values_is_told_to_be_of_a_sharded_model() -> None:
    values = tensors() | {key(0, "q_proj", "A.weight"): np.zeros((0,), np.float32)}
    with pytest.raises(InvalidArgument, match=r"ZeRO-3.*save the adapter again"):
        read(config(), values)


def test_no_descriptor_stays_open_after_a_refusal(tmp_path: Path) -> None:
    directory(tmp_path / "adapter", config(), tensors())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    before = len(os.listdir("/proc/self/fd"))
    for path in ("adapter", "adapter/nothing", "..", "adapter/adapter_config.json"):
        with pytest.raises(MoraError):
            read_directory(tmp_path, path, SHAPE, LIMITS)
    assert len(os.listdir("/proc/self/fd")) == before
