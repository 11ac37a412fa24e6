"""``python -m router_training [CONFIG.yaml]``: from prompts to a router that a server can load."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mora_serve.errors import InvalidArgument, MoraError
from router_training.output import unwritable, writable

if TYPE_CHECKING:
    from router_training.configured import Fitted
    from router_training.demo.routing import RouterRecipe

NAME = "router"
ROUTER_FILE, REPORT_FILE = "router.safetensors", "report.json"
OUT = "router-out"
FRESH_PROMPTS = 16  # a task, to measure the demo's router with

EPILOG = """\
examples:
  python -m router_training                  the demo's router, from its own examples
  python -m router_training CONFIG.yaml      the router that the file describes
  python -m router_training router --help    the keys of such a file

Both write router.safetensors, for a running server's LoadRouter, and report.json.
"""

KEYS = """\
A file for adapters that have routing cards, and rows of prompts with their adapters or tasks
(mora-serve feedback export writes such rows):

  adapters: [./adapters]          # PEFT directories, or one that holds them
  prompts: [labelled.jsonl]       # {"prompt": "...", "adapters": ["..."]}, or "tasks"
  outside: [other.txt]            # 64 prompts or more that no adapter is for, one a line
  out: ./router-out

source: cards needs no prompts; source: unlabelled takes rows of "prompt" and "answer", and base:.
Other keys: near, base, features (auto, ngrams, hidden, both), depth, temperature, threshold, dims,
prototypes, key_prompts, folds, seed, threads. RouterSettings describes each.
"""


def add_to(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        NAME,
        help="train a router: the demo's, or the one that a YAML file describes (the default)",
        description="Train the demo's router, or the one that a YAML file describes.",
        epilog=KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "config", metavar="CONFIG.yaml", type=Path, nargs="?", help="none: the demo's router"
    )
    parser.add_argument("--out", type=Path, help=f"directory to write to (./{OUT})")
    parser.set_defaults(run=run)


def with_default(arguments: Sequence[str], commands: Mapping[str, Any]) -> list[str]:
    """The arguments with this command's name first, where they begin with no command's."""
    if arguments and (arguments[0] in commands or arguments[0] in ("-h", "--help")):
        return list(arguments)
    return [NAME, *arguments]


def run(args: argparse.Namespace) -> int:
    """Train, write and print a table; 2, with a line on stderr, for what the caller got wrong."""
    try:
        if args.config is None:
            out = args.out or Path(OUT)
            writable(out)
            fitted = train_demo(None)
        else:
            out, fitted = _configured(args.config, args.out)
        write(out, fitted)
    except MoraError as e:
        _log(e.message)
        return 2
    for name, value in table(fitted.summary):
        print(f"{name:<52} {value}")
    print(out / ROUTER_FILE)
    return 0


def _configured(config: Path, out: Path | None) -> tuple[Path, Fitted]:
    from router_training.configured import RouterSettings
    from router_training.configured import run as fit
    from router_training.settings import read_settings

    if not config.exists():
        raise InvalidArgument(
            f"{config.name}: there is neither a file nor a command of this name; --help shows both",
            field="config",
        )
    settings = read_settings(config, RouterSettings)
    out = out or Path(settings.out)
    writable(out)
    return out, fit(settings, _log)


def train_demo(recipe: RouterRecipe | None) -> Fitted:
    """Fit the demo's router as the bundle's is fitted, and measure it on fresh prompts.

    The adapters that are held out of the fit are registered with it by their cards alone.
    """
    from mora_serve.demo.bundle import bundle_path
    from mora_serve.router.router import Router
    from router_training.configured import Fitted
    from router_training.demo.evaluate import FRESH_SEED, routing_summary
    from router_training.demo.manifest import Manifest
    from router_training.demo.routing import RouterRecipe, demo_data
    from router_training.demo.suite import demo_suite
    from router_training.evaluation.routing import measure_routing
    from router_training.evaluation.scored import RouterScorer
    from router_training.router import fit_router
    from router_training.sources import find_adapters, groups_of

    bundle = bundle_path()
    manifest = Manifest.read(bundle)
    recipe = recipe or RouterRecipe()
    adapters = find_adapters([bundle / a.directory for a in manifest.adapters])
    known = [a.name for a in manifest.adapters if a.router == "known"]
    data = demo_data(recipe, known)
    _log(
        f"fitting on {len(data.labelled)} prompts for {len(known)} adapters and "
        f"{len(data.near) + len(data.far)} for none; this takes a few minutes"
    )
    file, report = fit_router(data, manifest.base_fingerprint, recipe.options)
    _log(f"measuring on fresh prompts, all {len(adapters)} adapters registered")
    router = RouterScorer(
        Router.load(file, manifest.base_fingerprint),
        {a.name: a.card.prompts for a in adapters},
        groups_of(adapters),
    )
    suite = demo_suite(FRESH_SEED, FRESH_PROMPTS)
    summary = {
        "source": "demo",
        "adapters": known,
        "registered_later": [a.name for a in adapters if a.name not in known],
        "prompts": {
            "alone": sum(map(len, data.singles().values())),
            "together": len(data.mixtures()),
            "near": len(data.near),
            "far": len(data.far),
        },
        "features": recipe.options.features.describe(),
        "base_fingerprint": manifest.base_fingerprint,
        "figures": report.numbers(),
        "fresh": routing_summary(measure_routing(suite, router, known)),
        "fresh_seed": FRESH_SEED,
    }
    return Fitted(file, report, summary)


def table(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the terminal shows of a summary: names and values."""
    figures, fresh = summary["figures"], summary.get("fresh", {})
    rows = [("adapters learnt from", str(len(summary["adapters"])))]
    rows += [(f"prompts: {name}", str(count)) for name, count in summary["prompts"].items()]
    if taught := summary.get("teacher"):
        rows.append(("rows that the teacher labelled", f"{taught['labelled']} of {taught['rows']}"))
    rows += [
        (f"adapters held out, top-1, features {kind}", f"{share:.3f}")
        for kind, share in summary.get("features_tried", {}).items()
    ]
    rows.append(("features", summary["features"]["kind"]))
    counts = sorted(int(k.removeprefix("held_out_")) for k in figures if k.startswith("held_out_"))
    rows += [
        (f"adapters held out, top-1, from {n} prompts", f"{figures[f'held_out_{n}']:.3f}")
        for n in counts
    ]
    names = {
        "known": "adapters learnt from, top-1, other wordings",
        "alone": "exactly the one adapter runs",
        "together": "exactly those several run",
        "abstained": "prompts of adapters that get the base",
        "auroc_near": "AUROC against prompts near to them",
        "auroc_far": "AUROC against prompts far from them",
        "calibration_error": "calibration error",
    }
    rows += [(label, f"{figures[key]:.3f}") for key, label in names.items() if key in figures]
    names = {
        "known_top1_trained_templates": "fresh prompts: adapters learnt from, top-1",
        "held_out_top1_trained_templates": "fresh prompts: adapters registered later, top-1",
        "pairs_exactly_trained_templates": "fresh prompts: exactly both of a pair run",
        "known_top1": "fresh prompts: new templates, top-1",
    }
    rows += [(label, f"{fresh[key]:.3f}") for key, label in names.items() if key in fresh]
    return rows


def write(out: Path, fitted: Fitted) -> None:
    """The router and its report, into ``out``. Raises InvalidArgument where it cannot be."""
    summary = {
        **fitted.summary,
        "router_digest": hashlib.sha256(fitted.data).hexdigest(),
        "router_bytes": len(fitted.data),
    }
    try:
        (out / ROUTER_FILE).write_bytes(fitted.data)
        (out / REPORT_FILE).write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    except OSError as e:
        raise unwritable(e) from e


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
