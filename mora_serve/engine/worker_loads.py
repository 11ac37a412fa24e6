"""A worker's loads of adapters: it follows rank 0's, see team_loads.py."""

from __future__ import annotations

import logging
import mmap
import os
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

import numpy as np
import torch
from torch import Tensor

from mora_serve.adapters.validate import ValidatedAdapter
from mora_serve.engine import orders
from mora_serve.engine.adapter_pool import SlotWriter
from mora_serve.engine.host_adapters import Converter, HostAdapter
from mora_serve.model.decoder import Decoder
from mora_serve.model.lora import AdapterSlots

log = logging.getLogger(__name__)


class WorkerLoads:
    """Carries out orders of adapters that come over ``connection``, on one thread."""

    def __init__(self, connection: Connection, decoder: Decoder, slots: AdapterSlots) -> None:
        self._connection = connection
        self._converter = Converter(decoder, slots)
        self._writer = SlotWriter(slots)
        self._kept: dict[str, HostAdapter] = {}
        self._last: tuple[str, HostAdapter] | None = None

    def run(self) -> None:
        """Until rank 0 hangs up."""
        while True:
            try:
                order = self._connection.recv()
                if isinstance(order, orders.Convert):
                    handle = recv_handle(self._connection)
            except (EOFError, OSError):
                return
            if isinstance(order, orders.Convert):
                self._answer(lambda: self._convert(order, handle))  # noqa: B023 - called at once
            elif isinstance(order, orders.Fill):
                self._answer(lambda: self._fill(order))  # noqa: B023 - called at once
            elif isinstance(order, orders.Keep):
                if self._last is not None and self._last[0] == order.digest:
                    self._kept[order.digest] = self._last[1]
            elif isinstance(order, orders.Drop):
                self._kept.pop(order.digest, None)
                if order.scales:
                    self._converter.forget(order.digest)

    def _answer(self, work: object) -> None:
        error = ""
        try:
            work()  # type: ignore[operator]
        except _Abandoned:
            error = "abandoned"
        except Exception as e:
            log.exception("an adapter cannot be loaded")
            error = type(e).__name__
        self._connection.send(orders.Done(error))

    def _convert(self, order: orders.Convert, handle: int) -> None:
        try:
            file = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(handle)
        adapter = ValidatedAdapter(
            digest=order.digest,
            rank=order.rank,
            dora=order.dora,
            rslora=False,  # its scaling is in the modules
            nbytes=order.nbytes,
            modules=order.modules,
            config=b"",
            weights=memoryview(file),
        )
        self._last = None
        made = self._converter.convert(order.digest, adapter, self._total)
        self._last = order.digest, made

    def _total(self, numbers: Tensor) -> Tensor:
        self._connection.send(orders.Squares(numbers.float().numpy().tobytes()))
        answer = self._connection.recv()
        if not isinstance(answer, orders.Totals):
            raise _Abandoned
        return torch.from_numpy(np.frombuffer(answer.values, np.float32).copy())

    def _fill(self, order: orders.Fill) -> None:
        adapter = self._kept.get(order.digest)
        if adapter is None and self._last is not None and self._last[0] == order.digest:
            adapter = self._last[1]
        if adapter is None:
            raise LookupError("an adapter to be copied is not here")
        self._writer.fill(order.slot, adapter)


class _Abandoned(Exception):
    """Another rank could not convert the adapter."""
