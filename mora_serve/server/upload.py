"""The files of an upload: counted before they are kept, and kept outside memory."""

from __future__ import annotations

import asyncio
import mmap
import tempfile
import time
from collections.abc import AsyncIterator
from typing import IO

from mora_serve.adapters import absent, files
from mora_serve.adapters.disk import FULL
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument, ResourceExhausted
from mora_serve.server.convert import invalid
from mora_serve.v1 import adapters_pb2 as pb

LEAST_RATE = 32 * 1024  # bytes a second that an upload brings in the mean, behind its start


async def steadily(
    messages: AsyncIterator[pb.UploadAdapterRequest],
    stall_seconds: float,
    least_rate: float = LEAST_RATE,
) -> AsyncIterator[pb.UploadAdapterRequest]:
    """The messages of an upload, which holds a place, and so has to go on and come to an end.

    Raises ResourceExhausted where the next one does not come in ``stall_seconds``, or where they
    were waited for longer than twice that and the time for their bytes at ``least_rate``. The
    time that the server takes for them does not count.
    """
    waited, received = 0.0, 0
    while True:
        left = 2 * stall_seconds + received / least_rate - waited
        if left <= 0:
            raise _slow(least_rate)
        start = time.monotonic()
        try:
            async with asyncio.timeout(min(stall_seconds, left)):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise (_stalled(stall_seconds) if left > stall_seconds else _slow(least_rate)) from None
        waited += time.monotonic() - start
        received += len(message.chunk.data)
        yield message


def _stalled(seconds: float) -> ResourceExhausted:
    return ResourceExhausted(
        f"upload: nothing came for {seconds:g} seconds; send the messages one after another, from "
        "the start",
        reason="STREAM_STALLED",
    )


def _slow(rate: float) -> ResourceExhausted:
    return ResourceExhausted(
        f"upload: it brings less than {rate / 1024:g} KiB a second; send it over a faster "
        "connection, from the start, or put the files under adapters.root and register them there",
        reason="UPLOAD_TOO_SLOW",
    )


class Upload:
    """Receives files one after another; a context that removes them at its end.

    Its methods touch the disk, so they belong on a thread of their own.
    """

    def __init__(self, limits: AdaptersConfig) -> None:
        self._limits = limits
        self._files: dict[str, IO[bytes]] = {}
        self._sizes: dict[str, int] = {}
        self._last = ""

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def write(self, name: str, data: bytes) -> None:
        """Append to the file that is being received, or begin another.

        Raises InvalidArgument for a name that is no part of an adapter, a file that was ended
        already, one beyond its limit, or no data; ResourceExhausted when the disk is full.
        """
        size = self._sizes.get(name, 0) + len(data)
        try:
            files.check_size(name, size, self._limits)
        except InvalidArgument as e:
            message = e.message.removeprefix("file: ")
            raise invalid("chunk.file", message, e.reason) from None
        if name != self._last and name in self._files:
            raise invalid("chunk.file", f"{name} is ended; send the chunks of a file in a row")
        if not data:
            raise invalid("chunk.data", "it is empty; send chunks with some data", "EMPTY_CHUNK")
        try:
            if name not in self._files:  # without a buffer, so that what is written is on the disk
                self._files[name] = tempfile.TemporaryFile(  # noqa: SIM115
                    prefix="mora-upload-", buffering=0
                )
            self._last, self._sizes[name] = name, size
            rest = memoryview(data)
            while rest:
                rest = rest[self._files[name].write(rest) :]
        except OSError as e:
            if e.errno not in FULL:
                raise
            raise ResourceExhausted(
                "chunk.data: the server's temporary disk is full; make room there",
                reason="DISK_FULL",
            ) from None

    def files(self) -> tuple[bytes, mmap.mmap, bytes | None]:
        """Configuration, a map of the weights, and the card if there is one.

        Raises InvalidArgument where one of the first two is missing.
        """
        for name in (files.CONFIG, files.WEIGHTS):
            if not self._sizes.get(name):
                raise absent.missing(name)
        weights = self._files[files.WEIGHTS]
        card = self._read(files.CARD) if files.CARD in self._files else None
        mapped = mmap.mmap(weights.fileno(), 0, access=mmap.ACCESS_READ)
        return self._read(files.CONFIG), mapped, card

    def _read(self, name: str) -> bytes:
        self._files[name].seek(0)
        return self._files[name].read()
