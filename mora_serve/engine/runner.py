"""One forward for the whole batch: chunks of sequences in, one sampled token a chunk out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence as Seq
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mora_serve.config import EngineConfig
from mora_serve.core import TokenOut
from mora_serve.engine import orders
from mora_serve.engine.adapter_pool import AdapterPool
from mora_serve.engine.forward import Forward
from mora_serve.engine.native_forward import NativeForward, can_run
from mora_serve.engine.parallel_forward import ParallelForward
from mora_serve.engine.sampler import SamplingRow, sample, takes_best
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence
from mora_serve.engine.team import Team
from mora_serve.engine.torch_forward import TorchForward
from mora_serve.errors import ConfigError
from mora_serve.model.attention import KVPages
from mora_serve.model.decoder import Decoder

if TYPE_CHECKING:
    from mora_serve.engine.kernel_step import Room  # imports triton


def allowed_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Processor cores that this process may use: by its affinity, and by a container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup of version 2, or "max": no quota
        return cores


class Runner:
    """Owns the key/value pages, runs batches and samples.

    ``kernels`` and ``threads`` are those of the configuration; a ``team`` has the other parts of
    the base. Raises ConfigError when it asks for a native path that is not there, or one that
    cannot read the pool's slots.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: AdapterPool,
        pages: int,
        max_context: int,
        config: EngineConfig,
        team: Team | None = None,
    ) -> None:
        shape, page_size = decoder.shape, config.page_size
        self.decoder, self.pool = decoder, pool
        self.kv = KVPages(
            *(shape.layers, shape.kv_heads, shape.head_dim, pages, page_size),
            decoder.dtype,
            decoder.device,
        )
        self.forward: Forward
        if team is None:
            self.forward = self._alone(max_context, config)
        else:
            self.forward = self._together(team, pages, max_context, config)

    def _alone(self, max_context: int, config: EngineConfig) -> Forward:
        parts = self.decoder, self.pool.slots, self.kv
        kernels = config.kernels
        if kernels in ("auto", "native") and can_run(self.decoder):
            if self.pool.slots.stored != self.decoder.dtype:
                raise ConfigError(
                    "adapters.dtype: 'int8' is not for the compiled CPU path, which reads adapters "
                    "in the base's type; use 'auto', or engine.kernels = 'torch'",
                    field="adapters.dtype",
                )
            return NativeForward(*parts, max_context, config.threads or allowed_cores())
        if kernels == "native":
            raise ConfigError(
                "engine.kernels: 'native' asks for the compiled CPU path, which is not built or "
                "does not take this base, type or processor; use 'auto', or install from source "
                "where there is a C compiler",
                field="engine.kernels",
            )
        if (room := self._kernels_room(max_context, config)) is not None:
            return self._by_kernels(room)
        return TorchForward(*parts, config.threads)

    def _together(self, team: Team, pages: int, max_context: int, config: EngineConfig) -> Forward:
        """By all ranks, each in the same way."""
        threads, slots = config.threads, self.pool.slots
        if self.decoder.device.type == "cpu":  # which all ranks share
            threads = threads or max(1, allowed_cores() // team.group.size)
        room = self._kernels_room(max_context, config)
        team.serve(
            orders.Serve(slots.slots, slots.max_rank, pages, config.page_size, threads, room)
        )
        if room is not None:
            return self._by_kernels(room, team)
        return ParallelForward(TorchForward(self.decoder, slots, self.kv, threads), team)

    def _kernels_room(self, max_context: int, config: EngineConfig) -> Room | None:
        """What Triton's kernels have to take; None where torch computes.

        Raises ConfigError where they are asked for and cannot run.
        """
        kernels, device = config.kernels, self.decoder.device.type
        there = find_spec("triton") is not None
        if kernels != "triton" and not (kernels == "auto" and there and device == "cuda"):
            return None
        if not there:
            raise ConfigError(
                "engine.kernels: 'triton' asks for kernels that need the package triton, which is "
                "not installed; install it, or use 'auto'",
                field="engine.kernels",
            )
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(
                "engine.kernels: 'triton' asks for kernels that need a card, but base.device is "
                f"{device}; use 'auto'",
                field="engine.kernels",
            )
        from mora_serve.engine.kernel_step import Room

        return Room(max_context, config.max_batch, self.pool.reserve)

    def _by_kernels(self, room: Room, team: Team | None = None) -> Forward:
        from mora_serve.engine.cuda_forward import CudaForward
        from mora_serve.engine.kernel_step import KernelStep

        return CudaForward(KernelStep(self.decoder, self.pool.slots, self.kv, room), team)

    def prepare(self) -> None:
        """Measure, compile and capture what the first steps would otherwise wait for."""
        self.forward.prepare()

    def clear(self, pages: Seq[int]) -> None:
        """Zero pages that have a new owner (see KVCache.take_new), where that matters."""
        if not pages or not self.forward.reads_whole_pages:
            return
        ranks = self.forward if isinstance(self.forward, ParallelForward) else self.kv
        ranks.clear(pages)

    @torch.inference_mode()
    def run(self, batch: Seq[Chunk]) -> list[tuple[Sequence, TokenOut | None]]:
        """Compute the chunks; for each that reaches its sequence's end, sample the next token.

        A None in place of the token says that the row's logits were not finite.
        """
        batch = sorted(batch, key=lambda c: c.length > 1)
        logits = self.forward(batch, self.pool.slot)
        if logits is None:
            return []
        sampling = [chunk.sequence for chunk in batch if chunk.samples]
        tokens: list[TokenOut | None] = [
            TokenOut(best) if finite else None
            for best, finite in zip(logits.best, logits.finite, strict=True)
        ]
        drawn = [
            i
            for i, sequence in enumerate(sampling)
            if logits.finite[i]
            and i not in logits.drawn
            and not takes_best(sequence.request.sampling)
        ]
        if drawn:
            rows = [
                SamplingRow(s.request.sampling, s.request.prompt, s.output)
                for s in (sampling[i] for i in drawn)
            ]
            for i, token in zip(drawn, sample(logits.read(drawn), rows), strict=True):
                tokens[i] = token
        return list(zip(sampling, tokens, strict=True))
