"""What a registration would say of a directory, and what a user should know besides.

Uses the validator that registration uses, on this machine and without a server. Where no base is
named, every module of one projection has to have the same sizes, whichever these are.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mora_serve.adapters import files
from mora_serve.adapters.card import parse_card
from mora_serve.adapters.header import read_header
from mora_serve.adapters.tensor_keys import parse_key
from mora_serve.adapters.untrusted import load_json, quoted
from mora_serve.adapters.validate import ValidatedAdapter, read_directory
from mora_serve.config import AdaptersConfig
from mora_serve.errors import MoraError
from mora_serve.model.shape import PROJECTIONS, ModelShape, ProjectionSizes

_MAX_TOKENIZER_BYTES = 64 << 20
_READ = (files.CONFIG, files.WEIGHTS, files.CARD)


@dataclass(frozen=True)
class Report:
    """One directory. ``refusal`` is None where it would be registered.

    ``modules`` counts the layers of each projection; ``ranks``, ``scalings`` and ``dtypes`` are
    what occurs, in order; ``ignored`` are files that nothing reads. ``named_base`` is the base by
    the trainer's name for it, which decides nothing; ``base`` says how far the base was compared:
    'fingerprint', 'shapes' or 'not compared'.
    """

    directory: str
    refusal: Mapping[str, str] | None = None
    digest: str = ""
    kind: str = ""
    modules: Mapping[str, int] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    scalings: tuple[float, ...] = ()
    dtypes: tuple[str, ...] = ()
    size_bytes: int = 0
    parameters: int = 0
    named_base: str = ""
    base: str = "not compared"
    warnings: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {"servable": self.refusal is None, **dataclasses.asdict(self)}


def check_directory(
    directory: str | Path,
    limits: AdaptersConfig,
    shape: ModelShape | None = None,
    fingerprint: Callable[[], str] | None = None,
) -> Report:
    """Read a directory as a server with this base and these limits would.

    ``fingerprint`` is asked for the base's only where the adapter names one, for that takes the
    base's weights. Raises what it raises.
    """
    path = Path(directory)
    try:
        named = _named_base(path, limits)
        known = fingerprint() if named and fingerprint is not None else ""
        sizes = shape if shape is not None else _own_sizes(path, limits)
        adapter = read_directory(path, ".", sizes, limits, known)
    except MoraError as e:
        refusal = {"reason": e.reason, "field": e.field, "message": e.message}
        # As the hub's cache has them. A server opens no links; a client does.
        linked = e.reason == "INVALID_PATH" and (path / e.field).is_symlink()
        said = ("'adapters upload' follows the link, 'adapters register' does not",)
        return Report(str(directory), refusal, warnings=said * linked, ignored=_ignored(path))
    report = _describe(str(directory), path, adapter)
    compared = "fingerprint" if adapter.base_fingerprint else "shapes" if shape else "not compared"
    return dataclasses.replace(
        report, base=compared, warnings=tuple(_warnings(path, adapter, shape))
    )


def _describe(name: str, path: Path, adapter: ValidatedAdapter) -> Report:
    layers = Counter(m.projection for m in adapter.modules)
    tensors = [t for m in adapter.modules for t in (m.a, m.b, m.magnitude) if t is not None]
    kind = ("rs" if adapter.rslora else "") + ("DoRA" if adapter.dora else "LoRA")
    return Report(
        directory=name,
        digest=adapter.digest,
        kind=kind,
        modules={p: layers[p] for p in PROJECTIONS if p in layers},
        ranks=tuple(sorted({m.rank for m in adapter.modules})),
        scalings=tuple(sorted({m.scaling for m in adapter.modules})),
        dtypes=tuple(sorted({t.dtype for t in tensors})),
        size_bytes=adapter.nbytes,
        parameters=sum(math.prod(t.shape) for t in tensors),
        named_base=str(_json(path / files.CONFIG).get("base_model_name_or_path") or ""),
        ignored=_ignored(path),
    )


def _warnings(path: Path, adapter: ValidatedAdapter, shape: ModelShape | None) -> Iterator[str]:
    if shape is None:
        yield "no base was given, so the shapes were compared with each other only (--base)"
    elif adapter.base_fingerprint is None:
        yield (
            "it does not say which base it was trained on; the shapes fit, which another base's "
            "may too"
        )
    if adapter.card is None or not adapter.card.routable:
        yield "no example prompts, so the router will not pick it; it is reached by name or task"
    if not any(adapter.array(m.b).any() for m in adapter.modules):
        yield "every lora_B is zero: it was not trained, and changes nothing"
    if path.resolve().name in ("pissa_init", "pissa_backup"):
        yield (
            "LLaMA-Factory's step of a PiSSA conversion, whose configuration does not say that "
            "it needs a changed base; give the directory pissa_converted beside it"
        )
    settings = _json(path / "tokenizer_config.json")
    if "chat_template" in settings or (path / "chat_template.jinja").exists():
        yield "its chat template is not read: the server uses the base's"
    added = _highest_token(path, settings)
    if shape is not None and added >= shape.vocab_size:
        yield (
            f"its tokenizer has token {added}, the base's vocabulary ends at "
            f"{shape.vocab_size - 1}: prompts are encoded without the added tokens"
        )


def _named_base(path: Path, limits: AdaptersConfig) -> str:
    with files.open_directory(path, ".") as directory:
        card = files.read_file(directory, files.CARD, limits)
    return parse_card(card, limits).base_fingerprint if card is not None else ""


@dataclass(frozen=True)
class _OwnSizes:
    """A base that the first module of each projection would fit."""

    layers: int
    sizes: Mapping[str, tuple[int, int]]

    def projection(self, name: str) -> tuple[int, int]:
        return self.sizes[name]


def _own_sizes(path: Path, limits: AdaptersConfig) -> ProjectionSizes:
    with files.open_directory(path, ".") as directory:
        weights = files.read_file(directory, files.WEIGHTS, limits)
    if weights is None:  # the validator says why
        return _OwnSizes(0, {})
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    layers = 0
    for key, tensor in read_header(memoryview(weights), limits).items():
        place = parse_key(key)
        layers = max(layers, place.layer + 1)
        if place.part == "A":
            columns.setdefault(place.projection, tensor.shape[-1])
        elif place.part == "B":
            rows.setdefault(place.projection, tensor.shape[0])
    return _OwnSizes(layers, {p: (rows.get(p, 0), columns.get(p, 0)) for p in PROJECTIONS})


def _ignored(path: Path) -> tuple[str, ...]:
    with suppress(OSError):
        return tuple(sorted(quoted(n)[1:-1] for n in os.listdir(path) if n not in _READ))
    return ()


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON object beside the adapter, or nothing: none of it decides what is served."""
    with suppress(OSError, MoraError):
        if path.stat().st_size <= _MAX_TOKENIZER_BYTES:
            return load_json(path.read_bytes(), path.name, max_bytes=_MAX_TOKENIZER_BYTES)
    return {}


def _highest_token(path: Path, settings: Mapping[str, Any]) -> int:
    """The highest id that a tokenizer beside the adapter adds; -1 for none."""
    ids = list(_json(path / "added_tokens.json").values())
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        ids += [int(i) for i in decoder if i.isascii() and i.isdigit() and len(i) < 10]
    added = _json(path / "tokenizer.json").get("added_tokens")
    if isinstance(added, list):
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    return max((i for i in ids if type(i) is int), default=-1)
