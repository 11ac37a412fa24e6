"""The safetensors header: what the library accepts is accepted, anything else refused safely."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.adapters.header import check_finite, read_header, tensor_array
from mora_serve.errors import InvalidArgument
from tests.adapters.make import LIMITS, container, tensors

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
DATA = bytes(32)


def changed(key: str, **changes: Any) -> dict[str, Any]:
    return GOOD | {key: GOOD[key] | changes}


def read(file: bytes, **limits: int) -> Any:
    return read_header(memoryview(file), replace(LIMITS, **limits))


def test_a_file_of_the_library_is_read_with_equal_values() -> None:
    expected = tensors(dora=True, dtype=np.float16) | tensors(layers=(), seed=1)
    file = memoryview(safetensors.numpy.save(expected, metadata={"format": "pt"}))
    found = read_header(file, LIMITS)
    assert found.keys() == expected.keys()
    for key, ref in found.items():
        assert ref.dtype == "F16"
        np.testing.assert_array_equal(tensor_array(file, ref), expected[key])


def test_an_unaligned_tensor_is_read() -> None:
    values = np.arange(6, dtype=np.float32)
    header = {
        "a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
        "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [2, 26]},
    }
    for padding in range(8):
        file = container(json.dumps(header).encode() + b" " * padding, bytes(2) + values.tobytes())
        array = tensor_array(memoryview(file), read(file)["b"])
        assert array.flags.aligned
        np.testing.assert_array_equal(array, values.reshape(2, 3))


BROKEN = {
    "empty file": b"",
    "too short": b"1234567",
    "header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "header length of all ones": b"\xff" * 16,
    "no JSON": container(b"{nonsense}"),
    "no UTF-8": container(b'{"\xff": 1}'),
    "no object": container(b"[1]"),
    "white space first": container(b" {}"),
    "no tensors": container({"__metadata__": {}}),
    "metadata no object": container(GOOD | {"__metadata__": []}, DATA),
    "a key twice": container(b'{"a": 1, "a": 2}'),
    "NaN": container(b'{"a": NaN}'),
    "nested": container(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "endless number": container(b'{"a":' + b"9" * 5000 + b"}"),
    "entry no object": container(GOOD | {"a": 1}, DATA),
    "entry with more keys": container(changed("a", extra=1), DATA),
    "entry with fewer keys": container(GOOD | {"a": {"dtype": "F32"}}, DATA),
    "unknown type": container(changed("a", dtype="I64"), DATA),
    "type no string": container(changed("a", dtype=[]), DATA),
    "no dimensions": container(changed("a", shape=[]), DATA),
    "three dimensions": container(changed("a", shape=[1, 2, 3]), DATA),
    "a size of zero": container(changed("a", shape=[0, 3], data_offsets=[0, 0]), DATA),
    "a negative size": container(changed("a", shape=[-2, -3]), DATA),
    "a size that is true": container(changed("a", shape=[True, 6]), DATA),
    "a size that is a float": container(changed("a", shape=[2.0, 3]), DATA),
    "a huge size": container(changed("a", shape=[1 << 80, 3]), DATA),
    "sizes whose product is huge": container(changed("a", shape=[1 << 61, 1 << 61]), DATA),
    "shape no list": container(changed("a", shape="23"), DATA),
    "extent against shape": container(changed("a", shape=[2, 4]), DATA),
    "offsets reversed": container(changed("a", data_offsets=[24, 0]), DATA),
    "negative offset": container(changed("a", data_offsets=[-24, 0]), DATA),
    "three offsets": container(changed("a", data_offsets=[0, 24, 24]), DATA),
    "overlap": container(changed("b", data_offsets=[16, 24]), DATA),
    "gap": container(changed("b", data_offsets=[26, 34]), bytes(34)),
    "beyond the file": container(GOOD, DATA[:-1]),
    "bytes at the end": container(GOOD, DATA + b"x"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_the_file_and_a_remedy(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^adapter_model\.safetensors: .+; .+") as e:
        read(BROKEN[name])
    assert len(e.value.message) < 500


def test_the_unbroken_file_is_read() -> None:
    assert {k: t.shape for k, t in read(container(GOOD, DATA)).items()} == {"a": (2, 3), "b": (4,)}


def test_the_number_of_tensors_and_the_header_are_limited() -> None:
    with pytest.raises(InvalidArgument, match=r"2 tensors .* adapters\.max_tensors \(1\)"):
        read(container(GOOD, DATA), max_tensors=1)
    padded = container(json.dumps(GOOD).encode() + b" " * (1 << 17), DATA)
    read(padded)
    with pytest.raises(InvalidArgument, match="header"):
        read(padded, max_tensors=2)


@given(st.data())
def test_a_mutated_file_is_read_within_its_bounds_or_refused(data: st.DataObject) -> None:
    """Whatever bytes change, the result is an InvalidArgument or tensors that lie in the file.

    A file that is accepted is accepted by the safetensors library too, with the same tensors.
    """
    file = bytearray(container(GOOD, DATA))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(file) - 1))
        new = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=3),
                st.sampled_from(
                    [
                        b"0",
                        b"1",
                        b"9",
                        b"-",
                        b"[",
                        b"]",
                        b"{",
                        b'"',
                        b",",
                        b"F16",
                        b"BF16",
                        b"e9",
                        b" ",
                    ]
                ),
            )
        )
        if data.draw(st.booleans()):
            file[at : at + len(new)] = new
        else:
            file[at:at] = new
    mutated = bytes(file)
    try:
        found = read(mutated)
    except InvalidArgument:
        return
    size = {"F32": 4, "F16": 2, "BF16": 2}
    for ref in found.values():
        assert 8 < ref.start < ref.end <= len(mutated)
        assert ref.end - ref.start == math.prod(ref.shape) * size[ref.dtype]
        assert tensor_array(memoryview(mutated), ref).shape == ref.shape
    theirs = dict(safetensors.deserialize(mutated))
    assert {k: tuple(v["shape"]) for k, v in theirs.items()} == {
        k: ref.shape for k, ref in found.items()
    }


BITS = {
    "F32": (np.uint32, [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x7F7FFFFF], 0x7F7F7FFF),
    "F16": (np.uint16, [0x7C00, 0xFC00, 0x7E00, 0x7C01], 0x7BFF),
    "BF16": (np.uint16, [0x7F80, 0xFF80, 0x7FC0, 0xFF81], 0x7F7F),
}


@pytest.mark.parametrize("dtype", BITS)
def test_values_that_are_not_finite_are_found_wherever_they_stand(dtype: str) -> None:
    """NaN, infinities, and float32 values that become infinite when rounded to bf16."""
    kind, bad, largest = BITS[dtype]
    for place in (0, 5, 11):
        for bits in bad:
            values = np.full(12, largest, kind)
            header = {"t": {"dtype": dtype, "shape": [12], "data_offsets": [0, values.nbytes]}}
            file = memoryview(container(header, values.tobytes()))
            check_finite(file, "t", read_header(file, LIMITS)["t"])
            values[place] = bits
            file = memoryview(container(header, values.tobytes()))
            with pytest.raises(InvalidArgument, match="tensor 't' holds NaN or infinite"):
                check_finite(file, "t", read_header(file, LIMITS)["t"])


@pytest.mark.parametrize("place", [0, (1 << 20) - 1, 1 << 20, 2_500_000 - 1])
def test_a_large_tensor_is_looked_through_to_its_end(place: int) -> None:
    values = np.zeros(2_500_000, np.float16)
    header = {"t": {"dtype": "F16", "shape": [2500, 1000], "data_offsets": [0, values.nbytes]}}
    values[place] = np.nan
    file = memoryview(container(header, values.tobytes()))
    with pytest.raises(InvalidArgument, match="NaN"):
        check_finite(file, "t", read_header(file, LIMITS)["t"])
