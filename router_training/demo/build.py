"""Make the demo bundle from seeds, stage by stage: base, adapters, router."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mora_serve.adapters import card
from mora_serve.adapters.card import RoutingCard
from mora_serve.config import BaseConfig
from mora_serve.model.loading import load_base
from router_training.batched import AdapterRecipe, Log
from router_training.demo.adapters import save_demo_adapters, train_demo_adapters
from router_training.demo.base import BaseRecipe, pretrain
from router_training.demo.manifest import BundledAdapter, Manifest
from router_training.demo.nf4 import save_nf4
from router_training.demo.routing import RouterRecipe, fit_demo_router
from router_training.demo.tasks import HELD_OUT, TASKS
from router_training.evaluation.held_out import CARD_PROMPTS


@dataclass(frozen=True)
class BuildOptions:
    """``resume`` keeps the stages whose artefacts ``out`` holds; otherwise ``out`` must be new."""

    out: Path
    seed: int = 0
    resume: bool = False
    base: BaseRecipe = field(default_factory=BaseRecipe)
    adapters: AdapterRecipe = field(default_factory=AdapterRecipe)
    router: RouterRecipe = field(default_factory=RouterRecipe)


def build(options: BuildOptions, log: Log) -> Manifest:
    """Make the bundle in ``options.out``; examples and CARD.md come when it is measured.

    Raises FileExistsError when the directory is there and ``resume`` is not set.
    """
    out = options.out
    if out.exists() and any(out.iterdir()) and not options.resume:
        raise FileExistsError(f"{out} is not empty; use --resume to go on, or another directory")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    _stage(out / "base", lambda d: _base(d, options, log), log)
    base = load_base(BaseConfig(str(out / "base"), dtype="fp32", device="cpu"))
    recipe = replace(options.adapters, seed=options.seed)
    _stage(
        out / "adapters",
        lambda d: save_demo_adapters(train_demo_adapters(base.decoder, recipe, log=log), d),
        log,
    )
    _stage(out / "router", lambda d: _router(base.fingerprint, options, d, log), log)
    for name, task in TASKS.items():
        prompts = tuple(prompt for prompt, _ in task.examples(options.seed, CARD_PROMPTS))
        routing = RoutingCard(task.description, (name,), task.group, prompts, base.fingerprint)
        (out / "adapters" / name / card.FILE).write_bytes(routing.to_json() + b"\n")
    manifest = Manifest(
        base="base",
        router="router",
        base_fingerprint=base.fingerprint,
        seed=options.seed,
        adapters=tuple(_entry(name) for name in TASKS),
    )
    manifest.write(out)
    return manifest


def _base(directory: Path, options: BuildOptions, log: Log) -> None:
    save_nf4(pretrain(replace(options.base, seed=options.seed), log), directory)


def _router(fingerprint: str, options: BuildOptions, directory: Path, log: Log) -> None:
    report = fit_demo_router(fingerprint, replace(options.router, seed=options.seed), directory)
    log(f"router: {report}")


def _entry(name: str) -> BundledAdapter:
    held_out = name in HELD_OUT
    return BundledAdapter(
        name=name,
        directory=f"adapters/{name}",
        tasks=(name,),
        group=TASKS[name].group,
        registered=not held_out,
        router="held-out" if held_out else "known",
    )


def _stage(directory: Path, make: Callable[[Path], None], log: Log) -> None:
    """Make a directory in one go: it is there only when all of it is."""
    if directory.exists():
        log(f"{directory.name}: kept")
        return
    start = time.monotonic()
    with _fresh(directory.with_name(f".{directory.name}.part")) as part:
        make(part)
        part.rename(directory)
    log(f"{directory.name}: made in {time.monotonic() - start:.0f} s")


@contextlib.contextmanager
def _fresh(directory: Path) -> Iterator[Path]:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
