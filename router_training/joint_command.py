"""``python -m router_training joint CONFIG.yaml``: from rows to adapters and a router to serve."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from mora_serve.adapters import card
from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.untrusted import check_name
from mora_serve.config import BaseConfig
from mora_serve.errors import InvalidArgument
from mora_serve.model.loading import Base, load_base
from router_training.batched import AdapterRecipe, Log
from router_training.demo.out_of_domain import out_of_domain
from router_training.discover import DiscoverRecipe, check_discoverable, discover
from router_training.discovered import UnlabelledRow
from router_training.joint import JointRecipe, train_jointly
from router_training.joint_study import Example, JointData
from router_training.output import unwritable, writable
from router_training.peft_files import load_peft, save_peft
from router_training.router import FitOptions, fit_router
from router_training.router_data import MIN_ADAPTERS, MIN_OUTSIDE, RouterData
from router_training.rows import TextRow, read_prompts, read_rows, token_row
from router_training.settings import check_bounds, check_unused
from router_training.sources import CardedAdapter, enough_to_learn, find_adapters, groups_of
from router_training.trainable import check_trainable

ROUTER_FILE, REPORT_FILE = "router.safetensors", "report.json"
CARD_PROMPTS = 16
MADE_OUTSIDE = 512  # prompts for no adapter, where none are given

_BOUNDS = MappingProxyType(
    {
        "pool": (0, 10_000),
        "rank": (1, 1024),
        "alpha": (1e-3, 1e5),
        "steps": (1, 10_000_000),
        "rows": (1, 100_000),
        "lr": (1e-7, 1.0),
        "mixed": (0.0, 1.0),
        "jitter": (0.0, 1.0),
        "wrong": (0.0, 1.0),
        "routed": (0.0, 1.0),
        "gates": (0.0, 1e3),
        "outliers": (0.0, 1e3),
        "held_out": (0.0, 0.5),
        "seed": (0, 2**32 - 1),
        "threads": (0, 1024),
    }
)
_ROUTER_TERMS = ("mixed", "jitter", "wrong", "routed", "gates", "outliers", "held_out")
_UNUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "labelled": ("adapters", "pool"),
        "finetune": ("pool", "rank", "alpha"),
        "unlabelled": ("adapters", *_ROUTER_TERMS),
    }
)
_DISCOVER_KEYS = MappingProxyType({"pool_size": "pool", "rows": "data", "adapters.steps": "steps"})


@dataclass(frozen=True)
class JointSettings:
    """What the file may say; see JointRecipe and AdapterRecipe for the numbers.

    ``data``: JSONL files of rows. ``mode``: ``labelled`` trains an adapter for every name in the
    rows, ``finetune`` goes on with the PEFT directories ``adapters`` (or ones that hold some),
    whose last parts are the names in the rows, and keeps what their cards say, ``unlabelled``
    finds ``pool`` tasks in rows that name none. ``outside``: text files of 64 or more prompts for
    no adapter, one a line; left out, some are made. ``out``: a new directory. A mode does not take
    the keys that it has no use for: ``finetune`` no ``rank`` and ``alpha``, which are the
    adapters' own, ``unlabelled`` none of the router's terms.
    """

    data: tuple[str, ...]
    out: str
    mode: Literal["labelled", "finetune", "unlabelled"] = "labelled"
    base: str = "demo"
    outside: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    pool: int = 0
    rank: int = 8
    alpha: float = 16.0
    steps: int = 200
    rows: int = 96
    lr: float = 4e-3
    layer_scales: bool = False
    mixed: float = 0.5
    jitter: float = 0.2
    wrong: float = 0.3
    routed: float = 0.25
    gates: float = 0.1
    outliers: float = 0.1
    held_out: float = 0.25
    seed: int = 0
    threads: int = 0

    def adapter_recipe(self) -> AdapterRecipe:
        """The adapters' own part of them."""
        return AdapterRecipe(
            rank=self.rank,
            alpha=self.alpha,
            steps=self.steps,
            rows=self.rows,
            lr=self.lr,
            layer_scales=self.layer_scales,
            seed=self.seed,
        )

    def recipe(self) -> JointRecipe:
        """The recipe of labelled training that they describe."""
        return JointRecipe(
            adapters=self.adapter_recipe(),
            mixed=self.mixed,
            jitter=self.jitter,
            wrong=self.wrong,
            routed=self.routed,
            gates=self.gates,
            outliers=self.outliers,
            held_out=self.held_out,
            router=FitOptions(seed=self.seed),
        )

    def check(self) -> None:
        """Raise InvalidArgument for a value out of range, or one that the mode does not take."""
        check_bounds(self, _BOUNDS)
        check_unused(self, _UNUSED[self.mode], f"mode {self.mode}")
        if self.mode == "finetune" and not self.adapters:
            raise _wrong("adapters", "mode finetune goes on with some; give directories")
        if self.mode == "unlabelled" and self.pool < MIN_ADAPTERS:
            raise _wrong(
                "pool",
                f"{self.pool} tasks to find are too few for a router; give {MIN_ADAPTERS} or more",
            )


def run(settings: JointSettings, log: Log) -> Path:
    """Train as the settings say; returns the directory that holds what was made.

    It gets ``adapters/NAME`` (PEFT directories with routing cards), the router's file and
    report.json. Raises InvalidArgument or ConfigError for what is wrong in settings or data.
    """
    settings.check()
    check_trainable(settings.base, "base")
    out = Path(settings.out)
    if out.is_dir() and any(out.iterdir()):
        raise _wrong("out", f"{out.name!r} is not empty; give a new directory")
    if settings.threads > 0:
        torch.set_num_threads(settings.threads)
    labelled = settings.mode != "unlabelled"
    rows = read_rows([Path(f) for f in settings.data], labelled=labelled)
    outside = _outside(settings)
    adapters = find_adapters([Path(place) for place in settings.adapters])
    base = load_base(BaseConfig(settings.base, dtype="fp32", device="cpu"))
    if labelled:
        _jointly(settings, rows, outside, adapters, base, log)
    else:
        _discovered(settings, rows, outside, base, log)
    return out


def _outside(settings: JointSettings) -> list[str]:
    if not settings.outside:
        rng = random.Random(f"joint/outside/{settings.seed}")
        return [out_of_domain(rng, "train") for _ in range(MADE_OUTSIDE)]
    given = read_prompts([Path(f) for f in settings.outside], "outside")
    if len(set(given)) < MIN_OUTSIDE:
        raise _wrong(
            "outside",
            f"{len(set(given))} distinct prompts are too few; give {MIN_OUTSIDE} or more, or "
            "leave it out: some are made then",
        )
    return given


def _jointly(
    settings: JointSettings,
    rows: Sequence[TextRow],
    outside: Sequence[str],
    given: Sequence[CardedAdapter],
    base: Base,
    log: Log,
) -> None:
    cards = {adapter.name: adapter.card for adapter in given}
    names = list(cards) or sorted({n for row in rows for n in row.adapters})
    start = load_peft(base.shape, [a.directory for a in given]) if given else None
    examples = _examples(base, rows, names)
    data = JointData(examples, names, outside, groups_of(given), base.fingerprint)
    data.routing()
    out = Path(settings.out)
    writable(out)
    log(f"data: {len(rows)} rows, {len(names)} adapters")
    joint = train_jointly(base.decoder, data, settings.recipe(), log, start=start)
    with _written(out):
        for i, name in enumerate(names):
            directory = out / "adapters" / name
            save_peft(joint.adapters, i, directory, base.name)
            own = sorted({e.prompt for e in examples if e.adapters == (i,)})
            some = random.Random(f"card/{name}").sample(own, min(CARD_PROMPTS, len(own)))
            routing = dataclasses.replace(
                cards.get(name, RoutingCard(tasks=(name,))),
                prompts=tuple(some),
                base_fingerprint=base.fingerprint,
                router_digest="",
            )
            (directory / card.FILE).write_bytes(routing.to_json() + b"\n")
        _report(out, joint.figures)
        (out / ROUTER_FILE).write_bytes(joint.router.to_bytes())


def _discovered(
    settings: JointSettings,
    rows: Sequence[TextRow],
    outside: Sequence[str],
    base: Base,
    log: Log,
) -> None:
    out = Path(settings.out)
    limit = base.shape.max_positions
    found_rows = [UnlabelledRow(token_row(base.tokenizer, r, limit), r.prompt) for r in rows]
    recipe = DiscoverRecipe(adapters=settings.adapter_recipe())
    try:
        check_discoverable(len(rows), settings.pool, recipe)
    except InvalidArgument as e:
        raise e.at(_DISCOVER_KEYS[e.field or ""]) from e
    writable(out)
    log(f"data: {len(rows)} rows, {settings.pool} tasks to find")
    found = discover(base.decoder, found_rows, settings.pool, recipe, log)
    counts = {name: int((found.assignment == i).sum()) for i, name in enumerate(found.names)}
    # What minutes of training gave stays, whether or not a router can be fitted on it.
    with _written(out):
        found.save(found_rows, out / "adapters", base.fingerprint, base.name)
        _report(out, {f"rows_{name}": count for name, count in counts.items()})
    labelled, few = enough_to_learn(RouterData.of(found.examples(found_rows), outside).labelled)
    for name, count in few.items():
        log(f"{name}: not in the router, {count} prompts that are surely its own are too few")
    data = RouterData(labelled, far=outside)
    if len(data.adapters) < MIN_ADAPTERS:
        raise _wrong(
            "data",
            f"{len(data.adapters)} of the tasks found have prompts enough for a router, which "
            f"takes {MIN_ADAPTERS}; the adapters are written, without one; give more rows",
        )
    router, _ = fit_router(data, base.fingerprint, FitOptions(seed=settings.seed))
    with _written(out):
        (out / ROUTER_FILE).write_bytes(router)


def _examples(base: Base, rows: Sequence[TextRow], names: Sequence[str]) -> list[Example]:
    index: Mapping[str, int] = {check_name(name, "data"): i for i, name in enumerate(names)}
    found = []
    for row in rows:
        for name in row.adapters:
            if name not in index:
                near = difflib.get_close_matches(name, names, 1) or names[:8]
                raise _wrong("data", f"{row.where} is for {name!r}; known are {', '.join(near)}")
        tokens = token_row(base.tokenizer, row, base.shape.max_positions)
        found.append(Example(row.prompt, tokens, tuple(sorted(index[n] for n in row.adapters))))
    return found


def _report(out: Path, figures: Mapping[str, float | bool]) -> None:
    (out / REPORT_FILE).write_text(json.dumps(dict(figures), indent=1) + "\n")


@contextlib.contextmanager
def _written(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        raise unwritable(e) from e


def _wrong(key: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{key}: {why}", field=key)
