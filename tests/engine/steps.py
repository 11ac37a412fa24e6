"""Whole steps of any forward: random bases and adapters, jobs cut into chunks, run side by side."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import families
from benchmarks.group_checkpoints import Recipe, write
from mora_serve.config import BaseConfig
from mora_serve.core import AdapterWeight, Mixture, Request, SamplingParams
from mora_serve.engine.forward import Forward
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence as Running
from mora_serve.engine.torch_forward import TorchForward
from mora_serve.model.attention import KVPages
from mora_serve.model.decoder import Decoder
from mora_serve.model.loading import load_base
from mora_serve.model.lora import AdapterSlots

GROUPS = Recipe(symmetric=False, act_order=True, group=32, head=True)
PAGES, CONTEXT = 64, 128
# slot: (rank, DoRA); no adapter has the largest rank that slots have
ADAPTERS = {"a": (4, False), "b": (7, False), "c": (1, False), "d": (8, True), "e": (3, True)}
SLOT = {name: i + 1 for i, name in enumerate(ADAPTERS)}
SLOT_OF_DIGEST = {2 * name: slot for name, slot in SLOT.items()}
MIXTURES: tuple[dict[str, float], ...] = (
    *({}, {"a": 1.0}, {"b": -0.7}, {"d": 1.0}, {"a": 0.5, "b": 0.8}),
    *({"c": 1.5, "a": 1.0, "b": -0.25}, {"d": 0.6, "e": 0.4}, {"e": 0.9, "a": -0.3}),
)


@dataclass(frozen=True)
class Job:
    """A sequence, and the lengths of the chunks that it is computed in."""

    tokens: tuple[int, ...]
    mixture: dict[str, float]
    chunks: tuple[int, ...]


@functools.cache
def directory(family: str, root: Path) -> Path:
    name, _, bits = family.partition("-")
    if bits == "groups":
        return write(directory(name, root), root / family, GROUPS)
    # with 16 bits a vocabulary that does not fill its last tile
    model = families.make_base(name, root / family, vocab_size=333 if bits else 320)
    if bits:
        model.bfloat16().save_pretrained(root / family)
    return root / family


@functools.cache
def reference(family: str, root: Path, quantization: str, dtype: str) -> Decoder:
    """Left as it is loaded; for torch."""
    return decoder(family, root, quantization, dtype)


def decoder(
    family: str,
    root: Path,
    quantization: str = "none",
    dtype: str = "fp32",
) -> Decoder:
    if family.endswith("groups"):
        quantization = "auto"
    config = BaseConfig(
        str(directory(family, root)), quantization=quantization, dtype=dtype, device="cpu"
    )
    return load_base(config).decoder


def adapters(decoder: Decoder, poison: int | None = None) -> AdapterSlots:
    """Random ones in slots 1 to 5 of 7, and NaN in slot ``poison``."""
    slots = AdapterSlots(decoder.shape, 7, 16, decoder.dtype, decoder.device)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for name, (rank, dora) in ADAPTERS.items():
        s = SLOT[name]
        slots.ranks[s], slots.has_dora[s] = rank, dora
        for part in slots.parts():
            part.a[s, :rank] = random(rank, part.a.shape[2]) * part.a.shape[2] ** -0.5
            part.b[s, :rank] = random(rank, part.width) * 0.1
            if dora:
                part.dora[s] = random(part.width) * 0.05
    for name, (_, dora) in ADAPTERS.items():
        for part in slots.parts():
            if not dora:
                part.dora[SLOT[name]] = 7.0  # of an adapter that was there before
    if poison is not None:
        slots.ranks[poison] = 16
        for part in slots.parts():
            part.a[poison] = part.b[poison] = part.dora[poison] = float("nan")
    return slots


def pages_of(decoder: Decoder, page_size: int, fill: float = 0.0) -> KVPages:
    shape = decoder.shape
    kv = KVPages(
        *(shape.layers, shape.kv_heads, shape.head_dim, PAGES * 16 // page_size, page_size),
        decoder.dtype,
        decoder.device,
    )
    kv.k.fill_(fill)
    kv.v.fill_(fill)
    return kv


class World:
    """A forward with its memory; ``run`` computes jobs side by side."""

    def __init__(
        self,
        decoder: Decoder,
        make: Callable[[Decoder, AdapterSlots, KVPages], Forward] = TorchForward,
        *,
        page_size: int = 16,
        fill: float = 0.0,
        poison: int | None = None,
    ) -> None:
        self.kv = pages_of(decoder, page_size, fill)
        self.slots = adapters(decoder, poison)
        self.forward = make(decoder, self.slots, self.kv)

    def run(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Logits at the end of every chunk of each job: [chunks, vocabulary]."""
        sequences, free = [], iter(range(1, self.kv.k.shape[2]))
        for i, job in enumerate(jobs):
            weights = tuple(AdapterWeight(n, w, 2 * n) for n, w in job.mixture.items())
            request = Request(
                *(f"r{i}", job.tokens, SamplingParams(1), Mixture(weights), "t", time.monotonic())
            )
            sequence = Running(request, None)  # type: ignore[arg-type]  # no text comes of it
            count = -(-len(job.tokens) // self.kv.page_size)
            # pages in no order
            sequence.pages = [next(free) for _ in range(count)][::-1]
            sequences.append(sequence)
        out: list[list[Tensor]] = [[] for _ in jobs]
        starts = [0] * len(jobs)
        for step in range(max(len(job.chunks) for job in jobs)):
            batch, who = [], []
            for i, job in enumerate(jobs):
                if step < len(job.chunks):
                    batch.append(Chunk(sequences[i], starts[i], job.chunks[step], True))
                    who.append(i)
                    starts[i] += job.chunks[step]
            order = sorted(range(len(batch)), key=lambda b: batch[b].length > 1)
            with torch.inference_mode():
                logits = self.forward([batch[b] for b in order], SLOT_OF_DIGEST.__getitem__)
            assert logits is not None
            assert logits.finite == [bool(x.isfinite().all()) for x in logits.values]
            finite = logits.values.nan_to_num()
            assert [b for b, f in zip(logits.best, logits.finite, strict=True) if f] == [
                int(x.argmax()) for x, f in zip(finite, logits.finite, strict=True) if f
            ]
            for row, b in enumerate(order):
                out[who[b]].append(logits.values[row].float().cpu().clone())
        return [torch.stack(rows) for rows in out]


def cut(length: int, pieces: Iterable[int]) -> tuple[int, ...]:
    """Lengths of chunks: ``pieces`` as far as they go, single tokens at last."""
    out: list[int] = []
    for piece in pieces:
        if sum(out) + piece <= length:
            out.append(piece)
    return (*out, *[1] * (length - sum(out)))


def job(length: int, mixture: dict[str, float], pieces: Iterable[int], seed: int = 0) -> Job:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 320, (length,), generator=generator).tolist()
    return Job(tuple(tokens), mixture, cut(length, pieces))


JOBS = [job(44 + i, m, [(1, 7, 30, 17, 40)[i % 5]], seed=i) for i, m in enumerate(MIXTURES)]


def distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative error; NaN if any number is."""
    errors = [(g - w).norm() / w.norm() for g, w in zip(got, want, strict=True)]
    return float(torch.stack(errors).max())
