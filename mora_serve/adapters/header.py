"""The safetensors header, read without trusting it, and the check that values are finite.

A file is 8 bytes with the header's length (little endian), the header in JSON, the tensors.
What is accepted is what the safetensors library itself accepts, further limited to the types and
shapes that an adapter has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mora_serve.adapters.untrusted import load_json, quoted
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument

FIELD = "adapter_model.safetensors"

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_HEADER_BYTES_A_TENSOR = 512
_METADATA_BYTES = 64 << 10
_MAX_HEADER = 16 << 20
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_CHUNK = 1 << 20  # values checked at a time


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor inside a weights file: bytes ``start`` to ``end`` of the file, row-major.

    ``dtype`` is 'F32', 'F16' or 'BF16'. ``start`` need not be a multiple of the item's size.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(weights: memoryview, limits: AdaptersConfig) -> dict[str, TensorRef]:
    """The tensors of a safetensors file by their keys.

    Raises InvalidArgument unless the header fits the file, every tensor has a type that can be
    served and an extent that is its shape's, and the extents cover the data without a gap or an
    overlap.
    """
    header, data_start = _header(weights, limits)
    metadata = header.pop("__metadata__", None)
    if metadata is not None:
        _check_metadata(metadata)
    if not header:
        raise _invalid("the file holds no tensors", "train the adapter before it is saved")
    if len(header) > limits.max_tensors:
        raise _invalid(
            f"{len(header)} tensors are more than adapters.max_tensors ({limits.max_tensors})",
            "target fewer modules or raise adapters.max_tensors",
            "TOO_LARGE",
        )
    tensors = {key: _tensor(key, entry, data_start) for key, entry in header.items()}
    position = data_start
    for key, t in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if t.start != position:
            what = "overlaps the one before it" if t.start < position else "follows a gap"
            raise _invalid(f"the data of tensor {quoted(key)} {what}")
        position = t.end
    if position != len(weights):
        raise _invalid(
            f"the tensors end at byte {position}, the file at {len(weights)}",
            "the file may be cut off: copy it or save the adapter again",
        )
    return tensors


def check_finite(weights: memoryview, key: str, tensor: TensorRef) -> None:
    """Raise InvalidArgument if a value is NaN, infinite, or becomes so when rounded to bf16."""
    bits = np.frombuffer(
        weights[tensor.start : tensor.end], dtype="<u4" if tensor.dtype == "F32" else "<u2"
    )
    magnitude, least_bad = {
        "F32": (0x7FFFFFFF, 0x7F7F8000),
        "F16": (0x7FFF, 0x7C00),
        "BF16": (0x7FFF, 0x7F80),
    }[tensor.dtype]
    for start in range(0, len(bits), _CHUNK):
        if np.any(bits[start : start + _CHUNK] & magnitude >= least_bad):
            raise InvalidArgument(
                f"{FIELD}: tensor {quoted(key)} holds NaN or infinite values; the training "
                "diverged: register an earlier checkpoint",
                field=FIELD,
                reason="NOT_FINITE",
            )


def tensor_array(weights: memoryview, tensor: TensorRef) -> npt.NDArray[Any]:
    """The tensor without a copy, or with one where the file does not align it.

    float32, float16, or for BF16, which NumPy does not have, its bits as uint16.
    """
    dtype = np.dtype({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype])
    array = np.frombuffer(weights[tensor.start : tensor.end], dtype=dtype)
    return np.require(array, requirements="A").reshape(tensor.shape)


def _header(weights: memoryview, limits: AdaptersConfig) -> tuple[dict[str, Any], int]:
    if bytes(weights[:4]).startswith(_PICKLE_STARTS):
        raise _invalid(
            "this is a pickle file under another name, which can run code when it is opened",
            "save the adapter with safe_serialization=True",
            "PICKLE",
        )
    if len(weights) < 8:
        raise _invalid(f"{len(weights)} bytes are too few for a safetensors file")
    length = int.from_bytes(weights[:8], "little")
    most = min(_MAX_HEADER, _METADATA_BYTES + limits.max_tensors * _HEADER_BYTES_A_TENSOR)
    if length > min(most, len(weights) - 8):
        raise _invalid(
            f"a header of {length} bytes does not fit (the file has {len(weights)} bytes, "
            f"the header at most {most})"
        )
    # safetensors requires the brace, which also keeps white space from padding a header
    if length < 2 or weights[8] != ord("{"):
        raise _invalid("the header is not a JSON object")
    return load_json(weights[8 : 8 + length], FIELD, max_bytes=most), 8 + length


def _check_metadata(metadata: Any) -> None:
    """As safetensors has it, and no more of it than a trainer writes: nothing of it is used."""
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _invalid("__metadata__ is no object of strings")
    if sum(len(key) + len(value) for key, value in metadata.items()) > _METADATA_BYTES:
        raise _invalid(
            f"__metadata__ has more than {_METADATA_BYTES} characters",
            "save the adapter again without it",
            "TOO_LARGE",
        )


def _tensor(key: str, entry: Any, data_start: int) -> TensorRef:
    name = quoted(key)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _invalid(f"tensor {name} does not have just a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _invalid(
            f"tensor {name} has type {quoted(dtype)}; only F32, F16 and BF16 can be served",
            "convert the adapter, for example with model.to(torch.bfloat16), and save it again",
        )
    if _integers(shape) and 0 in shape:
        raise _invalid(
            f"tensor {name} has shape {quoted(shape)}, without any value",
            "the parts of a sharded model (DeepSpeed ZeRO-3, FSDP) were not gathered: save the "
            "adapter again with the full state",
        )
    if not _integers(shape) or not 1 <= len(shape) <= 2:
        raise _invalid(f"tensor {name} has shape {quoted(shape)}, not one or two positive sizes")
    if not _integers(offsets) or len(offsets) != 2:
        raise _invalid(f"tensor {name} has data_offsets {quoted(offsets)}, not two numbers")
    start, end = offsets
    if end - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise _invalid(
            f"tensor {name} spans {quoted(end - start)} bytes, "
            f"its shape and type need {quoted(math.prod(shape) * _ITEM_BYTES[dtype])}"
        )
    return TensorRef(dtype, tuple(shape), data_start + start, data_start + end)


def _integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def _invalid(
    why: str, remedy: str = "save the adapter again with safetensors", reason: str = "BAD_WEIGHTS"
) -> InvalidArgument:
    return InvalidArgument(f"{FIELD}: {why}; {remedy}", field=FIELD, reason=reason)
