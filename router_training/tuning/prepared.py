"""The rows of a run: read, encoded, split, and what the data doctor says of them."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mora_serve.errors import InvalidArgument
from mora_serve.model.tokenizer import Tokenizer
from router_training.tuning import ranks
from router_training.tuning.encoding import CHATML, IGNORED, Encoded, Encoder
from router_training.tuning.formats import Example, Seen, example_of
from router_training.tuning.settings import Dataset, TuneSettings
from router_training.tuning.sources import rows_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """A row that can be learned: its example, tokens, and what its dataset says of it."""

    example: Example
    encoded: Encoded
    weight: float
    replay: bool
    adapter: str = ""


@dataclass
class Findings:
    """What the data doctor counts."""

    rows: int = 0
    dropped: int = 0  # nothing of what is to be learned is within sequence_len
    truncated: int = 0
    ends_added: int = 0
    duplicates: int = 0  # equal rows of the training data
    in_both: int = 0  # training rows that are held out as well; they are left out of training
    roles: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(frozen=True)
class Prepared:
    """Rows to learn from and held-out rows, in order; ``digest`` is of all their tokens.

    ``general`` are rows of what the base can do.
    """

    train: Sequence[Sample]
    held_out: Sequence[Sample]
    findings: Findings
    digest: str
    general: Sequence[Sample] = ()


def prepare(settings: TuneSettings, tokenizer: Tokenizer) -> Prepared:
    """Read and encode every row. Raises InvalidArgument, naming the row, for one that is wrong,
    where no row is left, or where no row can be held out."""
    template = CHATML if settings.chat_template == "chatml" else None
    encoder = Encoder(
        tokenizer, settings.sequence_len, inputs=settings.train_on_inputs, template=template
    )
    findings, seen = Findings(), Seen()
    train = _samples(settings.datasets, encoder, findings, seen)
    if not train:
        raise _none(settings, findings, "datasets")
    if settings.test_datasets:
        held_out = _samples(settings.test_datasets, encoder, findings, seen)
        if not held_out:
            raise _none(settings, findings, "test_datasets")
    else:
        train, held_out = _split(train, settings)
    general = _samples(settings.general_datasets, encoder, Findings(), seen)
    # rows that are asked are not learned, by whichever adapter of several they are asked
    kept = {(s.encoded.ids, s.adapter) for s in held_out}
    asked = {s.encoded.ids for s in general} | {ids for ids, name in kept if not name}
    alone = [s for s in train if s.encoded.ids not in asked]
    alone = [s for s in alone if (s.encoded.ids, s.adapter) not in kept]
    findings.in_both = len(train) - len(alone)
    findings.duplicates = len(alone) - len({s.encoded.ids for s in alone})
    findings.roles = seen.roles
    if not alone:
        raise InvalidArgument(
            "datasets: every row is held out as well, so none is left to learn; give other rows "
            "as test_datasets, or leave them out",
            field="datasets",
        )
    return Prepared(alone, held_out, findings, _digest((*alone, *held_out)), general)


def _samples(
    datasets: Iterable[Dataset], encoder: Encoder, findings: Findings, seen: Seen
) -> list[Sample]:
    samples = []
    for dataset in datasets:
        for where, row in rows_of(dataset):
            example = example_of(where, row, dataset, seen)
            encoded = encoder.encode(example)
            findings.rows += 1
            findings.ends_added += encoded.end_added
            if not encoded.learned:
                findings.dropped += 1
                continue
            findings.truncated += encoded.whole > len(encoded.ids)
            samples.append(
                Sample(example, encoded, dataset.weight, dataset.replay, dataset.adapter)
            )
    return samples


def _split(samples: list[Sample], settings: TuneSettings) -> tuple[list[Sample], list[Sample]]:
    """Rows held out by chance, none of replay; equal rows stay on one side."""
    own = sorted({(s.encoded.ids, s.adapter) for s in samples if not s.replay})
    chosen = held_out_of(own, settings, "rows")
    train = [s for s in samples if (s.encoded.ids, s.adapter) not in chosen or s.replay]
    first = {(s.encoded.ids, s.adapter): s for s in reversed(samples) if not s.replay}
    return train, [first[key] for key in sorted(chosen)]


def held_out_of(different: Sequence[T], settings: TuneSettings, what: str) -> set[T]:
    """Those of some different rows or prompts that ``val_set_size`` holds out, by chance.

    At least one unless it is 0. Raises InvalidArgument where none is left.
    """
    size = settings.val_set_size
    count = max(1, round(size * len(different)) if size < 1 else int(size)) if size else 0
    if count >= len(different):
        raise InvalidArgument(
            f"val_set_size: {size:g} would hold out {count} of {len(different)} different {what}, "
            "so none is left to learn; give less, or 0",
            field="val_set_size",
        )
    return set(random.Random(settings.seed).sample(different, count))


def _none(settings: TuneSettings, findings: Findings, key: str) -> InvalidArgument:
    if findings.dropped:
        return InvalidArgument(
            f"sequence_len: {settings.sequence_len} tokens cut the answers of all "
            f"{findings.dropped} rows away, so nothing is left to learn; give more",
            field="sequence_len",
        )
    return InvalidArgument(f"{key}: there is no row in them; give files that have some", field=key)


def _digest(samples: Iterable[Sample]) -> str:
    found = hashlib.sha256()
    for sample in samples:
        row = sample.encoded.ids, sample.encoded.labels, sample.weight, sample.adapter
        found.update(repr(row).encode())
    return found.hexdigest()


def steps_of(settings: TuneSettings, rows: int) -> int:
    """Optimiser steps of a whole run over so many rows, packing apart."""
    if settings.max_steps:
        return settings.max_steps
    return max(1, math.ceil(settings.num_epochs * math.ceil(rows / rows_a_step(settings))))


def rows_a_step(settings: TuneSettings) -> int:
    """Rows of an optimiser step, of all processes together."""
    return settings.micro_batch_size * settings.gradient_accumulation_steps * ranks.count()


def weighted(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Rows as often as their datasets' weights say: 2.5 is twice, and half of them once more.

    Raises InvalidArgument where none is left.
    """
    rng = random.Random(seed)
    out = []
    for sample in samples:
        out += [sample] * times(sample.weight, rng)
    if not out:
        raise InvalidArgument(
            "datasets: their weights leave no row to learn from; give greater ones",
            field="datasets.0.weight",
        )
    return out


def times(weight: float, rng: random.Random) -> int:
    """How often a row of a weight is learned from in a pass."""
    return int(weight) + (rng.random() < weight % 1)


def of_adapter(samples: Iterable[Sample], name: str) -> list[Sample]:
    """The rows of one of several adapters, and those that are of none in particular."""
    return [s for s in samples if s.adapter in ("", name)]


def marked(sample: Sample, tokenizer: Tokenizer, before: str = "⟦", after: str = "⟧") -> str:
    """A row's text with what is learned between marks, special tokens shown."""
    pairs = zip(sample.encoded.ids, sample.encoded.labels, strict=True)
    out = []
    for learned, run in itertools.groupby(pairs, lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in run], special=True)
        out.append(f"{before}{text}{after}" if learned else text)
    return "".join(out)
