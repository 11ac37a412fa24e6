"""``python -m router_training joint CONFIG.yaml``: from rows to adapters and a router to serve."""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mora_serve.adapters import card
from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.untrusted import check_name
from mora_serve.config import BaseConfig
from mora_serve.errors import InvalidArgument
from mora_serve.model.loading import Base, load_base
from mora_serve.router.format import RouterFile, read_router
from router_training.batched import AdapterRecipe, Log, load_peft, save_peft
from router_training.demo.out_of_domain import out_of_domain
from router_training.discover import DiscoverRecipe, discover
from router_training.discovered import UnlabelledRow
from router_training.joint import Example, JointRecipe, train_jointly
from router_training.joint_router import calibrated
from router_training.router import FitOptions, fit_router
from router_training.router_data import Labelled, RouterData
from router_training.rows import TextRow, read_prompts, read_rows, token_row

ROUTER_FILE, REPORT_FILE = "router.safetensors", "report.json"
CARD_PROMPTS = 16
MADE_OUTSIDE = 512  # prompts for no adapter, where none are given


@dataclass(frozen=True)
class JointSettings:
    """What the file may say; see JointRecipe and AdapterRecipe for the numbers.

    ``data``: JSONL files of rows. ``mode``: ``labelled`` trains an adapter for every name in the
    rows, ``finetune`` goes on with the PEFT directories ``adapters``, whose last parts are the
    names in the rows, ``unlabelled`` finds ``pool`` tasks in rows that name none. ``outside``:
    text files of prompts for no adapter, one a line; left out, some are made. ``out``: a new
    directory.
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
        )

    def check(self) -> None:
        """Raise InvalidArgument for a value out of range, or one that the mode does not take."""
        for name in ("rank", "steps", "rows"):
            if getattr(self, name) < 1:
                raise _wrong(name, f"{getattr(self, name)} is too few; give 1 or more")
        for name in ("mixed", "jitter", "wrong", "routed", "held_out"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise _wrong(name, f"{getattr(self, name)} is not between 0 and 1")
        for name in ("gates", "outliers"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise _wrong(name, f"{getattr(self, name)} is negative; give 0 or more")
        if not 0.0 < self.lr < 1.0:
            raise _wrong("lr", f"{self.lr} is not between 0 and 1")
        if bool(self.adapters) != (self.mode == "finetune"):
            raise _wrong("adapters", "give directories to mode finetune, and to no other")
        if (self.pool > 0) != (self.mode == "unlabelled"):
            raise _wrong("pool", "give the number of tasks to mode unlabelled, and to no other")


def run(settings: JointSettings, log: Log) -> Path:
    """Train as the settings say; returns the directory that holds what was made.

    It gets ``adapters/NAME`` (PEFT directories with routing cards), the router's file and
    report.json. Raises InvalidArgument or ConfigError for what is wrong in settings or data.
    """
    settings.check()
    out = Path(settings.out)
    if out.exists() and any(out.iterdir()):
        raise _wrong("out", f"{out.name!r} is not empty; give a new directory")
    if settings.threads > 0:
        torch.set_num_threads(settings.threads)
    labelled = settings.mode != "unlabelled"
    rows = read_rows([Path(f) for f in settings.data], labelled=labelled)
    outside = read_prompts([Path(f) for f in settings.outside]) or _made_outside(settings.seed)
    base = load_base(BaseConfig(settings.base, dtype="fp32", device="cpu"))
    if labelled:
        _jointly(settings, rows, outside, base, out, log)
    else:
        _discovered(settings, rows, outside, base, out, log)
    return out


def _jointly(
    settings: JointSettings,
    rows: Sequence[TextRow],
    outside: Sequence[str],
    base: Base,
    out: Path,
    log: Log,
) -> None:
    directories = [Path(d) for d in settings.adapters]
    names = [d.name for d in directories] or sorted({n for row in rows for n in row.adapters})
    start = load_peft(base.shape, directories) if directories else None
    examples = list(_examples(base, rows, names))
    log(f"data: {len(rows)} rows, {len(names)} adapters")
    prompts: dict[str, list[str]] = {}
    for row in rows:
        if len(row.adapters) == 1:
            prompts.setdefault(row.adapters[0], []).append(row.prompt)
    data = RouterData([Labelled(row.prompt, row.adapters) for row in rows], far=outside)
    options = FitOptions(seed=settings.seed)
    router = read_router(fit_router(data, base.fingerprint, options)[0])[0]
    joint = train_jointly(
        base.decoder, examples, outside, router, settings.recipe(), log, start=start
    )
    for i, name in enumerate(names):
        directory = out / "adapters" / name
        save_peft(joint.adapters, i, directory, base.name)
        own = sorted(set(prompts[name]))
        some = random.Random(f"card/{name}").sample(own, min(CARD_PROMPTS, len(own)))
        routing = RoutingCard("", (name,), "", tuple(some), base.fingerprint)
        (directory / card.FILE).write_bytes(routing.to_json() + b"\n")
    router = joint.router
    if joint.figures["kept"]:
        router = calibrated(router, data, [names[i] for i in joint.held_out], options)
    _write(out, router, joint.figures)


def _discovered(
    settings: JointSettings,
    rows: Sequence[TextRow],
    outside: Sequence[str],
    base: Base,
    out: Path,
    log: Log,
) -> None:
    limit = base.shape.max_positions
    found_rows = [UnlabelledRow(token_row(base.tokenizer, r, limit), r.prompt) for r in rows]
    log(f"data: {len(rows)} rows, {settings.pool} tasks to find")
    recipe = DiscoverRecipe(adapters=settings.adapter_recipe())
    found = discover(base.decoder, found_rows, settings.pool, recipe, log)
    data = RouterData.of(found.examples(found_rows), outside)
    router, _ = fit_router(data, base.fingerprint, FitOptions(seed=settings.seed))
    found.save(found_rows, out / "adapters", base.fingerprint, base.name)
    counts = {name: int((found.assignment == i).sum()) for i, name in enumerate(found.names)}
    _write(out, read_router(router)[0], {f"rows_{name}": count for name, count in counts.items()})


def _examples(base: Base, rows: Sequence[TextRow], names: Sequence[str]) -> list[Example]:
    index: Mapping[str, int] = {check_name(name, "adapters"): i for i, name in enumerate(names)}
    found = []
    for row in rows:
        for name in row.adapters:
            if name not in index:
                near = difflib.get_close_matches(name, names, 1) or names[:8]
                raise _wrong("data", f"a row is for {name!r}; known are {', '.join(near)}")
        tokens = token_row(base.tokenizer, row, base.shape.max_positions)
        found.append(Example(row.prompt, tokens, tuple(sorted(index[n] for n in row.adapters))))
    return found


def _made_outside(seed: int) -> list[str]:
    rng = random.Random(f"joint/outside/{seed}")
    return [out_of_domain(rng, "train") for _ in range(MADE_OUTSIDE)]


def _write(out: Path, router: RouterFile, figures: Mapping[str, float | bool]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / ROUTER_FILE).write_bytes(router.to_bytes())
    (out / REPORT_FILE).write_text(json.dumps(dict(figures), indent=1) + "\n")


def _wrong(key: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{key}: {why}", field=key)
