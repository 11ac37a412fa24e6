"""``python -m router_training``: train a router, make the demo bundle, measure one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from router_training import command
from router_training.tuning import command as tuning


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    status: int = args.run(args)
    return status


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """A command line read, ``run`` being what it asks for. SystemExit for one that is none."""
    parser = argparse.ArgumentParser(
        prog="python -m router_training",
        description="Train what mora-serve runs: routers, and the demo's base and adapters.",
        epilog=command.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command.add_to(commands)
    tuning.add_to(commands)
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
    evaluate.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="measure other ways to route besides, and write a page with pictures",
    )
    evaluate.add_argument(
        "--xlora-steps", type=int, default=150, help="steps of training X-LoRA for the page"
    )
    evaluate.add_argument("--json", action="store_true", help="print the result as one JSON object")
    evaluate.set_defaults(run=_evaluate)
    joint = commands.add_parser(
        "joint", help="train adapters and the router together, as a YAML file says"
    )
    joint.add_argument("config", type=Path, help="the YAML file; JointSettings has its keys")
    joint.set_defaults(run=_joint)
    args, rest = parser.parse_known_args(command.with_default(arguments, commands.choices))
    if rest and not hasattr(args, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = rest
    return args


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
    from mora_serve.errors import MoraError
    from router_training.baselines.xlora import XLoraRecipe
    from router_training.demo.evaluate import FRESH_SEED, evaluate
    from router_training.demo.manifest import Manifest
    from router_training.demo.report import write_page

    _prepare(args.threads)
    seed = FRESH_SEED if args.seed is None else args.seed
    xlora = XLoraRecipe(steps=args.xlora_steps) if args.report else None
    try:
        # Before minutes of work, not after.
        Manifest.read(args.bundle)
        if args.report:
            _check_writable(args.report)
        quality = evaluate(args.bundle, seed, args.prompts, _log, xlora)
    except MoraError as e:
        _log(e.message)
        return 2
    if args.json:
        print(json.dumps(quality), flush=True)
    else:
        _print(quality)
    if args.report:
        write_page(args.report, quality)
    return 0


def _print(quality: dict[str, Any]) -> None:
    for name, row in quality["tasks"].items():
        print(f"{name:12}", "  ".join(f"{k} {v:.2f}" for k, v in row.items()))
    for name, value in (quality | quality["router"]).items():
        if not isinstance(value, dict):
            print(f"{name}: {value}")


def _check_writable(report: Path) -> None:
    """Open the file, so that it is there from now on. Raises InvalidArgument."""
    from mora_serve.errors import InvalidArgument

    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.open("ab").close()
    except OSError as e:
        raise InvalidArgument(
            f"report: {report.name} cannot be written ({e.strerror}); give another file",
            field="report",
        ) from e


def _joint(args: argparse.Namespace) -> int:
    from mora_serve.errors import MoraError
    from router_training.joint_command import JointSettings, run
    from router_training.settings import read_settings

    _prepare(0)
    try:
        print(run(read_settings(args.config, JointSettings), _log))
    except MoraError as e:
        _log(e.message)
        return 2
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
