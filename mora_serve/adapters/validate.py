"""An adapter's files from outside, checked until nothing about them has to be trusted.

The modules beside this one each check one layer: ``files`` where bytes come from, ``header`` the
safetensors container, ``peft_config`` the configuration, ``card`` the routing card. Here they
meet the base model's shape. Every byte is read once: what is checked is what is hashed, stored
and served.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mora_serve.adapters import absent, files
from mora_serve.adapters.card import RoutingCard, parse_card
from mora_serve.adapters.checksum import check_sum
from mora_serve.adapters.files import open_directory
from mora_serve.adapters.header import TensorRef, check_finite, read_header, tensor_array
from mora_serve.adapters.peft_config import LoraSettings, parse_config
from mora_serve.adapters.tensor_keys import parse_key, unfit
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument
from mora_serve.model.shape import PROJECTIONS, ProjectionSizes, projection_path

__all__ = [
    "LoraModule",
    "TensorRef",
    "ValidatedAdapter",
    "read_directory",
    "read_stored",
    "read_upload",
]

Buffer = bytes | bytearray | memoryview | mmap.mmap


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One projection of one layer: y += scaling * B (A x).

    ``a`` is (rank, columns in), ``b`` (rows out, rank), ``magnitude`` (rows out,), DoRA's m.
    """

    layer: int
    projection: str
    rank: int
    scaling: float
    a: TensorRef
    b: TensorRef
    magnitude: TensorRef | None


@dataclass(frozen=True, slots=True)
class ValidatedAdapter:
    """An adapter that fits the base.

    ``digest`` is the hex SHA-256 of the canonical configuration and the weights file; ``rank``
    the largest of its modules; ``nbytes`` the weights file's size; ``modules`` are sorted by
    (layer, projection). ``weights`` is the whole file: bytes, or a map of the registry's copy,
    which stays readable as long as this object lives. ``base_fingerprint`` is the base that the
    adapter names and was checked against, None where it names none ("unverified").
    """

    digest: str
    rank: int
    dora: bool
    rslora: bool
    nbytes: int
    modules: tuple[LoraModule, ...]
    config: bytes
    weights: memoryview
    base_fingerprint: str | None = None
    card: RoutingCard | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections that it changes, in the model's order."""
        present = {m.projection for m in self.modules}
        return tuple(p for p in PROJECTIONS if p in present)

    def array(self, tensor: TensorRef) -> npt.NDArray[Any]:
        """A tensor's values: float32, float16, or BF16's bits as uint16. Read-only."""
        return tensor_array(self.weights, tensor)


def read_directory(
    root: str | Path,
    path: str,
    shape: ProjectionSizes,
    limits: AdaptersConfig,
    fingerprint: str = "",
    *,
    sha256: str = "",
) -> ValidatedAdapter:
    """Read and check the PEFT directory ``path`` under ``root``.

    ``fingerprint`` is the base's, ``sha256`` what the sender says of the files. Holds
    the weights in memory once. Raises FailedPrecondition without a root, NotFound for a missing
    directory, InvalidArgument for what is not a servable adapter of this base.
    """
    with open_directory(root, path) as directory:
        config = files.read_file(directory, files.CONFIG, limits)
        card = files.read_file(directory, files.CARD, limits)
        weights = files.read_file(directory, files.WEIGHTS, limits)
        if weights is None:
            raise absent.missing(files.WEIGHTS, directory)
        if config is None:
            raise absent.missing(files.CONFIG, directory)
    return read_upload(config, weights, card, shape, limits, fingerprint, sha256=sha256)


def read_upload(
    config: bytes,
    weights: Buffer,
    card: bytes | None,
    shape: ProjectionSizes,
    limits: AdaptersConfig,
    fingerprint: str = "",
    *,
    sha256: str = "",
) -> ValidatedAdapter:
    """Check an adapter whose files are here as bytes, or as a map of a file nobody else writes.

    ``sha256`` is what the sender says of them (see ``checksum``), empty where nothing is said.

    Raises InvalidArgument for what is not a servable adapter of this base.
    """
    view = memoryview(weights).toreadonly()
    files.check_size(files.WEIGHTS, len(view), limits)
    if sha256:
        check_sum(sha256, (config, view, card))
    settings = parse_config(config)
    parsed_card = parse_card(card, limits) if card is not None else None
    base = _check_base(parsed_card.base_fingerprint if parsed_card else "", fingerprint)
    tensors = read_header(view, limits)
    modules = _modules(settings, tensors, shape, limits)
    for key, tensor in tensors.items():
        check_finite(view, key, tensor)
    canonical = settings.canonical({m.projection for m in modules})
    digest = content_digest(canonical)
    digest.update(view)
    return _adapter(digest.hexdigest(), settings, modules, canonical, view, base, parsed_card)


def content_digest(canonical: bytes) -> hashlib._Hash:
    """The sum that is an adapter's digest, before its weights."""
    digest = hashlib.sha256(b"mora-serve adapter 1\n%d\n" % len(canonical))
    digest.update(canonical)
    return digest


def read_stored(
    digest: str, config: bytes, weights: Buffer, shape: ProjectionSizes, limits: AdaptersConfig
) -> ValidatedAdapter:
    """An adapter of the registry: as ``read_upload``, without what its digest stands for.

    Raises InvalidArgument where it does not fit this base or these limits.
    """
    view = memoryview(weights).toreadonly()
    files.check_size(files.WEIGHTS, len(view), limits)
    settings = parse_config(config)
    modules = _modules(settings, read_header(view, limits), shape, limits)
    return _adapter(digest, settings, modules, config, view, None, None)


def _adapter(
    digest: str,
    settings: LoraSettings,
    modules: tuple[LoraModule, ...],
    config: bytes,
    weights: memoryview,
    base: str | None,
    card: RoutingCard | None,
) -> ValidatedAdapter:
    return ValidatedAdapter(
        digest=digest,
        rank=max(m.rank for m in modules),
        dora=settings.use_dora,
        rslora=settings.use_rslora,
        nbytes=len(weights),
        modules=modules,
        config=config,
        weights=weights,
        base_fingerprint=base,
        card=card,
    )


def _check_base(named: str, fingerprint: str) -> str | None:
    if not named or not fingerprint:
        return None
    if named == fingerprint:
        return named
    raise InvalidArgument(
        f"base_fingerprint: the adapter was trained on base {named}, this server runs "
        f"{fingerprint}; register it where its base runs",
        field="base_fingerprint",
        reason="WRONG_BASE",
    )


def _modules(
    settings: LoraSettings,
    tensors: Mapping[str, TensorRef],
    shape: ProjectionSizes,
    limits: AdaptersConfig,
) -> tuple[LoraModule, ...]:
    ranks, alphas = settings.ranks(), settings.alphas()
    modules = []
    for (layer, projection), parts in sorted(_by_module(tensors, shape).items()):
        path = projection_path(layer, projection)
        rank = _check_shapes(path, parts, shape.projection(projection), settings.use_dora)
        expected = ranks.get(path, settings.r)
        if rank != expected:
            raise unfit(
                path,
                f"its tensors have rank {rank}, {files.CONFIG} says {expected}",
                "save the adapter again so that both agree",
            )
        if rank > limits.max_rank:
            raise unfit(
                path,
                f"rank {rank} is above adapters.max_rank ({limits.max_rank})",
                "train with a smaller rank or raise adapters.max_rank",
                "RANK_TOO_LARGE",
            )
        scaling = settings.scaling(alphas.get(path, settings.lora_alpha), rank)
        modules.append(
            LoraModule(
                layer, projection, rank, scaling, parts["A"], parts["B"],
                parts.get("magnitude_vector"),
            )
        )  # fmt: skip
    return tuple(modules)


def _by_module(
    tensors: Mapping[str, TensorRef], shape: ProjectionSizes
) -> dict[tuple[int, str], dict[str, TensorRef]]:
    modules: dict[tuple[int, str], dict[str, TensorRef]] = {}
    for key, tensor in tensors.items():
        place = parse_key(key)
        if place.layer >= shape.layers:
            raise unfit(place.path, f"the base has only {shape.layers} layers", _TRAIN_ON_THIS_BASE)
        parts = modules.setdefault((place.layer, place.projection), {})
        if parts.setdefault(place.part, tensor) is not tensor:
            raise unfit(place.path, f"lora_{place.part} is there twice", "save the adapter again")
    return modules


def _check_shapes(
    path: str, parts: Mapping[str, TensorRef], size: tuple[int, int], dora: bool
) -> int:
    """The rank of a module whose tensors are complete and fit the projection."""
    needed = {"A", "B", "magnitude_vector"} if dora else {"A", "B"}
    missing = sorted(needed - parts.keys())
    if missing:
        raise unfit(path, f"lora_{missing[0]} is missing", "save the adapter again")
    if parts.keys() - needed:
        raise unfit(
            path,
            f"it has a DoRA magnitude, but {files.CONFIG} says use_dora false",
            "save the adapter again so that both agree",
        )
    rows, columns = size
    rank = parts["A"].shape[0]
    wanted = {"A": (rank, columns), "B": (rows, rank), "magnitude_vector": (rows,)}
    for part, tensor in sorted(parts.items()):
        if tensor.shape != wanted[part]:
            raise unfit(
                path,
                f"lora_{part} has shape {list(tensor.shape)}, this base needs {list(wanted[part])}",
                _TRAIN_ON_THIS_BASE,
            )
    return rank


_TRAIN_ON_THIS_BASE = "register an adapter that was trained on this base"
