"""``python -m router_training``: make the demo bundle, measure one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m router_training",
        description="Train what mora-serve runs: the demo's base, adapters and router.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="make the demo bundle from seeds")
    demo.add_argument("--out", type=Path, required=True, help="directory of the bundle")
    demo.add_argument("--seed", type=int, default=0, help="of everything that is random")
    demo.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    demo.add_argument(
        "--resume", action="store_true", help="keep the stages that the directory already holds"
    )
    demo.set_defaults(run=_demo)
    evaluate = commands.add_parser("evaluate", help="measure a bundle on fresh prompts")
    evaluate.add_argument("bundle", type=Path, help="directory of the bundle")
    evaluate.add_argument("--seed", type=int, default=None, help="of the prompts")
    evaluate.add_argument("--prompts", type=int, default=48, help="prompts a task")
    evaluate.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    evaluate.add_argument("--json", action="store_true", help="print the result as one JSON object")
    evaluate.set_defaults(run=_evaluate)
    args = parser.parse_args(arguments)
    status: int = args.run(args)
    return status


def _demo(args: argparse.Namespace) -> int:
    from router_training.demo.build import BuildOptions, build
    from router_training.demo.evaluate import evaluate
    from router_training.demo.examples import write_examples
    from router_training.demo.report import write_card

    _prepare(args.threads)
    try:
        manifest = build(BuildOptions(args.out, args.seed, args.resume), _log)
    except FileExistsError as e:
        _log(str(e))
        return 2
    write_examples(args.out, _log)
    _log("measuring")
    write_card(args.out, manifest, evaluate(args.out))
    print(args.out)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from router_training.demo.evaluate import FRESH_SEED, evaluate

    _prepare(args.threads)
    seed = FRESH_SEED if args.seed is None else args.seed
    quality = evaluate(args.bundle, seed, args.prompts)
    if args.json:
        print(json.dumps(quality))
        return 0
    for name, row in quality.pop("tasks").items():
        print(f"{name:12}", "  ".join(f"{k} {v:.2f}" for k, v in row.items()))
    for name, value in quality.items():
        print(f"{name}: {value}")
    return 0


def _prepare(threads: int) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads > 0:
        torch.set_num_threads(threads)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
