"""The adapter intake under mutants: safetensors headers, configurations, cards, directories.

Valid adapters are mutated; a mutant that reaches lines of ``mora_serve.adapters`` which none before
it reached is mutated further. Each has to be accepted or refused with a typed error whose text
tells nothing of the server, within a bound of time, and a valid adapter has to be accepted after
them all.

    python -m benchmarks.fuzz_intake --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import mora_serve.adapters
from benchmarks import report, tiny
from benchmarks.coverage import Coverage
from benchmarks.leaks import leaks
from benchmarks.mutations import Mutator, parts, safetensors
from mora_serve.adapters.untrusted import check_name
from mora_serve.adapters.validate import read_directory, read_upload
from mora_serve.errors import InvalidArgument, MoraError

CASES = 200_000
SECONDS = 480.0  # that all may take
CASE_SECONDS = 5.0  # that one may: a hostile pattern has a budget of about one
ON_DISK = 40  # every so many cases come as a directory
LIMITS = replace(tiny.LIMITS, max_tensors=64, max_bytes=1 << 20)
_KEPT = 4000  # wrong ones and mutants of the corpus at most


class Hang(BaseException):
    """A case took too long; not an Exception, so that nothing takes it for its own."""


@dataclass(frozen=True)
class Case:
    """An adapter as it arrives; ``path`` is how its directory is named, if it comes as one."""

    config: bytes
    weights: bytes
    card: bytes | None = None
    path: str = "adapter"

    @property
    def sent(self) -> bytes:
        """All that the sender knows."""
        return b"\n".join((self.config, self.weights, self.card or b"", self.path.encode()))


def main() -> None:
    """Fuzz and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = fuzz(args.cases, args.seconds, args.seed)
    report.emit({**result, "environment": report.environment()})


def seeds() -> list[Case]:
    """Valid adapters of every kind that is served."""
    pattern: dict[str, Any] = {
        "rank_pattern": {"q_proj": 2, "^model.*k_proj": 2},
        "alpha_pattern": {".*v_proj": 8},
    }
    card = json.dumps(
        {"tasks": ["a"], "prompts": ["one", "two"], "group": "g", "description": "d"}
    ).encode()
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    return [
        Case(tiny.config(), tiny.weights()),
        Case(tiny.config(), tiny.weights(dtype="F16", metadata={"format": "pt"}), card),
        Case(tiny.config(use_rslora=True), tiny.weights(dtype="BF16")),
        Case(tiny.config(use_dora=True), tiny.weights(dora=True)),
        Case(tiny.config(**pattern), tiny.weights(projections=attention), card),
        Case(
            tiny.config(
                target_modules=list(attention),
                bias="none",
                init_lora_weights="gaussian",
                modules_to_save=None,
                lora_dropout=0.1,
                task_type="CAUSAL_LM",
            ),
            tiny.weights(projections=(*attention, "gate_proj")),
        ),
    ]


def mutant(mutator: Mutator, case: Case, other: Case) -> Case:
    """A case with one part changed, sometimes two."""
    rng: random.Random = mutator.rng
    for _ in range(1 if rng.random() < 0.8 else 2):
        match rng.randrange(10):
            case 0 | 1 | 2:
                case = replace(case, config=_json(mutator, case.config, other.config))
            case 3 | 4 | 5 | 6:
                case = replace(case, weights=_container(mutator, case.weights, other.weights))
            case 7:
                case = replace(case, card=_json(mutator, case.card or b"{}", other.card or b"{}"))
            case 8:
                path = mutator.text(case.path).encode("utf-8", "replace")  # as gRPC lets it in
                case = replace(case, path=path.decode())
            case _:
                case = replace(other, config=case.config)
    return case


def _json(mutator: Mutator, data: bytes, other: bytes) -> bytes:
    if mutator.rng.random() < 0.2:
        return mutator.data(data, other)
    try:
        value, lent = json.loads(data), json.loads(other)
    except (ValueError, RecursionError):
        return mutator.data(data, other)
    return mutator.json(mutator.value(value, lent))


def _container(mutator: Mutator, file: bytes, other: bytes) -> bytes:
    rng = mutator.rng
    if rng.random() < 0.2:
        return mutator.data(file, other)
    try:
        (header, data), (lent, _) = parts(file), parts(other)
    except (ValueError, RecursionError):
        return mutator.data(file, other)
    choice = rng.random()
    if choice < 0.8:
        header = mutator.value(header, lent)
    elif choice < 0.9:
        data = mutator.data(data)
    text = mutator.json(header)
    length = int(mutator.number(len(text))) if choice > 0.95 else None
    return safetensors(text, data, length)


class Intake:
    """Takes cases in as the server does, and says what was wrong about the outcome."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._secrets = (str(root), root.name)
        self.outcomes: Counter[str] = Counter()

    def take(self, case: Case, *, on_disk: bool) -> str:
        """Empty where it was accepted or refused as it should be."""
        work = self._from_disk if on_disk else self._uploaded
        try:
            work(case)
        except MoraError as e:
            self.outcomes[e.reason] += 1
            return self._wrong(e, case)
        except Hang:
            self.outcomes["hang"] += 1
            return f"not done after {CASE_SECONDS} s"
        except BaseException as e:
            self.outcomes["untyped"] += 1
            return f"{type(e).__name__}: {e}"[:500]
        self.outcomes["accepted"] += 1
        return ""

    def _uploaded(self, case: Case) -> None:
        adapter = read_upload(case.config, case.weights, case.card, tiny.SHAPE, LIMITS)
        for module in adapter.modules:  # what is accepted can be read
            adapter.array(module.a)
            adapter.array(module.b)

    def _from_disk(self, case: Case) -> None:
        folder = self._root / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_bytes(case.config)
        (folder / "adapter_model.safetensors").write_bytes(case.weights)
        (folder / "routing_card.json").unlink(missing_ok=True)
        if case.card is not None:
            (folder / "routing_card.json").write_bytes(case.card)
        with contextlib.suppress(InvalidArgument):
            check_name(case.path, "name")
        read_directory(self._root, case.path, tiny.SHAPE, LIMITS)

    def _wrong(self, error: MoraError, case: Case) -> str:
        if not error.field or "; " not in error.message:
            return f"no field or no remedy: {error.message}"[:500]
        if len(error.message) > 2000 or not error.message.isprintable():
            return f"long or not printable: {error.message!r}"[:500]
        text = error.message.replace("...", " ")  # the end of a quotation that is cut
        found = leaks(text, case.sent, self._secrets)
        return f"it leaks {found}: {error.message}"[:500] if found else ""


def fuzz(cases: int, seconds: float, seed: int) -> dict[str, Any]:
    """Take in mutants until there were ``cases`` of them, or ``seconds`` have passed."""
    mutator, corpus = Mutator(seed), seeds()
    coverage = Coverage(Path(mora_serve.adapters.__path__[0]))
    wrong: list[str] = []
    slowest, done, start = 0.0, 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mora-intake-") as folder:
        intake = Intake(Path(folder))
        bounded = _bounded(intake.take, coverage)

        def all_valid() -> bool:
            accepted, found = intake.outcomes["accepted"], []
            for case in seeds():
                found += [bounded(case, on_disk=on_disk) for on_disk in (False, True)]
            return not any(found) and intake.outcomes["accepted"] == accepted + len(found)

        valid_before, before = all_valid(), coverage.reached
        intake.outcomes.clear()
        while done < cases and time.monotonic() - start < seconds:
            case = mutant(mutator, mutator.rng.choice(corpus), mutator.rng.choice(corpus))
            reached, began = coverage.reached, time.perf_counter()
            found = bounded(case, on_disk=done % ON_DISK == 0)
            slowest = max(slowest, time.perf_counter() - began)
            done += 1
            if found and len(wrong) < _KEPT:
                wrong.append(found)
                report.log(f"case {done} of seed {seed}: {found}")
            if coverage.reached > reached and len(corpus) < _KEPT:
                corpus.append(case)
            if done % 20_000 == 0:
                report.log(f"{done} cases, {coverage.reached} lines, {len(corpus)} kept")
        took = time.monotonic() - start
        outcomes = dict(intake.outcomes.most_common())
        valid_after = all_valid()
    return {
        "cases": done,
        "wrong": len(wrong),
        "what": wrong[:20],
        "valid_before": valid_before,
        "valid_after": valid_after,
        "right": not wrong and valid_before and valid_after,
        "seconds": round(took, 1),
        "cases_a_second": round(done / took),
        "slowest_ms": round(slowest * 1e3, 1),
        "lines_by_valid_adapters": before,
        "lines": coverage.reached,
        "lines_known": coverage.known,
        "kept": len(corpus),
        "outcomes": outcomes,
    }


def _bounded(take: Callable[..., str], coverage: Coverage) -> Callable[..., str]:
    """``take``, traced, within its bound of time."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Hang

    signal.signal(signal.SIGALRM, end)

    def bounded(case: Case, *, on_disk: bool) -> str:
        signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
        try:
            with coverage:
                return take(case, on_disk=on_disk)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    return bounded


if __name__ == "__main__":
    main()
