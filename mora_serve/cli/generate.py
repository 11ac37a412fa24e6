"""``mora-serve generate``: one prompt, one answer."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any, cast

from mora_serve.cli import connection
from mora_serve.cli import prompt as shared
from mora_serve.cli.output import print_json, visible
from mora_serve.core import SamplingParams, Usage
from mora_serve.errors import Unavailable

if TYPE_CHECKING:
    from mora_serve.client import Client
    from mora_serve.client.requests import GenerateOptions

EPILOG = """\
examples:
  mora-serve generate "reverse 'stone'"               the router picks
  mora-serve generate "..." --task reverse                     an adapter of this task
  mora-serve generate "..." --adapter reverse --adapter json=0.5   this mixture
  mora-serve generate "..." --base                             no adapter
  mora-serve generate - --stream --chat --temperature 0.8 < question.txt

The answer goes to standard output; who answered and how fast, to standard error.
"""


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "generate",
        help="answer one prompt",
        description="Send one prompt to a running server and print the answer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads standard input")
    parser.add_argument("--stream", action="store_true", help="print the answer as it is made")
    parser.add_argument("--chat", action="store_true", help="send it as a chat's user message")
    parser.add_argument("--system", metavar="TEXT", help="the chat's system message")
    shared.add_selection(parser)
    sampling = parser.add_argument_group("sampling", "greedy when nothing is given")
    for flag, kind, text in (
        ("--max-tokens", int, "most tokens of the answer (default: 256)"),
        ("--temperature", float, "0 is greedy"),
        ("--top-k", int, "keep the k likeliest tokens"),
        ("--top-p", float, "keep the likeliest tokens of this total probability"),
        ("--min-p", float, "keep tokens this fraction as likely as the likeliest"),
        ("--repetition-penalty", float, "above 1 makes repetition less likely"),
        ("--presence-penalty", float, "taken from the logits of tokens already sampled"),
        ("--frequency-penalty", float, "the same, for each time a token was sampled"),
        ("--seed", int, "the same seed gives the same text"),
    ):
        sampling.add_argument(flag, type=kind, metavar="N" if kind is int else "X", help=text)
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text (repeat)"
    )
    sampling.add_argument(
        "--ignore-eos", action="store_true", default=None, help="go on to --max-tokens"
    )
    connection.add_to(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Print one answer."""
    text = shared.read_prompt(args)
    options: GenerateOptions = {**shared.selection(args), **_sampling(args)}
    prompt: str | None = text
    if args.chat or args.system is not None:
        system = [] if args.system is None else [("system", args.system)]
        options["messages"] = [*system, ("user", text)]
        prompt = None
    with connection.connect(args) as client:
        return (_stream if args.stream else _whole)(client, prompt, options, args)


def _sampling(args: argparse.Namespace) -> GenerateOptions:
    names = {f.name for f in dataclasses.fields(SamplingParams)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    return cast("GenerateOptions", given)


def _whole(
    client: Client, prompt: str | None, options: GenerateOptions, args: argparse.Namespace
) -> int:
    result = client.generate(prompt, **options)
    if args.json:
        print_json(
            {
                "text": result.text,
                "decision": shared.decision_json(result.decision),
                "finish": result.finish.value,
                "usage": dataclasses.asdict(result.usage),
                "seed": result.seed,
                "request_id": result.request_id,
            }
        )
        return 0
    print(_shown(result.text))
    shared.note(f"{shared.describe(result.decision)}; {speed(result.usage)}")
    return 0


def _stream(
    client: Client, prompt: str | None, options: GenerateOptions, args: argparse.Namespace
) -> int:
    with client.stream(prompt, **options) as stream:
        if args.json:
            start = {"decision": shared.decision_json(stream.decision), "seed": stream.seed}
            print_json({**start, "request_id": stream.request_id})
        for piece in stream:
            if args.json:
                print_json({"text": piece.text})
            else:
                print(_shown(piece.text), end="", flush=True)
        usage, finish = stream.usage, stream.finish
    if usage is None or finish is None:
        raise Unavailable("the stream ended early: the server went away")
    if args.json:
        print_json({"finish": finish.value, "usage": dataclasses.asdict(usage)})
        return 0
    print()
    shared.note(f"{shared.describe(stream.decision)}; {speed(usage)}")
    return 0


def _shown(text: str) -> str:
    return visible(text, keep="\n\t") if sys.stdout.isatty() else text


def speed(usage: Usage) -> str:
    """How many tokens came and how fast, in words."""
    decode = usage.total_seconds - usage.first_token_seconds
    rate = f", {(usage.completion_tokens - 1) / decode:.0f} tokens/s" if decode > 0 else ""
    return (
        f"{usage.completion_tokens} tokens, first after {usage.first_token_seconds * 1e3:.0f} ms"
        f"{rate}"
    )
