"""Which adapters are on the device: a fixed number of slots, LRU, reference counts, pins.

Only the engine's thread changes the pool. A load runs on the pool's own thread and writes into a
slot that nobody reads until the engine has seen it complete, so running streams never wait.
"""

from __future__ import annotations

import enum
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mora_serve.adapters.validate import TensorRef, ValidatedAdapter
from mora_serve.core import AdapterLoad
from mora_serve.errors import Failure, MoraError, ResourceExhausted
from mora_serve.model.decoder import Decoder
from mora_serve.model.lora import AdapterSlots, ProjectionSlots, dora_scale
from mora_serve.model.shape import SITES

log = logging.getLogger(__name__)

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# An adapter just loaded and not yet used is left in its slot for this many polls: the request
# that asked for it must get a turn before another's load can take the slot.
GRACE_POLLS = 16
# Adapters whose DoRA scales are kept on the host: each takes passes over the whole base to make.
DORA_KEPT = 256


class _State(enum.Enum):
    LOADING = enum.auto()
    READY = enum.auto()


@dataclass(slots=True)
class _Entry:
    slot: int
    state: _State = _State.LOADING
    references: int = 0
    used: bool = False
    ready_poll: int = 0


class AdapterPool:
    """Brings adapters, named by digest, into device slots.

    ``open_adapter`` gives an adapter's content (raises MoraError when it is gone); ``wake`` is
    called from the loading thread when a load has ended.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: AdapterSlots,
        open_adapter: Callable[[str], ValidatedAdapter],
        wake: Callable[[], None],
        reserve: int = 1,
    ) -> None:
        self.slots = slots
        self.hits = self.misses = self.evictions = 0
        self._decoder, self._open, self._wake = decoder, open_adapter, wake
        self._reserve = reserve
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._free = list(range(slots.slots - 1, -1, -1))
        self._pinned: set[str] = set()
        self._broken: set[str] = set()  # pinned, but failed to load: not tried at every poll
        self._pin_lock = threading.Lock()
        self._polls = 0
        self._done: queue.SimpleQueue[AdapterLoad] = queue.SimpleQueue()
        cuda = slots.device.type == "cuda"
        self._stream = (
            torch.cuda.Stream(slots.device)  # type: ignore[no-untyped-call]
            if cuda
            else None
        )
        # One thread of its own: a second team would take the cores of the running step.
        self._loader = ThreadPoolExecutor(1, "adapter-load", torch.set_num_threads, (1,))
        self._dora: OrderedDict[str, dict[tuple[int, str], Tensor]] = OrderedDict()

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests that can be used now."""
        return tuple(d for d, e in self._entries.items() if e.state is _State.READY)

    def slot(self, digest: str) -> int:
        """The slot of an adapter that the caller holds."""
        return self._entries[digest].slot

    def hold(self, digests: tuple[str, ...]) -> bool:
        """Take one reference to each adapter if all are in slots.

        False: nothing is held, and the loads that can start have started.
        """
        for digest in digests:
            if digest in self._entries:
                self._entries.move_to_end(digest)
        missing = False
        for digest in digests:
            entry = self._entries.get(digest)
            if entry is None:
                self._begin(digest, digests)
            missing = missing or entry is None or entry.state is _State.LOADING
        if missing:
            return False
        for digest in digests:
            entry = self._entries[digest]
            entry.references += 1
            self.hits += entry.used
            entry.used = True
        return True

    def assigned(self, digests: tuple[str, ...]) -> bool:
        """Every one has a slot, be it loaded or still loading: only time is missing."""
        return all(d in self._entries for d in digests)

    def drop(self, digests: tuple[str, ...]) -> None:
        """Give back references taken by ``hold``."""
        for digest in digests:
            self._entries[digest].references -= 1

    def pin(self, digest: str) -> None:
        """Keep an adapter in its slot; thread-safe. It is loaded when a slot is free.

        Raises ResourceExhausted when pins would leave fewer slots than one mixture needs.
        """
        with self._pin_lock:
            limit = self.slots.slots - self._reserve
            if digest not in self._pinned and len(self._pinned) >= limit:
                raise ResourceExhausted(
                    f"pinned: {self._reserve} of the {self.slots.slots} slots stay free for "
                    "mixtures, and the others are pinned; unpin one or raise adapters.slots",
                    field="pinned",
                )
            self._pinned.add(digest)
            self._broken.discard(digest)
        self._wake()

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted again; thread-safe."""
        with self._pin_lock:
            self._pinned.discard(digest)
            self._broken.discard(digest)

    def poll(self) -> list[AdapterLoad]:
        """Take in the loads that ended since the last call, and start those of pinned adapters."""
        self._polls += 1
        ended = []
        while not self._done.empty():
            load = self._done.get()
            ended.append(load)
            entry = self._entries[load.digest]
            if load.error is not None:
                del self._entries[load.digest]
                self._free.append(entry.slot)
                with self._pin_lock:
                    if load.digest in self._pinned:
                        self._broken.add(load.digest)
            else:
                entry.state, entry.ready_poll = _State.READY, self._polls
        with self._pin_lock:
            waiting = [d for d in self._pinned - self._broken if d not in self._entries]
        for digest in waiting:
            self._begin(digest)
        return ended

    def close(self) -> None:
        """Wait for the load under way and end the loading thread."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    def check_integrity(self) -> None:
        """Raise RuntimeError when slots and entries disagree, or a reference leaked."""
        taken = sorted([e.slot for e in self._entries.values()] + self._free)
        if taken != list(range(self.slots.slots)):
            raise RuntimeError(f"adapter slots are not a partition: {taken}")
        leaked = [d[:12] for d, e in self._entries.items() if e.references]
        if leaked:
            raise RuntimeError(f"adapters are held by nobody that runs: {leaked}")

    def _begin(self, digest: str, beside: tuple[str, ...] = ()) -> None:
        """Start a load if there is a slot for it; those ``beside`` it do not make room."""
        if not self._free and not self._evict(beside):
            return
        # The lowest free slot: the batched product runs over a range of slots.
        self._free.sort(reverse=True)
        slot = self._free.pop()
        self._entries[digest] = _Entry(slot)
        self.misses += 1
        self._loader.submit(self._load, digest, slot)

    def _evict(self, kept: tuple[str, ...]) -> bool:
        for digest, entry in self._entries.items():
            fresh = not entry.used and self._polls - entry.ready_poll < GRACE_POLLS
            if entry.state is _State.READY and not entry.references and not fresh:
                if digest in self._pinned or digest in kept:
                    continue
                del self._entries[digest]
                self._free.append(entry.slot)
                self.evictions += 1
                return True
        return False

    def _load(self, digest: str, slot: int) -> None:
        started = time.monotonic()
        error: Failure | None = None
        nbytes = 0
        try:
            adapter = self._open(digest)
            nbytes = adapter.nbytes
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                self._fill(slot, digest, adapter)
        except MoraError as e:
            error = Failure.of(e)
        except Exception:
            log.exception("loading adapter %s failed", digest[:12])
            error = Failure(
                "INTERNAL",
                "LOAD_FAILED",
                "adapter: it could not be loaded; retry, then register it anew",
            )
        self._done.put(AdapterLoad(digest, time.monotonic() - started, nbytes, error))
        self._wake()

    @torch.no_grad()
    def _fill(self, slot: int, digest: str, adapter: ValidatedAdapter) -> None:
        self._clear(slot)
        self.slots.ranks[slot] = self.slots.max_rank  # what to clear if this load breaks off
        scales = self._dora.pop(digest, {})
        for module in adapter.modules:
            part = self.slots.projection(module.layer, module.projection)
            a, b = self._tensor(adapter, module.a), self._tensor(adapter, module.b)
            b = (b.float() * module.scaling).T
            part.a[slot, : module.rank].copy_(a, non_blocking=True)
            part.b[slot, : module.rank].copy_(b)
            if module.magnitude is not None:
                key = (module.layer, module.projection)
                if key not in scales:
                    weight = self._base_weight(*key, part)
                    magnitude = self._tensor(adapter, module.magnitude).flatten()
                    on_base = (t.to(weight.device) for t in (a, b, magnitude))
                    scales[key] = (dora_scale(weight, *on_base) - 1).cpu()
                if part.dora is None:
                    part.dora = torch.zeros(
                        self.slots.slots,
                        part.width,
                        dtype=self.slots.dtype,
                        device=self.slots.device,
                    )
                part.dora[slot].copy_(scales[key])
        self.slots.ranks[slot] = adapter.rank
        self.slots.has_dora[slot] = adapter.dora
        if scales:
            self._dora[digest] = scales
            if len(self._dora) > DORA_KEPT:
                self._dora.popitem(last=False)
        if self._stream is not None:
            self._stream.synchronize()

    def _tensor(self, adapter: ValidatedAdapter, ref: TensorRef) -> Tensor:
        host = tensor(adapter, ref)
        if self._stream is None:
            return host
        return host.pin_memory().to(self.slots.device, non_blocking=True)

    def _clear(self, slot: int) -> None:
        rank = self.slots.ranks[slot]
        for part in self.slots.parts():
            part.a[slot, :rank] = 0
            part.b[slot, :rank] = 0
            if part.dora is not None:
                part.dora[slot] = 0

    def _base_weight(self, layer: int, projection: str, part: ProjectionSlots) -> Tensor:
        site = next(s for s, names in SITES.items() if projection in names)
        linear = self._decoder.layers[layer].sites[site]
        return linear.dequantise(torch.float32, part.start, part.start + part.width)


def tensor(adapter: ValidatedAdapter, ref: TensorRef) -> Tensor:
    """A copy of one tensor of an adapter (the mapped file itself is read-only)."""
    out = torch.empty(ref.shape, dtype=DTYPES[ref.dtype])
    bits = out.view(torch.int16) if ref.dtype == "BF16" else out
    array = adapter.array(ref)
    bits.numpy()[...] = array.view(np.int16) if ref.dtype == "BF16" else array
    return out
