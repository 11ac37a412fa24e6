"""``python -m router_training init | check | plan | adapter | prefer | eval | register | run``."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mora_serve.cli.output import binary
from mora_serve.errors import InvalidArgument, MoraError
from mora_serve.model import footprint
from router_training.output import unwritable
from router_training.tuning import ranks
from router_training.tuning.settings import (
    Check,
    Dataset,
    LoraDrop,
    TuneSettings,
    adapter_name,
    checkable,
    read_tune_settings,
)

if TYPE_CHECKING:  # they import torch, transformers and TRL
    from mora_serve.model.tokenizer import Tokenizer
    from router_training.tuning.run import Trained
    from router_training.tuning.whole import Outcome

# of the file system
UNWRITABLE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EACCES", "EPERM", "EIO", "ENOTDIR")
    if hasattr(errno, name)
}
STARTER_FILE, EXAMPLE_FILE, EXAMPLE_ROWS = "run.yaml", "chats.jsonl", 400
EXAMPLE = {"num_epochs": "6", "learning_rate": "2e-3", "val_set_size": "64"}  # of so small a base

STARTER = """\
# python -m router_training check run.yaml     what the rows look like
# python -m router_training plan run.yaml      the memory it takes
# python -m router_training run run.yaml       train, evaluate, check, register
base_model: demo            # a directory, a hub id, or the bundled demo
datasets:
  - path: chats.jsonl       # {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}
adapter: qlora              # lora: on an unquantised base
lora_r: 16
lora_alpha: 32
sequence_len: 2048
micro_batch_size: 8
num_epochs: 3
learning_rate: 2e-4
val_set_size: 0.05          # rows held out, for the loss and the quality check
output_dir: ./my-adapter    # its last part is the adapter's name
# register_to: 127.0.0.1:50051
"""


def add_to(commands: Any) -> None:
    """Add the commands to the command line."""
    init = commands.add_parser("init", help="write a commented YAML file to start from")
    init.add_argument("file", type=Path, nargs="?", default=Path(STARTER_FILE))
    init.add_argument(
        "--example",
        action="store_true",
        help=f"with {EXAMPLE_FILE} beside it: chats of a task that the demo's base cannot do",
    )
    init.set_defaults(run=_init)
    for name, run, text in (
        ("check", _check, "the data doctor: what is learned, what is dropped, what is wrong"),
        ("plan", _plan, "the memory that a run takes, before it"),
        ("adapter", _adapter, "train an adapter, or several at once"),
        ("prefer", _prefer, "train an adapter on preferences: DPO, IPO, KTO, ORPO, SimPO"),
        ("eval", _eval, "answer held-out rows through the server, without and with an adapter"),
        ("register", _register, "upload a trained adapter to a running server"),
        ("run", _run, "train, evaluate, check and register"),
    ):
        parser = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=keys() if name != "plan" else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("config", metavar="CONFIG.yaml", type=Path)
        if name == "plan":
            parser.add_argument("--card", help=f"GiB, or one of {', '.join(footprint.CARDS)}")
            parser.add_argument("--cpu", action="store_true", help="of a run on the CPU")
        if name in ("check", "plan"):
            parser.add_argument("--json", action="store_true")
        parser.set_defaults(run=run, overrides=[])  # what the parser does not know are keys


def keys() -> str:
    """Every key of a file, with its default where it has a plain one, for --help."""
    lines = ["keys of the file, each also as --key value:", ""]
    kinds = ((TuneSettings, ""), (Dataset, "datasets.0."), (LoraDrop, "lora_drop."))
    for kind, prefix in (*kinds, (Check, "check.")):
        for field in dataclasses.fields(kind):
            text = field.metadata.get("help", "")
            if isinstance(field.default, (bool, int, float, str)) and field.default != "":
                text = f"{text} [{field.default}]"
            lines.append(f"  {prefix + field.name:<30} {text}")
    return "\n".join(lines)


def guarded(work: Callable[[], int]) -> int:
    """The exit status of a command; 2, with one line, for what the caller got wrong."""
    # transformers' to those who program with it
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return work()
    except MoraError as e:
        print(e.message, file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("stopped; started again, it goes on from its last checkpoint", file=sys.stderr)
        return 130
    except Exception as e:
        if type(e).__name__ == "OutOfMemoryError":
            said = "micro_batch_size: the card has no memory for it; `plan` names what would fit"
        elif (why := _failed_to_write(e)) is not None:
            said = unwritable(why, "output_dir").message
        else:
            raise
        print(said, file=sys.stderr, flush=True)
    return 2


def _failed_to_write(e: Exception) -> OSError | None:
    """What kept a file from being written, if that is what happened.

    torch.save and safetensors have errors of their own for a full disk.
    """
    if isinstance(e, OSError) and e.errno in UNWRITABLE:
        return e
    writers = "PytorchStreamWriter", "I/O error", "IoError", "unexpected pos"
    if any(word in str(e) for word in writers):
        return OSError(0, "writing failed half-way")
    return None


def log(line: str) -> None:
    """Say something beside the result, once of several processes."""
    if ranks.first():
        print(line, file=sys.stderr, flush=True)


def _init(args: argparse.Namespace) -> int:
    def work() -> int:
        chats = args.file.parent / EXAMPLE_FILE
        for file in (args.file, *([chats] if args.example else [])):
            if file.exists():
                raise InvalidArgument(
                    f"file: {file.name} is there already; give another name or folder", field="file"
                )
        starter = STARTER
        if args.example:
            chats.write_text(_example())
            for key, value in EXAMPLE.items():
                starter = re.sub(rf"(?m)^{key}: \S+", f"{key}: {value}", starter)
        args.file.write_text(starter)
        print(args.file)
        return 0

    return guarded(work)


def _example() -> str:
    from router_training.demo.tasks import LATE, TASKS

    rows = []
    for prompt, answer in TASKS[LATE].examples(0, EXAMPLE_ROWS, "train"):
        turns = ("user", prompt), ("assistant", answer)
        rows.append({"messages": [{"role": role, "content": said} for role, said in turns]})
    return "".join(json.dumps(row) + "\n" for row in rows)


def _check(args: argparse.Namespace) -> int:
    def work() -> int:
        from mora_serve.model.loading import read_base
        from router_training.trainable import check_trainable
        from router_training.tuning.prepared import marked, prepare

        settings = read_tune_settings(args.config, args.overrides)
        check_trainable(settings.base_model, "base_model")
        base = read_base(settings.base_model)
        if settings.rl is not None:
            return _check_preferences(settings, base.tokenizer, as_json=args.json)
        prepared = prepare(settings, base.tokenizer)
        findings = prepared.findings
        learned = sum(s.encoded.learned for s in prepared.train)
        tokens = sum(len(s.encoded.ids) for s in prepared.train)
        rows: list[tuple[str, Any]] = [
            ("rows read", findings.rows),
            ("rows to learn from", len(prepared.train)),
            ("rows held out", len(prepared.held_out)),
            ("dropped: sequence_len cuts all that is learned away", findings.dropped),
            ("cut to sequence_len", findings.truncated),
            ("without an end token, which was added", findings.ends_added),
            ("equal rows of the training data", findings.duplicates),
            ("left out of training: held out as well", findings.in_both),
            ("tokens to learn from", tokens),
            ("of them learned", learned),
            ("longest row, tokens", max(len(s.encoded.ids) for s in prepared.train)),
        ]
        roles = {f"{a} -> {b}": n for (a, b), n in findings.roles.items() if a != b}
        sample = marked(prepared.train[0], base.tokenizer)
        if args.json:
            print(json.dumps({**dict(rows), "roles": roles, "row": sample}))
            return 0
        print(f"the first row, what is learned between brackets:\n\n{sample}\n")
        for name, value in rows:
            print(f"{name:<52} {value:>10}")
        for name, count in roles.items():
            print(f"{'role ' + name:<52} {count:>10}")
        return 0

    return guarded(work)


def _check_preferences(settings: TuneSettings, tokenizer: Tokenizer, *, as_json: bool) -> int:
    from router_training.tuning.preferences import lengths, read_preferences

    rows = read_preferences(settings, tokenizer)
    found = [length for row in rows.train for length in lengths(row, tokenizer)]
    said: dict[str, Any] = {
        "rows to learn from": len(rows.train),
        "rows held out": len(rows.held_out),
        "left out of training: their prompts are held out": rows.left_out,
        "longest prompt with an answer, tokens": max(found),
        "cut to sequence_len": sum(length > settings.sequence_len for length in found),
    }
    if as_json:
        print(json.dumps({**said, "row": dict(rows.train[0])}))
        return 0
    print("the first row:\n")
    for key, value in rows.train[0].items():
        print(f"{key}: {value}")
    print()
    for name, value in said.items():
        print(f"{name:<52} {value:>10}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    def work() -> int:
        from mora_serve.model.files import read_shape
        from router_training.tuning import planner

        settings = read_tune_settings(args.config, args.overrides)
        shape = read_shape(settings.base_model)
        card = None if args.card is None else footprint.card_bytes(args.card)
        found = planner.plan(settings, shape, cuda=not args.cpu, card=card)
        change = None
        if found.fits is False and card is not None:
            change = planner.cheaper(settings, shape, card, cuda=not args.cpu)
        if args.json:
            said = {"parts": dict(found.parts), "total": found.total, "fits": found.fits}
            print(json.dumps({**said, "change": change[0] if change else None}))
            return 0
        for name, size in found.parts.items():
            print(f"{name:<40} {binary(size):>12}")
        print(f"{'all, calculated and not measured':<40} {binary(found.total):>12}")
        if card is not None:
            verdict = "fits" if found.fits else "does not fit"
            print(f"a card of {card / footprint.GIB:.0f} GiB: it {verdict}")
        if change is not None:
            print(f"with {change[0]} it is {binary(change[1].total)} and fits")
        elif found.fits is False:
            print("no change of the settings makes it fit; take a smaller base or a larger card")
        return 0

    return guarded(work)


def _adapter(args: argparse.Namespace) -> int:
    def work() -> int:
        from router_training.tuning.run import train

        settings = read_tune_settings(args.config, args.overrides)
        if settings.rl is not None:
            raise InvalidArgument(
                f"rl: {settings.rl} learns from preferences; use `prefer`, or leave it out",
                field="rl",
            )
        return _said(train(settings, log))

    return guarded(work)


def _prefer(args: argparse.Namespace) -> int:
    def work() -> int:
        from router_training.tuning.run import train

        settings = read_tune_settings(args.config, args.overrides)
        if settings.rl is None:
            raise InvalidArgument(
                "rl: it says which method `prefer` trains by; give dpo, ipo, kto, orpo or simpo",
                field="rl",
            )
        return _said(train(settings, log))

    return guarded(work)


def _said(trained: Trained) -> int:
    for name, directory in trained.adapters.items() if ranks.first() else ():
        for metric, value in trained.metrics.get(name, {}).items():
            print(f"{metric:<40} {value:.4f}")
        print(f"{name:<40} {directory}")
    return 0 if trained.finished else 130


def _eval(args: argparse.Namespace) -> int:
    def work() -> int:
        from router_training.tuning.whole import evaluate

        settings = read_tune_settings(args.config, args.overrides)
        _show(evaluate(settings, adapters_of(settings), log))
        return 0

    return guarded(work)


def _register(args: argparse.Namespace) -> int:
    def work() -> int:
        from router_training.tuning.whole import refuse_unfit, register

        settings = read_tune_settings(args.config, args.overrides)
        if not settings.register_to:
            raise InvalidArgument(
                "register_to: it is empty; give the server's address, such as 127.0.0.1:50051",
                field="register_to",
            )
        for name, directory in adapters_of(settings).items():
            refuse_unfit(directory)
            register(settings.register_to, name, directory, log)
        return 0

    return guarded(work)


def adapters_of(settings: TuneSettings) -> dict[str, Path]:
    """Where the settings' run puts its adapters, by name."""
    from router_training.tuning.run import ADAPTER
    from router_training.tuning.several import ADAPTERS
    from router_training.tuning.together import together

    out = Path(settings.output_dir)
    names = together(settings)
    if names:
        return {name: out / ADAPTERS / name for name in names}
    return {adapter_name(settings): out / ADAPTER}


def _run(args: argparse.Namespace) -> int:
    def work() -> int:
        from router_training.tuning.whole import whole_run

        settings = read_tune_settings(args.config, args.overrides)
        checkable(settings)
        outcomes = whole_run(settings, log)
        _show(outcomes)
        return 0 if all(outcome.passed for outcome in outcomes) else 1

    return guarded(work)


def _show(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        for name, value in outcome.lines():
            print(f"{name:<40} {value}")
