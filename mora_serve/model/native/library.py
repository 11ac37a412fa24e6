"""The compiled CPU path, through ctypes: its structures, and the library if there is one.

The structures mirror mora.h. Tensors are passed by address, so whoever fills a structure keeps
what it points to alive (see engine/native_forward.py).
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_size_t, c_void_p
from functools import cache

import torch
from torch import Tensor

LANES = 16  # outputs of one tile of a weight
DENSE, NF4, TILED, INT4 = 0, 1, 2, 3
FILE_TYPES = ("F32", "F16", "BF16")  # of an adapter's tensors, as C numbers them
CHUNK_FIELDS = 5  # int32 each
PHASES = (
    *("embedding", "qkv product", "heads", "attention", "o product", "o rows"),
    *("gate_up product", "swiglu", "down product", "down rows", "head product", "judgement"),
)

log = logging.getLogger(__name__)


class WeightStruct(Structure):
    """One part of a linear layer."""

    _fields_ = [
        ("kind", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("block", c_int32),
        ("span", c_int32),
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
    ]


class LinearStruct(Structure):
    """A linear layer: parts stacked along the output."""

    _fields_ = [
        ("parts", c_int32),
        ("weights", POINTER(WeightStruct)),
        ("bias", c_void_p),
        ("order", c_void_p),
    ]


class ProjectionStruct(Structure):
    """One projection of one layer in all adapter slots."""

    _fields_ = [
        ("start", c_int32),
        ("width", c_int32),
        ("a", c_void_p),
        ("b", c_void_p),
        ("dora", c_void_p),
    ]


class LayerStruct(Structure):
    """One layer of the decoder."""

    _fields_ = [
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("sites", LinearStruct * 4),
        ("projections", (ProjectionStruct * 3) * 4),
        ("keys", c_void_p),
        ("values", c_void_p),
    ]


class ModelStruct(Structure):
    """All that a step needs besides its batch."""

    _fields_ = [
        *((n, c_int32) for n in ("hidden", "intermediate", "layers", "heads", "kv_heads")),
        *((n, c_int32) for n in ("head_dim", "vocabulary", "max_context", "window")),
        ("eps", c_float),
        ("embedding", WeightStruct),
        *((n, c_void_p) for n in ("norm", "cos", "sin")),
        ("head", LinearStruct),
        ("layer", POINTER(LayerStruct)),
        *((n, c_int32) for n in ("pages", "page_size", "slots", "max_rank")),
        ("ranks", c_void_p),
        ("has_dora", c_void_p),
    ]


class StepStruct(Structure):
    """One batch; ``chunk`` points to int32 [chunks, 5]."""

    _fields_ = [
        *((n, c_int32) for n in ("chunks", "rows", "wanted")),
        *((n, c_void_p) for n in ("chunk", "tokens", "pages", "mixture_slot", "mixture_weight")),
        *((n, c_void_p) for n in ("wanted_rows", "logits", "best", "finite", "seconds")),
    ]


class PieceStruct(Structure):
    """A tensor of an adapter's file, and where it goes."""

    _fields_ = [
        ("source", c_void_p),
        ("to", c_void_p),
        *((n, c_int32) for n in ("type", "rows", "columns", "transposed", "bf16")),
        ("scale", c_float),
    ]


def layout() -> list[int]:
    """Sizes as ``mora_layout`` gives them; a library with others was built from other sources."""
    structs = (WeightStruct, LinearStruct, ProjectionStruct, LayerStruct, ModelStruct)
    sizes = [ctypes.sizeof(s) for s in structs]
    of_step = CHUNK_FIELDS * ctypes.sizeof(c_int32), ctypes.sizeof(StepStruct)
    return [*sizes, *of_step, ctypes.sizeof(PieceStruct), len(PHASES)]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it was not built, or its structures have other sizes."""
    spec = importlib.util.find_spec("mora_serve.model.native._mora")
    if spec is None or spec.origin is None:
        return None
    try:
        lib = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    if not _fits(lib):
        log.warning(
            "the compiled CPU path is of another version than this package, so torch computes; "
            "install mora-serve again to build it"
        )
        return None
    lib.mora_target.argtypes, lib.mora_target.restype = [c_int, c_int], c_char_p
    lib.mora_new.argtypes, lib.mora_new.restype = [c_char_p, c_int], c_void_p
    lib.mora_free.argtypes, lib.mora_free.restype = [c_void_p], None
    lib.mora_threads.argtypes, lib.mora_threads.restype = [c_void_p], c_int
    lib.mora_forward.argtypes = [c_void_p, POINTER(ModelStruct), POINTER(StepStruct)]
    lib.mora_forward.restype = c_int
    lib.mora_product.argtypes = [c_void_p, POINTER(LinearStruct), c_void_p, c_int, c_void_p]
    lib.mora_product.restype = None
    lib.mora_tile.argtypes = [c_void_p, c_int, c_int, c_void_p]
    lib.mora_tile.restype = None
    lib.mora_untile.argtypes = [POINTER(WeightStruct), c_int, c_int, c_void_p]
    lib.mora_untile.restype = None
    lib.mora_unpack.argtypes, lib.mora_unpack.restype = [POINTER(PieceStruct), c_int], None
    return lib


def _fits(lib: ctypes.CDLL) -> bool:
    try:
        lib.mora_layout.argtypes, lib.mora_layout.restype = [c_int], c_size_t
    except AttributeError:
        return False
    expected = layout()
    return [lib.mora_layout(i) for i in range(len(expected))] == expected


def targets(dtype: torch.dtype) -> list[str]:
    """The instruction sets that compute in ``dtype`` on this processor, best first."""
    lib = library()
    names: list[str] = []
    while lib is not None and (name := lib.mora_target(dtype.itemsize, len(names))) is not None:
        names.append(name.decode())
    return names


class Native:
    """A team of threads and its workspace, for one instruction set.

    ``product`` may be called by several threads: they wait for each other. ``forward`` may not.

    ``dtype`` is that of activations, keys and values, adapters and dense weights.
    """

    def __init__(self, dtype: torch.dtype, threads: int, target: str = "") -> None:
        """Raises ValueError when the library is missing or does not have such a target."""
        names, lib = targets(dtype), library()
        if lib is None or not names or target not in ("", *names):
            raise ValueError(f"target: no native path {target!r} for {dtype} on this processor")
        self.lib = lib
        self.dtype, self.target = dtype, target or names[0]
        self._handle = self.lib.mora_new(self.target.encode(), max(1, threads))
        if not self._handle:
            raise MemoryError("no memory for the native path")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.lib.mora_free(self._handle)

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return int(self.lib.mora_threads(self._handle))

    def product(self, linear: LinearStruct, x: Tensor, y: Tensor) -> None:
        """x [rows, in] in ``dtype`` times a layer's weight, into y [rows, out] float32."""
        self.lib.mora_product(
            self._handle, ctypes.byref(linear), x.data_ptr(), x.shape[0], y.data_ptr()
        )

    def forward(self, model: ModelStruct, step: StepStruct) -> None:
        """Run one step. Raises MemoryError."""
        if not self.lib.mora_forward(self._handle, ctypes.byref(model), ctypes.byref(step)):
            raise MemoryError("no memory for a step")


def array(struct: type[Structure], items: Sequence[Structure]) -> ctypes.Array[Structure]:
    """A C array of structures."""
    return (struct * len(items))(*items)
