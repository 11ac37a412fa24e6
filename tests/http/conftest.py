"""Servers with an HTTP port, and the clients that ask them."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mora_serve.config import Config, load_config
from tests.server.conftest import (
    Running,
    configuration,
    configure,
    root,
    running,
    running_with,
)

PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # nothing uses it, and it reads no files
__all__ = ["configure", "root"]  # fixtures


def url(serving: Running) -> str:
    """Where a server's HTTP API is."""
    return f"http://127.0.0.1:{serving.server.http_port}"


@contextlib.contextmanager
def asking(serving: Running, key: str = "", **headers: str) -> Iterator[httpx.Client]:
    """A plain HTTP client of a server."""
    if key:
        headers["authorization"] = f"Bearer {key}"
    with httpx.Client(base_url=url(serving), headers=headers, timeout=60, verify=PLAIN) as client:
        yield client


def openai_of(serving: Running, kind: Callable[..., Any] = openai.OpenAI, **options: Any) -> Any:
    """OpenAI's own client of a server, which does not retry unless told to."""
    given = {"base_url": f"{url(serving)}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}
    return kind(**{**given, **options})


def with_http(root: Path, **sections: dict[str, Any]) -> Config:
    """The configuration of the gRPC tests, and an HTTP port."""
    sections["server"] = {"http_port": 0, **sections.get("server", {})}
    return configuration(root, **sections)


@pytest.fixture(scope="session")
def serving(root: Path) -> Iterator[Running]:
    """One server for the tests that leave it as they found it, with adapters rev and sum."""
    with running_with(with_http(root), "rev", "sum") as serving:
        yield serving


@pytest.fixture(scope="session")
def demo() -> Iterator[Running]:
    """The bundled base, adapters and router."""
    flags = {"server.port": 0, "server.metrics_port": -1, "server.http_port": 0}
    with running(load_config(environ={}, flags=flags)) as serving:
        yield serving


@pytest.fixture
def http(serving: Running) -> Iterator[httpx.Client]:
    """A plain client of the shared server."""
    with asking(serving) as client:
        yield client


@pytest.fixture
def client(serving: Running) -> Iterator[openai.OpenAI]:
    """OpenAI's client of the shared server."""
    with openai_of(serving) as client:
        yield client
