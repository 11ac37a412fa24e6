"""Load on a running server: Poisson arrivals that do not wait for answers.

    python -m benchmarks.load --address 127.0.0.1:50051 --rate 5 --seconds 30 --adapters a,b,c
    python -m benchmarks.load --rate 20 --seconds 60 --base --max-tokens 64 --json
    python -m benchmarks.load --rate 5 --auto --prompts prompts.txt

Prompts are random tokens of the base's vocabulary, or the lines of a file. Without ``--auto`` the
mixture is drawn anew for each request. Latencies count from when a request was due. The client asks
again where the server is unavailable or its queue is full (at most five times): that time counts
too. It needs little processor time, but on the server's own cores it takes it from the server.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.open_loop import draw, play, poisson, popularity, streamed, summary
from mora_serve.cli.output import table
from mora_serve.client import DEFAULT_ADDRESS, AsyncClient
from mora_serve.errors import MoraError

LATENCIES = {
    "first token": "first_token_ms",
    "between tokens": "inter_token_ms",
    "whole answer": "total_ms",
    "sent late": "late_ms",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 where the server cannot be asked."""
    args = parse(argv)
    try:
        result = asyncio.run(measure(args))
    except MoraError as e:
        report.log(f"error: {e.message}")
        return 1
    (report.log if args.json else print)(as_text(result))
    if args.json:
        report.emit(result)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags, checked; a wrong one ends the program with what to give."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="HOST:PORT of the server")
    parser.add_argument("--tenant", default="", help="whose adapters")
    parser.add_argument("--rate", type=float, default=5.0, help="arrivals a second, in the mean")
    parser.add_argument("--seconds", type=float, default=30.0, help="time of arrivals")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--adapters", default="", help="names, separated by commas")
    chosen.add_argument("--base", action="store_true", help="no adapter (the default)")
    chosen.add_argument("--auto", action="store_true", help="the server's router picks")
    parser.add_argument("--mixture", type=int, default=1, help="adapters of each request")
    parser.add_argument("--popularity", choices=("uniform", "zipf"), default="uniform")
    parser.add_argument("--exponent", type=float, default=1.0, help="of zipf: 1/rank^exponent")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--prompts", type=Path, help="file of prompts, one a line")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a request may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    args.adapters = [name for name in args.adapters.split(",") if name]
    args.texts = []
    if args.prompts:
        try:
            args.texts = [line for line in args.prompts.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError):
            parser.error("--prompts: the file cannot be read; give a text file")
        if not args.texts:
            parser.error("--prompts: the file holds no prompt; give one a line")
    if args.rate <= 0 or args.seconds <= 0:
        parser.error("--rate and --seconds: give numbers above 0")
    if args.adapters and not 1 <= args.mixture <= len(args.adapters):
        parser.error(f"--mixture: give 1 to {len(args.adapters)}, the number of --adapters")
    return args


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Play the load; rates, latencies, what was asked for and where this ran."""
    rng = random.Random(args.seed)
    due = poisson(args.rate, args.seconds, rng)
    async with AsyncClient(args.address, tenant=args.tenant, timeout=args.timeout) as client:
        vocabulary = (await client.server_info()).base.vocab_size
        wanted = [request(args, vocabulary, rng) for _ in due]
        outcomes = await play(due, lambda i: streamed(client, wanted[i]))
    return {
        **summary(outcomes),
        "rate": args.rate,
        "arrivals_per_second": len(due) / args.seconds,
        "arguments": {k: v for k, v in vars(args).items() if k not in ("prompts", "texts")},
        "environment": report.environment(),
    }


def request(args: argparse.Namespace, vocabulary: int, rng: random.Random) -> dict[str, Any]:
    """One request, drawn: keyword arguments of the client's ``stream``."""
    options: dict[str, Any] = {"max_tokens": args.max_tokens, "ignore_eos": True}
    if args.texts:
        options["prompt"] = rng.choice(args.texts)
    else:
        options["token_ids"] = [rng.randrange(4, vocabulary) for _ in range(args.prompt_tokens)]
    if args.adapters:
        shares = popularity(args.popularity, len(args.adapters), args.exponent)
        options["adapters"] = dict.fromkeys(draw(args.adapters, shares, args.mixture, rng), 1.0)
    elif not args.auto:
        options["base"] = True
    return options


def as_text(result: dict[str, Any]) -> str:
    """A few lines and a table for people."""
    rows = [
        (name, *(f"{value:.1f}" for value in result[key].values()))
        for name, key in LATENCIES.items()
        if result[key]
    ]
    errors = ", ".join(f"{n} {code}" for code, n in result["errors"].items()) or "none"
    return "\n".join(
        (
            f"{result['answered']} of {result['requests']} requests answered in "
            f"{result['seconds']:.1f} s; errors: {errors}",
            f"{result['requests_per_second']:.2f} requests/s of {result['arrivals_per_second']:.2f}"
            f" that came, {result['tokens_per_second']:.1f} tokens/s",
            table(("ms", "p50", "p90", "p99", "max"), rows, right=(1, 2, 3, 4)),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
