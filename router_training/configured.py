"""A router fitted as a YAML file describes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from mora_serve.config import AdaptersConfig, BaseConfig
from mora_serve.errors import InvalidArgument
from mora_serve.model.loading import Base, load_base
from mora_serve.model.pooling import pooled_hidden
from mora_serve.router.arrays import Floats
from mora_serve.router.features import Features, NGrams, Pool, PooledHidden
from mora_serve.router.format import MAX_DIMS, MAX_PROTOTYPES
from router_training.peft_files import load_peft
from router_training.router import FitOptions, fit_router
from router_training.router_data import MIN_OUTSIDE, Labelled, RouterData
from router_training.router_report import FitReport
from router_training.rows import read_prompts, read_rows, token_row
from router_training.settings import check_bounds
from router_training.sources import (
    CardedAdapter,
    enough_to_learn,
    find_adapters,
    from_cards,
    groups_of,
    read_labelled,
)
from router_training.teacher import likelihood_gains, teach, temperature_of

Log = Callable[[str], None]

_BOUNDS = MappingProxyType(
    {
        "dims": (8, MAX_DIMS),
        "prototypes": (1, MAX_PROTOTYPES),
        "key_prompts": (1, AdaptersConfig.max_prompts),
        "folds": (2, 100),
        "seed": (0, 2**32 - 1),
        "threads": (0, 1024),
    }
)


@dataclass(frozen=True)
class RouterSettings:
    """What the file may say; paths are relative to the working directory.

    ``adapters``: PEFT directories, or ones that hold some. ``source``: ``labelled`` reads JSONL
    rows of prompts and their adapters or tasks from ``prompts``, and the prompts on the cards of
    ``adapters`` besides; ``cards`` reads these alone; ``unlabelled`` reads rows of prompts and
    answers, which the adapters' own likelihoods on ``base`` label (``temperature``, chosen when
    left out, and ``threshold``: see ``teacher``). ``outside``: text files of prompts for no
    adapter, one a line, about anything; ``near``: such prompts that are worded like the others.

    ``base``: a directory or hub id; the router is then for it alone. ``features``: ``auto`` takes
    what does best on adapters held out, of n-grams and, with a base, of its hidden state after
    ``depth`` layers (a quarter of them when left out) and both. See FitOptions for ``dims``,
    ``prototypes``, ``key_prompts``, ``folds`` and ``seed``.
    """

    adapters: tuple[str, ...] = ()
    source: Literal["labelled", "cards", "unlabelled"] = "labelled"
    prompts: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    base: str | None = None
    features: Literal["auto", "ngrams", "hidden", "both"] = "auto"
    depth: int | None = None
    temperature: float | None = None
    threshold: float = 0.5
    dims: int = FitOptions.dims
    prototypes: int = FitOptions.prototypes
    key_prompts: int = FitOptions.key_prompts
    folds: int = FitOptions.folds
    seed: int = 0
    threads: int = 0
    out: str = "router-out"

    def check(self) -> None:
        """Raise InvalidArgument for a value out of range, or for what the source does not fit."""
        if not self.outside:
            raise _wrong(
                "outside",
                f"it is missing; give text files of {MIN_OUTSIDE} or more prompts that no adapter "
                "is for, one a line: what your users ask for besides, from which the router "
                "learns to leave the base alone",
            )
        if bool(self.prompts) == (self.source == "cards"):
            what = "takes none" if self.prompts else "reads them from JSONL files"
            raise _wrong("prompts", f"the source {self.source!r} {what}")
        if not self.adapters and self.source != "labelled":
            raise _wrong("adapters", f"the source {self.source!r} needs them; give directories")
        if self.base is None and self.source == "unlabelled":
            raise _wrong("base", "the source 'unlabelled' needs the adapters' base; give it")
        if self.base is None and (self.features in ("hidden", "both") or self.depth is not None):
            raise _wrong("base", "hidden states are those of a base; give it, or features: ngrams")
        check_bounds(self, _BOUNDS)
        if not 0.0 < self.threshold <= 1.0:
            raise _wrong("threshold", f"{self.threshold} is not above 0 and at most 1")
        if self.temperature is not None and not 0.0 < self.temperature < float("inf"):
            raise _wrong("temperature", f"{self.temperature} is not above 0; give nats")


class Fitted(NamedTuple):
    """A router's file, the fit's report on it, and all that report.json holds."""

    data: bytes
    report: FitReport
    summary: dict[str, Any]


def run(settings: RouterSettings, log: Log) -> Fitted:
    """Gather the prompts and fit. Raises MoraError for what is wrong in settings or data."""
    settings.check()
    if settings.threads > 0:
        torch.set_num_threads(settings.threads)
    adapters = find_adapters([Path(place) for place in settings.adapters])
    base = None
    if settings.base is not None:
        log("base: loading")
        base = load_base(BaseConfig(settings.base, dtype="fp32", device="cpu"))
    far = read_prompts([Path(f) for f in settings.outside], "outside")
    near = read_prompts([Path(f) for f in settings.near], "near")
    if len(set(far)) < MIN_OUTSIDE:
        raise _wrong(
            "outside",
            f"{len(set(far))} distinct prompts of no adapter are too few; give {MIN_OUTSIDE} or "
            "more",
        )
    gathered = _gather(settings, adapters, base, log)
    labelled, few = enough_to_learn(gathered.labelled)
    for name, count in few.items():
        log(f"{name}: left out, {count} prompts of its own are too few; register it later")
    data = RouterData(labelled, near, far, groups_of(adapters))
    log(
        f"data: {len(labelled)} prompts for {len(data.adapters)} adapters, {len(near)} near, "
        f"{len(far)} far"
    )
    try:
        data.check()
    except InvalidArgument as e:
        key = "adapters" if settings.source == "cards" else "prompts"
        raise e if e.field == "outside" else e.at(key) from e
    chosen = _choose(settings, data, base, log)
    summary = {
        "source": settings.source,
        "adapters": list(data.adapters),
        "left_out": few,
        "prompts": {
            "alone": sum(map(len, data.singles().values())),
            "together": len(data.mixtures()),
            "near": len(set(near)),
            "far": len(set(far)),
        },
        "teacher": gathered.teacher,
        "features": chosen.features.describe(),
        "features_tried": chosen.tried,
        "base_fingerprint": base.fingerprint if base else "",
        "figures": chosen.report.numbers(),
    }
    return Fitted(chosen.data, chosen.report, summary)


class _Gathered(NamedTuple):
    labelled: list[Labelled]
    teacher: dict[str, float]


def _gather(
    settings: RouterSettings, adapters: Sequence[CardedAdapter], base: Base | None, log: Log
) -> _Gathered:
    files = [Path(f) for f in settings.prompts]
    if settings.source == "unlabelled" and base is not None:
        return _taught(settings, files, adapters, base, log)
    if settings.source == "cards":
        return _Gathered(from_cards(adapters, settings.seed), {})
    cards = [Labelled(p, (a.name,)) for a in adapters for p in a.card.prompts]
    return _Gathered(read_labelled(files, adapters, log) + cards, {})


def _taught(
    settings: RouterSettings,
    files: Sequence[Path],
    adapters: Sequence[CardedAdapter],
    base: Base,
    log: Log,
) -> _Gathered:
    rows = read_rows(files, "prompts", labelled=False)
    limit = base.shape.max_positions
    tokens = [token_row(base.tokenizer, row, limit, "prompts") for row in rows]
    stacked = load_peft(base.shape, [adapter.directory for adapter in adapters])
    gains = likelihood_gains(base.decoder, stacked, tokens, log)
    temperature = settings.temperature or temperature_of(gains)
    names = [adapter.name for adapter in adapters]
    labels = teach(gains, names, temperature, settings.threshold)
    labelled = [Labelled(r.prompt, own) for r, own in zip(rows, labels, strict=True) if own]
    log(f"teacher: {len(labelled)} of {len(rows)} rows got a label, T {temperature:.3g} nats")
    figures = {"rows": len(rows), "labelled": len(labelled), "temperature": temperature}
    return _Gathered(labelled, figures)


class _Chosen(NamedTuple):
    features: Features
    data: bytes
    report: FitReport
    tried: dict[str, float]


def _choose(settings: RouterSettings, data: RouterData, base: Base | None, log: Log) -> _Chosen:
    """Fit on each kind of features that the settings allow; the best on adapters held out."""
    kinds, pool = _features(settings, base)
    tried: dict[str, float] = {}
    best: _Chosen | None = None
    for kind, features in kinds.items():
        log(f"fitting on {kind}")
        options = FitOptions(
            features=features,
            dims=min(settings.dims, features.dim),
            prototypes=settings.prototypes,
            key_prompts=settings.key_prompts,
            folds=settings.folds,
            seed=settings.seed,
        )
        file, report = fit_router(data, base.fingerprint if base else "", options, pool)
        tried[kind] = float(np.mean(list(report.held_out.values())))
        log(f"{kind}: {tried[kind]:.3f} of the prompts of adapters held out")
        if best is None or tried[kind] > tried[best.features.kind]:
            best = _Chosen(features, file, report, tried)
    if best is None:
        raise _wrong("features", "there are none to fit on")
    return best


def _features(
    settings: RouterSettings, base: Base | None
) -> tuple[Mapping[str, Features], Pool | None]:
    """The kinds to fit on, cheapest first, and what gives their hidden states."""
    ngrams = NGrams()
    if base is None or settings.features == "ngrams":
        return {"ngrams": Features(ngrams)}, None
    layers = base.shape.layers
    depth = max(1, layers // 4) if settings.depth is None else settings.depth
    if not 0 <= depth <= layers:
        raise _wrong("depth", f"{depth} is not between 0 and {layers}, the base's layers")
    most = min(PooledHidden.max_tokens, base.shape.max_positions)
    hidden = PooledHidden(depth, base.shape.hidden_size, most)
    kinds = {
        "ngrams": Features(ngrams),
        "both": Features(ngrams, hidden),
        "hidden": Features(None, hidden),
    }
    if settings.features != "auto":
        kinds = {settings.features: kinds[settings.features]}
    return kinds, _Pooled(base, hidden)


@dataclass
class _Pooled:
    """Hidden states of texts, each computed once however many fits ask for it."""

    base: Base
    hidden: PooledHidden
    known: dict[str, Floats] = field(default_factory=dict)

    def __call__(self, texts: Sequence[str]) -> Floats:
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        states = pooled_hidden(
            self.base.decoder, self.base.tokenizer, new, self.hidden.depth, self.hidden.max_tokens
        )
        self.known |= dict(zip(new, states, strict=True))
        return np.stack([self.known[text] for text in texts])


def _wrong(key: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{key}: {why}", field=key)
