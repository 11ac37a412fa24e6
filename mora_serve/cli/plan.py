"""``mora-serve plan``: whether a card would hold a base, its adapters and their requests."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from typing import Any

from mora_serve.cli.output import binary, paint, print_json, table
from mora_serve.config import DEFAULT_SLOTS, EngineConfig
from mora_serve.errors import ConfigError
from mora_serve.model.footprint import CARDS, card_bytes
from mora_serve.model.known import KNOWN, find_shape
from mora_serve.model.shape import PROJECTIONS, ModelShape
from mora_serve.plan import ServingPlan, Wanted, fewest_changes, plan

EPILOG = f"""\
examples:
  mora-serve plan llama-3.1-8b --card-gb 24 --slots 32 --rank 16 --context 8192
  mora-serve plan ./my-base --card h100 --quantization none --requests 64
  mora-serve plan demo --cpu --card-gb 2 --json

Everything is calculated from the base's shape, nothing is measured or loaded. Exit status 1 where
it does not fit. Names that need no files:
{textwrap.fill(", ".join(KNOWN), 90, break_on_hyphens=False)}
"""


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "plan",
        help="calculate what a card would hold",
        description="Calculate whether a card holds a base, adapter slots and requests.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "base", metavar="BASE", help="a known name, a directory with a config.json, or a hub id"
    )
    parser.add_argument(
        "--card-gb",
        "--card",
        required=True,
        metavar="N",
        help=f"the card's memory in GiB, or one of {', '.join(CARDS)}",
    )
    parser.add_argument(
        "--quantization",
        choices=("nf4", "gptq", "none"),
        default="nf4",
        help="(nf4); gptq is here to compare sizes with, 4 bits in groups of 128",
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="(bf16)")

    def count(name: str, default: int, text: str) -> None:
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{text} ({default})"
        )

    count("--slots", DEFAULT_SLOTS, "adapters on the card at the same time, adapters.slots")
    count("--rank", 16, "the slots' rank, adapters.max_rank")
    count("--context", 8192, "tokens of a request, prompt and answer")
    count("--requests", 1, "requests of that length that are to run at the same time")
    count("--max-batch", EngineConfig.max_batch, "the most requests of any length")
    count("--page-size", EngineConfig.page_size, "tokens a page")
    parser.add_argument(
        "--targets",
        default="all",
        metavar="NAMES",
        help="projections that an adapter changes, with commas: its own size; a slot has all (all)",
    )
    parser.add_argument(
        "--adapter-dtype",
        choices=("auto", "int8"),
        default="auto",
        help="how slots keep adapters, adapters.dtype (auto)",
    )
    parser.add_argument(
        "--dora", action="store_true", help="with DoRA adapters; a card keeps room for them anyway"
    )
    parser.add_argument("--cpu", action="store_true", help="the memory of a machine, without CUDA")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan; 1 where it does not fit."""
    shape = find_shape(args.base)
    wanted = Wanted(
        card=card_bytes(args.card_gb),
        quantization=args.quantization,
        itemsize={"bf16": 2, "fp32": 4}[args.dtype],
        slots=args.slots,
        rank=args.rank,
        dora=args.dora,
        adapter_dtype=args.adapter_dtype,
        context=args.context,
        requests=args.requests,
        max_batch=args.max_batch,
        page_size=args.page_size,
        cuda=not args.cpu,
    )
    adapter = shape.adapter_parameters(args.rank, _targets(args.targets)) * 2
    found = plan(shape, wanted)
    change = None if found.fits else fewest_changes(shape, wanted)
    if args.json:
        print_json(
            {
                **dataclasses.asdict(found),
                "calculated": True,
                "fits": found.fits,
                "adapter_bytes": adapter,
                "parameters": shape.parameters,
                "settings": _settings(found, wanted),
                "change": change[0] if change else None,
            }
        )
        return 0 if found.fits else 1
    rows = [(name, binary(size)) for name, size in found.parts.items()]
    rows.append(("left for keys and values", binary(found.kv_bytes)))
    rows.append((f"the {'machine' if args.cpu else 'card'}", binary(found.card)))
    print(table(("calculated, not measured", ""), rows, right=(1,)))
    print()
    _say(shape, found, adapter, args)
    if found.fits:
        print("settings: " + " ".join(f"--{k}={v}" for k, v in _settings(found, wanted).items()))
    elif change:
        print(f"with {change[0]} it fits")
    else:
        print("no fewer slots, shorter context or fewer requests make it fit: a larger card does")
    return 0 if found.fits else 1


def _say(shape: ModelShape, found: ServingPlan, adapter: int, args: argparse.Namespace) -> None:
    verdict = paint("fits", "green") if found.fits else paint("does not fit", "red")
    print(
        f"{args.base}, {shape.parameters / 1e9:.2f} billion parameters, {args.slots} slots of rank "
        f"{args.rank}, {found.requests} requests of {found.context} tokens: it {verdict}"
    )
    print(
        f"{found.pages} pages, {found.tokens} tokens: {found.concurrent} requests of "
        f"{found.context} tokens at the same time"
    )
    print(f"an adapter of rank {args.rank} on {args.targets}: {binary(adapter)} in 16 bits")


def _settings(found: ServingPlan, wanted: Wanted) -> dict[str, int | str]:
    """The server's settings that make it so."""
    settings: dict[str, int | str] = {
        "adapters.slots": wanted.slots,
        "adapters.max_rank": wanted.rank,
        "engine.max_context": found.context,
        "engine.max_batch": wanted.max_batch,
        "engine.page_size": wanted.page_size,
        "engine.kv_bytes": max(0, found.pages * found.page_bytes),
    }
    if wanted.adapter_dtype != "auto":
        settings["adapters.dtype"] = wanted.adapter_dtype
        if not wanted.cuda:  # the compiled path does not take them
            settings["engine.kernels"] = "torch"
    return settings


def _targets(text: str) -> tuple[str, ...]:
    names = PROJECTIONS if text == "all" else tuple(text.split(","))
    unknown = [n for n in names if n not in PROJECTIONS]
    if unknown:
        raise ConfigError(
            f"--targets: {unknown[0]!r} is none of {', '.join(PROJECTIONS)}; give some of them, "
            "with commas, or all"
        )
    return names
