"""Rank 0's loads of adapters, done by every worker as well.

A worker reads of an adapter's file what its part of the base needs, from one copy in memory that
all of them share.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle

import numpy as np
import torch
from torch import Tensor

from mora_serve.adapters.validate import ValidatedAdapter
from mora_serve.engine import orders
from mora_serve.engine.failures import DeviceLost
from mora_serve.engine.followers import Total

SECONDS = 300.0  # that a worker may take to convert or copy one adapter


class TeamLoads:
    """The workers as followers (see followers.py), by rank. For the loading thread.

    ``lose`` makes the loss of a rank known, and gives the error that says so.
    """

    def __init__(
        self, workers: Mapping[int, Connection], lose: Callable[[str], DeviceLost]
    ) -> None:
        self._workers, self._lose = workers, lose
        self._owing: set[int] = set()  # have not said yet whether they are done

    @contextmanager
    def converting(self, digest: str, adapter: ValidatedAdapter) -> Iterator[Total]:
        """See Followers."""
        parts = adapter.rank, adapter.dora, adapter.nbytes, adapter.modules
        handle = _shared(adapter.weights)
        try:
            self._tell(orders.Convert(digest, *parts))
            for rank, connection in self._workers.items():
                try:
                    send_handle(connection, handle, 0)
                except OSError as e:
                    raise self._gone(rank) from e
        finally:
            os.close(handle)
        self._owing = set(self._workers)
        try:
            yield self._total
            self._finish()
        except DeviceLost:
            raise
        except BaseException:
            self._abandon()
            raise

    def keep(self, digest: str) -> None:
        """See Followers."""
        self._tell(orders.Keep(digest))

    def drop(self, digest: str) -> None:
        """See Followers."""
        self._tell(orders.Drop(digest))

    def forget(self, digest: str) -> None:
        """See Followers."""
        self._tell(orders.Drop(digest, scales=True))

    @contextmanager
    def filling(self, slot: int, digest: str) -> Iterator[None]:
        """See Followers."""
        self._tell(orders.Fill(slot, digest))
        self._owing = set(self._workers)
        try:
            yield
        except BaseException:
            self._abandon()
            raise
        self._finish()

    def _total(self, numbers: Tensor) -> Tensor:
        total = numbers.float()
        for rank in self._workers:
            answer = self._read(rank)
            if not isinstance(answer, orders.Squares):
                raise RuntimeError(f"rank {rank} has no numbers to add: {answer}")
            total = total + torch.from_numpy(np.frombuffer(answer.values, np.float32).copy())
        self._tell(orders.Totals(total.numpy().tobytes()))
        return total

    def _finish(self) -> None:
        """Hear of all that they are done. Raises RuntimeError where one is not."""
        errors = []
        for rank in sorted(self._owing):
            answer = self._read(rank)
            if not isinstance(answer, orders.Done):
                raise RuntimeError(f"rank {rank} has numbers to add that nobody asked for")
            if answer.error:
                errors.append(f"rank {rank}: {answer.error}")
        if errors:
            raise RuntimeError("; ".join(errors))

    def _abandon(self) -> None:
        """Nobody waits any longer for sums, and all have ended what they were doing."""
        if self._owing:
            self._tell(orders.Abandon())
        while self._owing:
            self._read(min(self._owing))

    def _tell(self, order: object) -> None:
        for rank, connection in self._workers.items():
            try:
                connection.send(order)
            except OSError as e:
                raise self._gone(rank) from e

    def _read(self, rank: int) -> object:
        connection = self._workers[rank]
        try:
            if not connection.poll(SECONDS):
                raise self._lose(f"rank {rank} has not loaded an adapter in {SECONDS:g} s")
            answer: object = connection.recv()
        except (EOFError, OSError) as e:
            raise self._gone(rank) from e
        if isinstance(answer, orders.Done):
            self._owing.discard(rank)
        return answer

    def _gone(self, rank: int) -> DeviceLost:
        return self._lose(f"the process of rank {rank} has ended")


def _shared(data: memoryview) -> int:
    """The handle of a file in memory, without a name, that holds ``data``."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("adapter")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    try:
        with open(handle, "wb", closefd=False) as file:
            file.write(data)
    except BaseException:
        os.close(handle)
        raise
    return handle
