"""The files of an upload: counted before they are kept, and kept outside memory."""

from __future__ import annotations

import mmap
import tempfile
from typing import IO

from mora_serve.adapters import files
from mora_serve.adapters.disk import FULL
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument, ResourceExhausted
from mora_serve.server.convert import invalid


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
        already, or one beyond its limit; ResourceExhausted when the disk is full.
        """
        size = self._sizes.get(name, 0) + len(data)
        try:
            files.check_size(name, size, self._limits)
        except InvalidArgument as e:
            message = e.message.removeprefix("file: ")
            raise invalid("chunk.file", message, e.reason) from None
        if name != self._last and name in self._files:
            raise invalid("chunk.file", f"{name} is ended; send the chunks of a file in a row")
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
                raise files.missing(name)
        weights = self._files[files.WEIGHTS]
        card = self._read(files.CARD) if files.CARD in self._files else None
        mapped = mmap.mmap(weights.fileno(), 0, access=mmap.ACCESS_READ)
        return self._read(files.CONFIG), mapped, card

    def _read(self, name: str) -> bytes:
        self._files[name].seek(0)
        return self._files[name].read()
