"""A server in a process of its own: started, waited for, stopped the way an operator would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO, TYPE_CHECKING

from mora_serve.errors import Unavailable

if TYPE_CHECKING:
    from mora_serve.client import Client


class ServerProcess:
    """``mora-serve serve`` on a free port of loopback; a context that stops it at its end.

    ``flags`` are configuration keys (``{"adapters.slots": 8}``). The server's log is kept in
    a temporary file; ``log`` gives it.
    """

    def __init__(self, flags: Mapping[str, object] | None = None) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        settings = {
            "server.host": "127.0.0.1",
            "server.port": self.address.rpartition(":")[2],
            "server.metrics_port": -1,
            **(flags or {}),
        }
        self._command = [sys.executable, "-m", "mora_serve", "serve"]
        self._command += [f"--{key}={value}" for key, value in settings.items()]
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ServerProcess:
        self._process = subprocess.Popen(  # noqa: S603 - our own command line
            self._command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(grace=2.0 if error else 30.0)
        self._log.close()

    def wait_until_ready(self, client: Client, timeout: float = 300.0) -> float:
        """Wait until the server serves; returns the seconds it took.

        Raises Unavailable, with the end of the log, when it has ended or ``timeout`` is over.
        """
        start = time.monotonic()
        while (waited := time.monotonic() - start) < timeout:
            if self._process is None or self._process.poll() is not None:
                break
            try:
                client.wait_until_ready(timeout=0.5)
            except Unavailable:
                continue
            return time.monotonic() - start
        raise Unavailable(f"the server did not start in {waited:.0f} s; its log ends:\n{self.log}")

    def stop(self, grace: float = 30.0) -> int:
        """Ask the server to drain, wait ``grace`` seconds, then kill it; its exit status."""
        process = self._process
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
        return process.wait()

    @property
    def pid(self) -> int:
        """The process id; 0 when it was not started."""
        return self._process.pid if self._process is not None else 0

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """The last 4,000 characters of what the server has written."""
        return self.whole_log[-4000:]

    @property
    def whole_log(self) -> str:
        """All that the server has written."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")


def environment() -> dict[str, str]:
    """The surroundings' without their settings, which would change what a caller asks for."""
    return {k: v for k, v in os.environ.items() if not k.startswith("MORA_")}


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
