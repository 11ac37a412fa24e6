"""What ``generate`` and ``route`` share: the prompt, and who may answer."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from mora_serve.cli.output import paint, visible
from mora_serve.errors import ConfigError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from mora_serve.client.requests import RouteOptions
    from mora_serve.core import Decision


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which adapters answer."""
    group = parser.add_argument_group("who answers", "one of these; without any, the router picks")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME[=WEIGHT]",
        type=_adapter,
        help="this adapter, weight 1 when not given; repeat it for a mixture",
    )
    choice.add_argument(
        "--task", action="append", default=[], help="an adapter of this task; repeat to compose"
    )
    choice.add_argument("--base", action="store_true", help="the base model without adapters")
    group.add_argument(
        "--fallback-to-router",
        action="store_true",
        help="with --task: where a task is unknown, let the router pick",
    )
    group.add_argument(
        "--candidate",
        action="append",
        default=[],
        metavar="NAME",
        help="let the router pick from these only (repeat)",
    )
    group.add_argument(
        "--max-adapters", type=_count, default=0, metavar="N", help="the most the router may mix"
    )


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt of the command line; ``-`` reads standard input. Raises ConfigError."""
    text: str = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not text:
        raise ConfigError("prompt: it is empty; give some text, or - to read standard input")
    return text


def describe(decision: Decision) -> str:
    """Who answers and who chose it, in words."""
    names = ", ".join(
        visible(a.adapter) if a.weight == 1 else f"{visible(a.adapter)}={a.weight:g}"
        for a in decision.mixture.adapters
    )
    return f"{names or 'base'} ({decision.source.value})"


def note(text: str) -> None:
    """Print a remark that is not the answer: dim, to stderr."""
    print(paint(text, "dim", sys.stderr), file=sys.stderr)


def _adapter(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    try:
        value = float(weight) if weight else 1.0
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME or NAME=WEIGHT, e.g. json=0.5")
    return name, value


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def selection(args: argparse.Namespace) -> RouteOptions:
    """The client's keyword arguments for the flags of ``add_selection``. Raises ConfigError."""
    router = args.candidate or args.max_adapters
    if router and (args.base or args.task or args.adapter):
        raise ConfigError(
            "--candidate and --max-adapters are for the router; leave out --adapter, --task and "
            "--base, or these two"
        )
    if args.fallback_to_router and not args.task:
        raise ConfigError("--fallback-to-router is for --task; the router picks anyway without it")
    if args.base:
        return {"base": True}
    if args.task:
        return {"task": args.task, "fallback_to_router": args.fallback_to_router}
    if args.adapter:
        weights = dict(args.adapter)
        if len(weights) < len(args.adapter):
            raise ConfigError("--adapter: one is named twice; give each its whole weight once")
        return {"adapters": weights}
    if router:
        return {"candidates": args.candidate, "max_adapters": args.max_adapters}
    return {}


def decision_json(decision: Decision) -> dict[str, Any]:
    """A decision for programs."""
    return {
        "source": decision.source.value,
        "mixture": [
            {"adapter": a.adapter, "weight": a.weight, "digest": a.digest}
            for a in decision.mixture.adapters
        ],
        "candidates": [
            {"adapter": c.adapter, "score": c.score, "probability": c.probability}
            for c in decision.candidates
        ],
        "router_digest": decision.router_digest,
    }


def plain(message: Message) -> dict[str, Any]:
    """A message of the API for programs: its fields by their names in the API."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
