"""The processes of ranks other than rank 0, as rank 0 starts them and talks to them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mora_serve
from mora_serve.errors import ConfigError

WORKER = "mora_serve.engine.worker"


@dataclass(slots=True, eq=False)
class WorkerProcess:
    """A worker, its pipes, and what it has said on that of orders."""

    rank: int
    process: subprocess.Popen[bytes]
    orders: Connection
    loads: Connection
    answers: dict[type, Any] = field(default_factory=dict)
    raised: float | None = None  # when an order did that has not been settled


def start(rank: int) -> WorkerProcess:
    """Start a worker's process, whose end of the pipes it alone has.

    Raises ConfigError where the system starts no more processes.
    """
    (mine, its), (my_loads, its_loads) = Pipe(), Pipe()
    root = str(Path(mora_serve.__file__).parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    handles = its.fileno(), its_loads.fileno()
    try:
        process = subprocess.Popen(  # noqa: S603 - this program's own module
            [sys.executable, "-m", WORKER, *map(str, handles)],
            pass_fds=handles,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_handle(sys.stderr) else subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for rank 0, which drains
        )
    except OSError as e:
        raise ConfigError(
            f"engine.tensor_parallel: the process of rank {rank} cannot be started "
            f"({e.strerror}); set it to 1",
            field="engine.tensor_parallel",
        ) from e
    finally:
        its.close()
        its_loads.close()
    return WorkerProcess(rank, process, mine, my_loads)


def _has_handle(file: Any) -> bool:
    try:
        return file is not None and file.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False


def hang_up(connection: Connection) -> None:
    """Whoever reads at either end finds it ended; its handle stays, as another thread reads it."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
