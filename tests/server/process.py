"""A server in a process of its own, and its health."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

from mora_serve.client import Client

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(client: Client, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    stub = health_pb2_grpc.HealthStub(client.channel)
    return stub.Check(request, timeout=30, wait_for_ready=True).status


@contextlib.contextmanager
def server_process(
    root: Path, fault: str = "", **flags: object
) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    """The command with a client of it; killed if it is still there at the end.

    ``fault`` is one of tests.server.faulty's.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    program = ["tests.server.faulty", fault] if fault else ["mora_serve"]
    command = [sys.executable, "-m", *program, "serve"]
    flags = {
        "base.model": root / "base",
        "base.quantization": "none",
        "server.port": port,
        "server.metrics_port": -1,
        **flags,
    }
    command += [f"--{key}={value}" for key, value in flags.items()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        with Client(f"127.0.0.1:{port}", timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()
