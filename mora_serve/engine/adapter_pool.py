"""Which adapters are on the device: a fixed number of slots, LRU, reference counts, pins.

Only the engine's thread changes the pool. A load runs on the pool's own thread and writes into a
slot that nobody reads until the engine has seen it complete, so running streams never wait. That
thread has a low priority: a load takes longer then, a step does not.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import queue
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType

import torch

from mora_serve.adapters.validate import ValidatedAdapter
from mora_serve.core import AdapterLoad
from mora_serve.engine.failures import DeviceLost
from mora_serve.engine.followers import ALONE, Followers
from mora_serve.engine.host_adapters import HostAdapter, HostAdapters
from mora_serve.engine.kv_cache import IntegrityError
from mora_serve.engine.pins import check_pins
from mora_serve.errors import Failure, MoraError
from mora_serve.model.decoder import Decoder
from mora_serve.model.lora import AdapterSlots

log = logging.getLogger(__name__)

# An adapter just loaded and not yet used is left in its slot for this many polls: the request
# that asked for it must get a turn before another's load can take the slot.
GRACE_POLLS = 16
# Loads under way while more are started ahead of need: a request whose turn it is would have to
# wait for all of them.
AHEAD = 2
NICENESS = 10  # of the loading thread, where the system has priorities of threads


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
    called from the loading thread when a load has ended. ``host_bytes`` of converted adapters are
    kept beside the slots. ``followers`` are other ranks, whose slots are to hold the same.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: AdapterSlots,
        open_adapter: Callable[[str], ValidatedAdapter],
        wake: Callable[[], None],
        reserve: int = 1,
        host_bytes: int = 256 << 20,
        followers: Followers = ALONE,
    ) -> None:
        self.slots = slots
        self.hits = self.misses = self.evictions = 0
        self._host = HostAdapters(decoder, slots, open_adapter, host_bytes, followers)
        self._followers = followers
        self._wake = wake
        self.reserve = reserve
        self._writer = SlotWriter(slots)
        self._loads = 0  # under way, or in line for the loading thread
        self._staging: set[str] = set()  # being converted ahead of a slot
        self._staged: set[str] = set()  # of the line: were, or could not be
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._free = list(range(slots.slots - 1, -1, -1))
        self._pinned: set[str] = set()
        self._broken: set[str] = set()  # pinned, but failed to load: not tried at every poll
        self._pin_lock = threading.Lock()
        self._polls = 0
        self._done: queue.SimpleQueue[AdapterLoad] = queue.SimpleQueue()
        # One thread of its own: a second team would take the cores of the running step.
        self._loader = ThreadPoolExecutor(1, "adapter-load", start_loading_thread)

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests that can be used now."""
        return tuple(d for d, e in self._entries.items() if e.state is _State.READY)

    @property
    def loading(self) -> bool:
        """Whether loads or conversions are under way."""
        return bool(self._loads or self._staging)

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
                self._begin(digest, frozenset(digests))
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

    @property
    def can_prefetch(self) -> bool:
        """Whether loads ahead of need may be started: few are under way."""
        return self._loads + len(self._staging) < AHEAD

    def prefetch(self, line: Seq[tuple[str, ...]]) -> bool:
        """Start loads for the requests next in line, the nearest first.

        Nobody is robbed: an adapter makes room only if no request of the line needs it, and
        behind a request that finds no room the others take none; their adapters are converted on
        the host meanwhile. True: all that can be done for this line has been started.
        """
        wanted = {digest for digests in line for digest in digests}
        self._staged &= wanted
        room = True
        for digest in (d for digests in line for d in digests):
            if digest in self._entries:
                continue
            if not self.can_prefetch:
                return False
            room = room and self._begin(digest, wanted)
            # Once each: where the host does not hold all of them, one would drive out the other.
            if not room and digest not in self._host and digest not in self._staged:
                self._staged.add(digest)
                self._staging.add(digest)
                self._loader.submit(self._stage, digest)
        return True

    def drop(self, digests: tuple[str, ...]) -> None:
        """Give back references taken by ``hold``."""
        for digest in digests:
            self._entries[digest].references -= 1

    def pin(self, digest: str) -> None:
        """Keep an adapter in its slot; thread-safe. It is loaded when a slot is free.

        Raises ResourceExhausted when pins would leave fewer slots than one mixture needs.
        """
        with self._pin_lock:
            check_pins(self._pinned, digest, self.slots.slots, self.reserve)
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
            self._loads -= 1
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

    @property
    def used(self) -> int:
        """Slots whose adapters somebody holds."""
        return sum(e.references > 0 for e in self._entries.values())

    def reset_references(self) -> None:
        """Nobody holds anything; what is in slots stays there."""
        for entry in self._entries.values():
            entry.references = 0

    def check_integrity(self, held: Mapping[str, int] = MappingProxyType({})) -> None:
        """Raise IntegrityError when slots, entries and loads disagree, or references do.

        ``held`` are the references that there should be, by digest.
        """
        taken = sorted([e.slot for e in self._entries.values()] + self._free)
        if taken != list(range(self.slots.slots)):
            raise IntegrityError(f"adapter slots are not a partition: {taken}")
        counted = {d: e.references for d, e in self._entries.items() if e.references}
        wrong = [d[:12] for d in {*held, *counted} if held.get(d, 0) != counted.get(d, 0)]
        if wrong:
            raise IntegrityError(f"adapters are held by others than those that run: {wrong}")
        unready = [d[:12] for d in held if self._entries[d].state is not _State.READY]
        if unready:
            raise IntegrityError(f"adapters that are still loading are held: {unready}")
        loading = sum(e.state is _State.LOADING for e in self._entries.values())
        if loading != self._loads:
            raise IntegrityError(f"{loading} slots wait for loads, {self._loads} are under way")
        with self._pin_lock:
            pinned, most = len(self._pinned), max(0, self.slots.slots - self.reserve)
        if pinned > most:
            raise IntegrityError(f"{pinned} adapters are pinned in place of {most}")

    def _begin(self, digest: str, kept: Set[str] = frozenset()) -> bool:
        """Start a load if there is a slot for it; those ``kept`` do not make room."""
        if not self._free and not self._evict(kept):
            return False
        # The lowest free slot: the batched product runs over a range of slots.
        self._free.sort(reverse=True)
        slot = self._free.pop()
        self._entries[digest] = _Entry(slot)
        self.misses += 1
        self._loads += 1
        self._loader.submit(self._load, digest, slot)
        return True

    def _evict(self, kept: Set[str]) -> bool:
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

    def _stage(self, digest: str) -> None:
        """Convert an adapter that has no slot yet. Its load will say what is wrong with it."""
        try:
            with self._writer.beside_steps():
                self._host.get(digest)
        except Exception:
            log.debug("adapter %s cannot be converted ahead", digest[:12], exc_info=True)
            with contextlib.suppress(DeviceLost):
                self._host.forget(digest)
        finally:
            self._staging.discard(digest)
            self._wake()

    def _load(self, digest: str, slot: int) -> None:
        started = time.monotonic()
        error: Failure | None = None
        nbytes = 0
        try:
            with self._writer.beside_steps():
                adapter = self._host.get(digest)
                nbytes = adapter.nbytes
                with self._followers.filling(slot, digest):
                    self._writer.fill(slot, adapter)
        except MoraError as e:
            error = Failure.of(e)
        except Exception:
            log.exception("loading adapter %s failed", digest[:12])
            error = Failure(
                "INTERNAL",
                "LOAD_FAILED",
                "adapter: it could not be loaded; retry, then register it anew",
            )
            with contextlib.suppress(DeviceLost):
                self._host.forget(digest)
        self._done.put(AdapterLoad(digest, time.monotonic() - started, nbytes, error))
        self._wake()


class SlotWriter:
    """Writes adapters into slots that nobody reads meanwhile. For one thread."""

    def __init__(self, slots: AdapterSlots) -> None:
        self.slots = slots
        # What each slot holds: (layer, projection) -> rows that are not zero.
        self._filled: list[dict[tuple[int, str], int]] = [{} for _ in range(slots.slots)]
        cuda = slots.device.type == "cuda"
        self._stream = (
            torch.cuda.Stream(slots.device)  # type: ignore[no-untyped-call]
            if cuda
            else None
        )

    def beside_steps(self) -> AbstractContextManager[object]:
        """On a card, what is launched inside runs beside the steps: DoRA's passes over the base,
        copies from pinned memory. ``fill`` waits for its end, so that whoever is told of it reads
        what was copied; the steps' own stream waits for nothing.
        """
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def fill(self, slot: int, adapter: HostAdapter) -> None:
        """Copy an adapter into a slot, and zero what the one before leaves there besides."""
        with self.beside_steps():
            self._fill(slot, adapter)

    @torch.no_grad()
    def _fill(self, slot: int, adapter: HostAdapter) -> None:
        slots, filled = self.slots, self._filled[slot]
        before = dict(filled)
        if adapter.dora:  # those of projections that it leaves alone
            for part in slots.parts():
                part.dora[slot] = 0
        for module in adapter.modules:
            key = module.layer, module.projection
            part, rank, old = slots.projection(*key), module.rank, before.pop(key, 0)
            filled[key] = max(rank, old)  # noted first: a load may break off
            for tensor, rows in zip(part.tensors, module.rows, strict=True):
                tensor[slot, :rank].copy_(rows, non_blocking=True)
                if old > rank:
                    tensor[slot, rank:old] = 0
            filled[key] = rank
            if module.dora is not None:
                part.dora[slot].copy_(module.dora, non_blocking=True)
        for key, old in before.items():
            part = slots.projection(*key)
            for tensor in part.tensors:
                tensor[slot, :old] = 0
            del filled[key]
        slots.ranks[slot] = adapter.rank
        slots.has_dora[slot] = adapter.dora
        if self._stream is not None:
            self._stream.synchronize()


def start_loading_thread() -> None:
    """Begin a thread that loads.

    One thread of torch's: a second team would take the cores of the running step.
    """
    torch.set_num_threads(1)
    if sys.platform == "linux":  # elsewhere priorities are those of the process
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
