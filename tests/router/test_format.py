"""The router's file: what is written reads back, anything else is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.demo.bundle import bundle_path
from mora_serve.errors import InvalidArgument, MoraError
from mora_serve.router import format as router_format
from mora_serve.router.features import PooledHidden
from mora_serve.router.format import read_router
from mora_serve.router.router import Router
from tests.router.make import tiny

HIDDEN = PooledHidden(depth=1, dim=6)
SOUND = tiny().to_bytes()
HEADER_BYTES = int.from_bytes(SOUND[:8], "little")


def repacked(change: Callable[[dict[str, Any]], None]) -> bytes:
    """The sound file with a changed header."""
    header = json.loads(SOUND[8 : 8 + HEADER_BYTES])
    change(header)
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + SOUND[8 + HEADER_BYTES :]


def with_metadata(**values: Any) -> bytes:
    def change(header: dict[str, Any]) -> None:
        metadata = json.loads(header["__metadata__"]["mora_router"]) | values
        header["__metadata__"]["mora_router"] = json.dumps(metadata)

    return repacked(change)


@pytest.mark.parametrize("hidden", [None, HIDDEN])
def test_a_file_reads_back_as_it_was(hidden: PooledHidden | None) -> None:
    expected = tiny(hidden=hidden)
    data = expected.to_bytes()
    content, digest = read_router(data)
    for field in dataclasses.fields(content):
        a, b = getattr(content, field.name), getattr(expected, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
    assert digest == hashlib.sha256(data).hexdigest()
    assert content.to_bytes() == data


def test_the_bundled_file_is_read_and_written_the_same() -> None:
    bundled = (bundle_path() / "router/router.safetensors").read_bytes()
    content, _ = read_router(bundled)
    assert content.to_bytes() == bundled


def test_the_file_is_a_safetensors_file() -> None:
    tensors = safetensors.numpy.load(SOUND)
    assert {n: t.shape for n, t in tensors.items()} == {
        "mean": (64,),
        "scales": (8,),
        "codes": (8, 64),
    }


@given(st.binary(max_size=200))
def test_bytes_that_are_no_router_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        read_router(data)


@given(st.integers(0, len(SOUND) - 1), st.integers(0, 255))
def test_a_changed_byte_gives_a_router_that_works_or_a_refusal(at: int, value: int) -> None:
    data = SOUND[:at] + bytes([value]) + SOUND[at + 1 :]
    try:
        router = Router.load(data, "")
    except MoraError:
        return
    key = router.key(["reverse 'kavo'", "turn it around"])
    assert np.isfinite(router.embed("reverse 'kavo'")).all()
    assert key is None or np.isfinite(key.prototypes).all()


@given(st.integers(0, len(SOUND) - 1))
def test_a_file_cut_short_is_refused(size: int) -> None:
    with pytest.raises(InvalidArgument):
        read_router(SOUND[:size])


def test_bytes_after_the_last_tensor_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="bytes follow"):
        read_router(SOUND + b"x")


def test_a_file_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_format, "MAX_BYTES", len(SOUND) - 1)
    with pytest.raises(InvalidArgument):
        read_router(SOUND)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"format": 1}, "router.format"),
        ({"format": None}, "router.format"),
        ({"features": None}, "router.features"),
        ({"fingerprint": 7}, "router.fingerprint"),
        ({"fingerprint": "a\nb"}, "router.fingerprint"),
        ({"known": "reverse"}, "router.known"),
        ({"known": [1]}, "router.known"),
        ({"report": []}, "router.report"),
        ({"report": {"known": "high"}}, "router.report.known"),
        ({"calibration": None}, "router.calibration"),
        ({"calibration": {"threshold": 1.0}}, "router.calibration"),
        ({"calibration": [0.5]}, "router.calibration"),
        ({"prototypes": 0}, "router.prototypes"),
        ({"prototypes": 1 << 40}, "router.prototypes"),
        ({"prototypes": 2.0}, "router.prototypes"),
        ({"prototypes": None}, "router.prototypes"),
    ],
)
def test_metadata_at_fault_are_named(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as e:
        read_router(with_metadata(**values))
    assert e.value.field == field
    assert e.value.message.startswith(field)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", 1.1),
        ("threshold", -0.1),
        ("threshold", True),
        ("blend", 1e9),
        ("blend", "half"),
        ("first", None),
        ("first", [1.0, 2.0]),
        ("first", {"weights": [1.0]}),
        ("further", {"weights": [1.0, 2.0], "bias": 0.0, "more": 1.0}),
        ("first.weights", {"weights": [], "bias": 0.0}),
        ("first.weights", {"weights": "1", "bias": 0.0}),
        ("further.weights", {"weights": [1.0] * 1000, "bias": 0.0}),
        ("further.weights[1]", {"weights": [1.0, 1e7], "bias": 0.0}),
        ("further.weights[0]", {"weights": [None, 1.0], "bias": 0.0}),
        ("first.bias", {"weights": [1.0], "bias": -1e7}),
        ("first.bias", {"weights": [1.0], "bias": [0.0]}),
    ],
)
def test_a_calibration_out_of_range_is_refused(name: str, value: Any) -> None:
    part = name.partition(".")[0]
    calibration = dataclasses.asdict(tiny().calibration) | {part: value}
    with pytest.raises(InvalidArgument) as e:
        read_router(with_metadata(calibration=calibration))
    assert e.value.field == f"router.calibration.{name}"


def test_numbers_that_json_does_not_have_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        read_router(with_metadata(report={"known": float("nan")}))


@pytest.mark.parametrize("name", ["mean", "scales", "codes"])
@pytest.mark.parametrize(
    "entry",
    [
        None,
        {"dtype": "F64", "shape": [64], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [63], "data_offsets": [0, 252]},
        {"dtype": "F32", "shape": [-8], "data_offsets": [256, 288]},
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [256, 288]},
        {"dtype": "F32", "shape": [8.0], "data_offsets": [256, 288]},
        {"dtype": "I8", "shape": [8, 64], "data_offsets": [0, 512]},
        {"dtype": "I8", "shape": [64, 8], "data_offsets": [288, 800]},
        {"dtype": "I8", "shape": "8x64", "data_offsets": [288, 800]},
        {"dtype": "F16", "shape": [1 << 40, 8], "data_offsets": [800, 880]},
    ],
)
def test_a_tensor_at_fault_is_named(name: str, entry: Any) -> None:
    with pytest.raises(InvalidArgument) as e:
        read_router(repacked(lambda header: header.update({name: entry})))
    assert e.value.field.startswith("router.")


def test_tensors_are_exactly_the_known_ones() -> None:
    for change in (lambda h: h.pop("mean"), lambda h: h.update(extra=h["mean"])):
        with pytest.raises(InvalidArgument) as e:
            read_router(repacked(change))
        assert e.value.field == "router.tensors"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", np.nan),
        ("mean", -0.1),
        ("mean", 1.1),
        ("scales", np.inf),
        ("scales", -0.1),
        ("codes", -128),
    ],
)
def test_a_value_that_no_fit_gives_is_refused(name: str, value: float) -> None:
    content = tiny()
    tensor = getattr(content, name).copy()
    tensor.flat[3] = value
    with pytest.raises(InvalidArgument) as e:
        read_router(dataclasses.replace(content, **{name: tensor}).to_bytes())
    assert e.value.field == f"router.{name}"


def test_a_mean_may_be_negative_where_a_hidden_state_is() -> None:
    content = tiny(hidden=HIDDEN)
    assert content.mean.min() < -0.1
    for value in (-1.1, 1.1):
        mean = content.mean.copy()
        mean[-1] = value
        with pytest.raises(InvalidArgument) as e:
            read_router(dataclasses.replace(content, mean=mean).to_bytes())
        assert e.value.field == "router.mean"
