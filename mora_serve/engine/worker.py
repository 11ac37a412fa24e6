"""A rank of tensor parallelism other than rank 0: a process that follows orders (see team.py).

    python -m mora_serve.engine.worker HANDLE HANDLE

Rank 0 starts it, with handles of the pipes of orders and of adapters. It ends when the first one
breaks, whatever it is doing.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from mora_serve.engine import orders
from mora_serve.engine.adapter_pool import start_loading_thread
from mora_serve.engine.failures import is_memory
from mora_serve.engine.forward import Follower
from mora_serve.engine.group import RankGroup
from mora_serve.engine.torch_forward import TorchForward
from mora_serve.engine.worker_loads import WorkerLoads
from mora_serve.errors import MoraError
from mora_serve.model.attention import KVPages
from mora_serve.model.loading import load_base
from mora_serve.model.lora import AdapterSlots
from mora_serve.model.pooling import pool_states

log = logging.getLogger(__name__)


class Worker:
    """One rank. ``link`` is the pipe of orders, ``loads`` that of adapters."""

    def __init__(self, link: Connection, loads: Connection) -> None:
        self._link, self._loads = link, loads
        self._sending = threading.Lock()
        self._orders: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._folder: Path | None = None
        self._follower: Follower | None = None

    def run(self) -> None:
        """Follow orders. Does not return."""
        threading.Thread(target=self._read, name="orders", daemon=True).start()
        self.say(orders.Hello())
        begin = self._orders.get()
        assert isinstance(begin, orders.Begin)  # noqa: S101 - rank 0 says it first
        rank = begin.rank
        logging.basicConfig(level=begin.log_level, handlers=[_Lines(self)], force=True)
        try:
            self._begin(begin)
            serve = self._orders.get()
            assert isinstance(serve, orders.Serve)  # noqa: S101 - it says it second
            self._serve(serve)
        except MoraError as e:
            self._refuse(e.message, e.field)
        except Exception as e:
            log.debug("the start has failed", exc_info=True)
            why = str(e).partition("\n")[0]
            remedy = "lower it, or mend the device"
            if is_memory(e):
                remedy = "lower adapters.slots, adapters.max_rank or engine.kv_bytes"
            self._refuse(
                f"engine.tensor_parallel: rank {rank} cannot start ({type(e).__name__}: {why}); "
                f"{remedy}",
                "engine.tensor_parallel",
            )
        while True:
            self._follow(self._orders.get())

    def say(self, message: object) -> None:
        """Tell rank 0, if it is there still."""
        try:
            with self._sending:
                self._link.send(message)
        except OSError:
            self._end()

    def _read(self) -> None:
        """Orders, until there are no more; then nothing is awaited."""
        try:
            while True:
                order = self._link.recv()
                if isinstance(order, orders.Begin):
                    self._folder = Path(order.path).parent
                self._orders.put(order)
        except (EOFError, OSError):
            self._end()

    def _begin(self, begin: orders.Begin) -> None:
        device = torch.device(begin.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        parts = begin.rank, begin.size, device, Path(begin.path), begin.seconds
        self._group = RankGroup(*parts)
        self._base = base = load_base(begin.config.base, group=self._group)
        self.say(orders.Loaded(base.fingerprint, str(base.decoder.dtype)))

    def _serve(self, serve: orders.Serve) -> None:
        decoder = self._base.decoder
        shape, memory = decoder.shape, (decoder.dtype, decoder.device)
        slots = AdapterSlots(shape, serve.slots, serve.max_rank, *memory)
        sizes = shape.layers, shape.kv_heads, shape.head_dim, serve.pages, serve.page_size
        self._kv = kv = KVPages(*sizes, *memory)
        if serve.room is None:
            self._follower = TorchForward(decoder, slots, kv, serve.threads)
        else:
            from mora_serve.engine.kernel_step import KernelStep

            self._follower = KernelStep(decoder, slots, kv, serve.room)
        if serve.threads:
            torch.set_num_threads(serve.threads)
        loads = WorkerLoads(self._loads, decoder, slots)

        def load() -> None:
            start_loading_thread()
            if decoder.device.type == "cuda":
                torch.cuda.set_device(decoder.device)
            loads.run()

        threading.Thread(target=load, name="adapter-load", daemon=True).start()
        self.say(orders.Serving())

    def _follow(self, order: object) -> None:
        if isinstance(order, orders.Settle):
            self.say(orders.Settled(self._group.calls))
            return
        try:
            self._do(order)
        except Exception:
            log.exception("an order raised")
            self.say(orders.Raised())

    @torch.inference_mode()
    def _do(self, order: object) -> None:
        follower = self._follower
        assert follower is not None  # noqa: S101 - it is serving
        if isinstance(order, orders.Step):
            follower.follow(order.inputs)
        elif isinstance(order, orders.Prepare):
            follower.prepare()
        elif isinstance(order, orders.Pool):
            pool_states(self._base.decoder, order.texts, order.depth)
        elif isinstance(order, orders.Clear):
            self._kv.clear(order.pages)

    def _refuse(self, message: str, field: str) -> None:
        self.say(orders.Refused(message, field))
        os._exit(1)

    def _end(self) -> None:
        """At once: rank 0 is gone, or wants it. Other threads may wait for it in vain."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # a killed rank 0 leaves it behind
        os._exit(0)


class _Lines(logging.Handler):
    """Has rank 0 log what is logged here."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            self._worker.say(orders.LogLine(record.name, record.levelno, self.format(record)))
        except Exception:
            self.handleError(record)


def main() -> None:
    """Run a worker on the handles of the command line."""
    for number in (signal.SIGINT, signal.SIGTERM):  # are rank 0's to act upon
        signal.signal(number, signal.SIG_IGN)
    Worker(*(Connection(int(handle)) for handle in sys.argv[1:3])).run()


if __name__ == "__main__":
    main()
