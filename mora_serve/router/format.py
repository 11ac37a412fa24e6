"""The router's file: one safetensors file, its metadata in JSON under ``mora_router``.

Tensors: ``mean`` [D] F32 (of the features), ``scales`` [K] F32 and ``codes`` [K, D] I8 (whitening
and projection: a row of codes times its scale is a column of the projection). A file comes from
outside: everything is checked before it is used.
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
from mora_serve.router.arrays import Codes, Floats
from mora_serve.router.features import Features, features_from

MAX_BYTES = 64 << 20
MAX_HEADER = 1 << 20
MAX_DIMS = 1024
MAX_PROTOTYPES = 16
FORMAT = 2

FIRST_INPUTS, FURTHER_INPUTS = 1, 2  # of the gates, see mora_serve.router.evidence

_METADATA_KEY = "mora_router"
_TENSORS: Mapping[str, tuple[str, npt.DTypeLike]] = {
    "mean": ("F32", "<f4"),
    "scales": ("F32", "<f4"),
    "codes": ("I8", "i1"),
}
_RANGES = {"scales": (0, 1e4), "codes": (-127, 127)}


@dataclass(frozen=True)
class Gate:
    """A logistic gate: its probability is σ(weights · inputs + bias)."""

    weights: tuple[float, ...]
    bias: float


@dataclass(frozen=True)
class Calibration:
    """What turns cosines into decisions, the same for every adapter.

    ``blend``: how much of a candidate's score is the cosine with its nearest prototype, the rest
    being that with its centre. ``first``: the gate of the best candidate, ``further``: that of
    the others (their inputs: ``mora_serve.router.evidence``). ``threshold``: where the best one's
    probability is below it, the base answers.
    """

    threshold: float
    blend: float
    first: Gate
    further: Gate


@dataclass(frozen=True)
class RouterFile:
    """The content of a router's file.

    ``prototypes`` is how many a key has at most. ``fingerprint`` is the base's, empty for a
    router that fits any. ``known`` names the adapters that it was fitted on, ``report`` holds
    what the fit measured.
    """

    features: Features
    mean: Floats
    scales: Floats
    codes: Codes
    calibration: Calibration
    prototypes: int = 8
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
            "prototypes": self.prototypes,
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
    tensors = _tensors(header, memoryview(data)[8 + size :], features)
    return (
        RouterFile(
            features=features,
            **tensors,
            calibration=_calibration(metadata.get("calibration")),
            prototypes=_prototypes(metadata.get("prototypes")),
            fingerprint=_string(metadata.get("fingerprint"), "fingerprint"),
            known=_strings(metadata.get("known"), "known"),
            report=_numbers(metadata.get("report"), "report"),
        ),
        hashlib.sha256(data).hexdigest(),
    )


def _tensors(header: Mapping[str, Any], body: memoryview, features: Features) -> dict[str, Any]:
    if set(header) != set(_TENSORS):
        raise _invalid("tensors", f"they have to be {', '.join(_TENSORS)}")
    dims = _shape(header["scales"], "scales", 1)[0]
    if not 1 <= dims <= MAX_DIMS:
        raise _invalid("scales", f"{dims} are not between 1 and {MAX_DIMS}")
    shapes = {
        "mean": (features.dim,),
        "scales": (dims,),
        "codes": (dims, features.dim),
    }
    ranges = {"mean": features.bounds, **_RANGES}
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
        low, high = ranges[name]
        if not ((out[name] >= low) & (out[name] <= high)).all():
            raise _invalid(name, f"a value is not between {low:g} and {high:g}")
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
    names = [f.name for f in dataclasses.fields(Calibration)]
    if not isinstance(value, dict) or set(value) != set(names):
        raise _invalid("calibration", f"it has to be an object of {', '.join(names)}")
    shares = _numbers({k: value[k] for k in ("threshold", "blend")}, "calibration")
    for name, number in shares.items():
        if not 0.0 <= number <= 1.0:
            raise _invalid(f"calibration.{name}", "it has to be between 0 and 1")
    first, further = (
        _gate(value[name], f"calibration.{name}", inputs)
        for name, inputs in (("first", FIRST_INPUTS), ("further", FURTHER_INPUTS))
    )
    return Calibration(**shares, first=first, further=further)


def _gate(value: Any, name: str, inputs: int) -> Gate:
    if not isinstance(value, dict) or set(value) != {"weights", "bias"}:
        raise _invalid(name, "it has to be an object of weights, bias")
    weights = value["weights"]
    if not isinstance(weights, list) or len(weights) != inputs:
        raise _invalid(f"{name}.weights", f"it has to be a list of {inputs} numbers")
    named = {f"weights[{i}]": w for i, w in enumerate(weights)} | {"bias": value["bias"]}
    for key, number in _numbers(named, name).items():
        if abs(number) > 1e6:
            raise _invalid(f"{name}.{key}", "it has to be between -1e6 and 1e6")
    return Gate(tuple(float(w) for w in weights), float(value["bias"]))


def _prototypes(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_PROTOTYPES:
        raise _invalid("prototypes", f"it has to be an integer from 1 to {MAX_PROTOTYPES}")
    return value


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
