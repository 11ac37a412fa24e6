"""Held-out rows answered by the server itself, and how well: exact match, accuracy, F1, BLEU."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mora_serve.client import Client
from mora_serve.demo.process import ServerProcess
from router_training.tuning.formats import Example
from router_training.tuning.prepared import Sample

PARALLEL = 16
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Answered:
    """A held-out row: its prompt, the right answer, the base's, and the adapter's."""

    prompt: str
    wanted: str
    base: str
    adapted: str


@contextmanager
def served(base: str, quantization: str) -> Iterator[Client]:
    """A client of a server of this base, on loopback, for as long as the context lasts."""
    flags = {"base.model": base, "base.quantization": quantization}
    with ServerProcess(flags) as server, Client(server.address, timeout=600.0) as client:
        server.wait_until_ready(client)
        yield client


def answer(
    client: Client, samples: Sequence[Sample], adapter: str | None, questions: Sequence[list[int]]
) -> list[str]:
    """The server's greedy answers, as long as the right ones and half as much again; ``adapter``
    None is the base alone."""
    mixture: dict[str, float] | None = {adapter: 1.0} if adapter else None

    def one(pair: tuple[Sample, list[int]]) -> str:
        sample, ids = pair
        result = client.generate(
            token_ids=ids,
            adapters=mixture,
            base=mixture is None,
            max_tokens=sample.encoded.learned * 3 // 2 + 8,
            temperature=0.0,
        )
        return result.text

    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(one, zip(samples, questions, strict=True)))


def exact_match(got: Sequence[str], wanted: Sequence[str]) -> float:
    """The part of answers that are equal, white space at the ends apart."""
    return _mean([g.strip() == w.strip() for g, w in zip(got, wanted, strict=True)])


def accuracy(got: Sequence[str], wanted: Sequence[str]) -> float:
    """The part whose normalised answers are equal: of labels, without case, dots and articles."""
    return _mean([_normal(g) == _normal(w) for g, w in zip(got, wanted, strict=True)])


def f1(got: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean F1 of words, as SQuAD's evaluation has it (Rajpurkar et al. 2016)."""
    return _mean(
        [_f1(_normal(g).split(), _normal(w).split()) for g, w in zip(got, wanted, strict=True)]
    )


def bleu(got: Sequence[str], wanted: Sequence[str]) -> float:
    """sacrebleu's corpus BLEU, as a part of 1."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(got), [list(wanted)]).score) / 100


METRICS: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "accuracy": accuracy,
    "f1": f1,
    "bleu": bleu,
}


def answerable(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """The first ``limit`` rows that have a question and a whole answer."""

    def fits(example: Example, sample: Sample) -> bool:
        whole = len(sample.encoded.ids) == sample.encoded.whole
        return bool(example.turns) and bool(example.answer) and whole

    return [s for s in samples if fits(s.example, s)][:limit]


def upload(client: Client, name: str, directory: Path) -> None:
    """Register a directory's adapter under a name, in place of one that has it."""
    client.upload_adapter(name, directory, replace=True)


def _normal(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _f1(got: Sequence[str], wanted: Sequence[str]) -> float:
    common = (Counter(got) & Counter(wanted)).total()
    if not common:
        return float(not got and not wanted)
    precision, recall = common / len(got), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
