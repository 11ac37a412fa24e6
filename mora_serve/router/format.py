"""The router's file: one safetensors file, its metadata in JSON under ``mora_router``.

Tensors: ``mean`` [D] F32 (of the features), ``scales`` [K] F32 and ``codes`` [K, D] I8 (whitening
and projection: a row of codes times its scale is a column of the projection), ``impostors`` [M, K]
F16 (fixed prompts that belong to no adapter, embedded). A file comes from outside: everything is
checked before it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mora_serve.adapters.untrusted import load_json, quoted
from mora_serve.errors import InvalidArgument
from mora_serve.router.features import Floats, NGrams, features_from
from mora_serve.router.int8 import Codes

MAX_BYTES = 64 << 20
MAX_HEADER = 1 << 20
MAX_DIMS = 1024
MAX_IMPOSTORS = 4096
FORMAT = 1

_METADATA_KEY = "mora_router"
_TENSORS: Mapping[str, tuple[str, npt.DTypeLike]] = {
    "mean": ("F32", "<f4"),
    "scales": ("F32", "<f4"),
    "codes": ("I8", "i1"),
    "impostors": ("F16", "<f2"),
}
_RANGES = {"mean": (0, 1), "scales": (0, 1e4), "codes": (-127, 127), "impostors": (-2, 2)}


@dataclass(frozen=True)
class Calibration:
    """What turns cosines into decisions, the same for every adapter.

    ``threshold``: a prompt whose best impostor-normed score is below it gets the base.
    ``gate_position`` and ``gate_width``: where between an impostor's score (0) and an own
    prompt's (1) the gate opens, and how softly. ``coherence``: the expected cosine of two
    prompts of one adapter, which stands for a new adapter's own until its prompts say better.
    """

    threshold: float
    gate_position: float
    gate_width: float
    coherence: float


@dataclass(frozen=True)
class RouterFile:
    """The content of a router's file; ``impostors`` in float32.

    ``fingerprint`` is the base's, empty for a router that fits any. ``known`` names the adapters
    that it was fitted on, ``report`` holds what the fit measured.
    """

    features: NGrams
    mean: Floats
    scales: Floats
    codes: Codes
    impostors: Floats
    calibration: Calibration
    fingerprint: str = ""
    known: tuple[str, ...] = ()
    report: Mapping[str, float] = field(default_factory=dict)

    @property
    def dims(self) -> int:
        """Length of an embedded prompt and of a key."""
        return len(self.scales)

    @functools.cached_property
    def projection(self) -> Floats:
        """[D, K]: (features - mean) @ projection, normalised, is an embedded prompt."""
        return np.ascontiguousarray((self.codes * self.scales[:, None]).T)

    def to_bytes(self) -> bytes:
        """The file; equal contents give equal bytes."""
        metadata = {
            "format": FORMAT,
            "features": self.features.describe(),
            "fingerprint": self.fingerprint,
            "calibration": dataclasses.asdict(self.calibration),
            "known": list(self.known),
            "report": dict(self.report),
        }
        header: dict[str, Any] = {"__metadata__": {_METADATA_KEY: json.dumps(metadata)}}
        body = b""
        for name, (dtype, np_dtype) in _TENSORS.items():
            tensor = getattr(self, name)
            data = np.ascontiguousarray(tensor, np_dtype).tobytes()
            extent = [len(body), len(body) + len(data)]
            header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": extent}
            body += data
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        return len(head).to_bytes(8, "little") + head + body


def read_router(data: bytes) -> tuple[RouterFile, str]:
    """The content and its digest (hex SHA-256 of the bytes).

    Raises InvalidArgument, naming the part at fault, for anything but a sound router file.
    """
    if len(data) > MAX_BYTES:
        raise _invalid("", f"{len(data)} bytes are more than the {MAX_BYTES} that are read")
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= size <= min(MAX_HEADER, len(data) - 8):
        raise _invalid("", "it is not a safetensors file")
    header = _json(data[8 : 8 + size], "header")
    outer = header.pop("__metadata__", None)
    text = outer.get(_METADATA_KEY) if isinstance(outer, dict) else None
    if not isinstance(text, str):
        raise _invalid("metadata", f"the safetensors metadata has no {_METADATA_KEY!r}")
    metadata = _json(text.encode("utf-8", "replace"), "metadata")
    if metadata.get("format") != FORMAT:
        raise _invalid(
            "format",
            f"{quoted(metadata.get('format'))} is not supported; this server reads {FORMAT}",
        )
    features = features_from(metadata.get("features"))
    tensors = _tensors(header, memoryview(data)[8 + size :], features.dim)
    return (
        RouterFile(
            features=features,
            **tensors,
            calibration=_calibration(metadata.get("calibration")),
            fingerprint=_string(metadata.get("fingerprint"), "fingerprint"),
            known=_strings(metadata.get("known"), "known"),
            report=_numbers(metadata.get("report"), "report"),
        ),
        hashlib.sha256(data).hexdigest(),
    )


def _tensors(header: Mapping[str, Any], body: memoryview, dim: int) -> dict[str, Any]:
    if set(header) != set(_TENSORS):
        raise _invalid("tensors", f"they have to be {', '.join(_TENSORS)}")
    dims = _shape(header["scales"], "scales", 1)[0]
    rows = _shape(header["impostors"], "impostors", 2)[0]
    if not 1 <= dims <= MAX_DIMS:
        raise _invalid("scales", f"{dims} are not between 1 and {MAX_DIMS}")
    if not 2 <= rows <= MAX_IMPOSTORS:
        raise _invalid("impostors", f"{rows} rows are not between 2 and {MAX_IMPOSTORS}")
    shapes = {"mean": (dim,), "scales": (dims,), "codes": (dims, dim), "impostors": (rows, dims)}
    out: dict[str, npt.NDArray[Any]] = {}
    start = 0
    for name, (dtype, np_dtype) in _TENSORS.items():
        entry, shape = header[name], shapes[name]
        if _shape(entry, name, len(shape)) != shape or entry.get("dtype") != dtype:
            raise _invalid(name, f"it has to be {dtype} of shape {list(shape)}")
        end = start + math.prod(shape) * np.dtype(np_dtype).itemsize
        if entry.get("data_offsets") != [start, end] or end > len(body):
            raise _invalid(name, f"its data have to be at bytes {start} to {end}")
        tensor = np.frombuffer(body[start:end], np_dtype).reshape(shape)
        out[name] = tensor.astype(np.int8 if name == "codes" else np.float32)
        low, high = _RANGES[name]
        if not ((out[name] >= low) & (out[name] <= high)).all():
            raise _invalid(name, f"a value is not between {low} and {high}")
        start = end
    if start != len(body):
        raise _invalid("tensors", f"{len(body) - start} bytes follow the last tensor")
    return out


def _shape(entry: Any, name: str, rank: int) -> tuple[int, ...]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or len(shape) != rank or any(type(n) is not int for n in shape):
        raise _invalid(name, f"its shape has to be {rank} integers")
    return tuple(shape)


def _calibration(value: Any) -> Calibration:
    numbers = _numbers(value, "calibration")
    names = [f.name for f in dataclasses.fields(Calibration)]
    if set(numbers) != set(names):
        raise _invalid("calibration", f"it has to hold {', '.join(names)}")
    calibration = Calibration(**numbers)
    if not 1e-6 <= calibration.gate_width <= 1e6:
        raise _invalid("calibration.gate_width", "it has to be between 1e-6 and 1e6")
    if not 0.0 < calibration.coherence < 1.0:
        raise _invalid("calibration.coherence", "it has to be between 0 and 1")
    for name in ("threshold", "gate_position"):
        if abs(numbers[name]) > 1e6:
            raise _invalid(f"calibration.{name}", "it has to be between -1e6 and 1e6")
    return calibration


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        return load_json(data, name, max_bytes=MAX_HEADER)
    except InvalidArgument:
        raise _invalid(name, "it is not a JSON object in UTF-8") from None


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
        raise _invalid(name, "it has to be a string of at most 256 printable characters")
    return value


def _strings(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > 10_000:
        raise _invalid(name, "it has to be a list of at most 10000 strings")
    return tuple(_string(item, name) for item in value)


def _numbers(value: Any, name: str) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > 256:
        raise _invalid(name, "it has to be an object of at most 256 numbers")
    for key, number in value.items():
        if type(number) not in (int, float) or not abs(number) <= 1e300:
            raise _invalid(f"{name}.{_string(key, name)}", "it has to be a finite number")
    return {key: float(number) for key, number in value.items()}


def _invalid(part: str, message: str) -> InvalidArgument:
    field = f"router.{part}" if part else "router"
    return InvalidArgument(
        f"{field}: {message}; fit the router again", field=field, reason="INVALID_ROUTER"
    )
