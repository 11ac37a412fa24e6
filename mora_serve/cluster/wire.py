"""What crosses between gateways and replicas, besides requests and their events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Protocol

from mora_serve.core import EngineStats, Event, Request
from mora_serve.errors import Failure
from mora_serve.router.arrays import Floats

OTHER_BASE = Failure(
    "UNAVAILABLE",
    "OTHER_BASE",
    "server: the replicas are being given another base; retry",
    retry_after=1.0,
)


@dataclass(frozen=True, slots=True)
class Description:
    """What a replica says of itself once; ``max_context`` in tokens, ``slots`` of adapters."""

    name: str
    fingerprint: str
    quantization: str
    dtype: str
    device: str
    max_context: int
    slots: int
    adapter_dtype: str


@dataclass(frozen=True, slots=True)
class Pooling:
    """What ``Engine.pooled_hidden`` is asked for."""

    texts: tuple[str, ...]
    depth: int
    max_tokens: int
    background: bool = False
    tenant: str = ""


class ReplicaLost(Exception):
    """The replica has died, or goes: another one may serve. ``said`` is its own word for it."""

    def __init__(self, said: Failure | None = None) -> None:
        super().__init__()
        self.said = said


class Replicas(Protocol):
    """How the replicas are called; each method raises MoraError besides what it says."""

    def stream(
        self, request: Request, left: float | None, fingerprint: str
    ) -> AsyncGenerator[Event | Failure | None, None]:
        """Give a request to one of them: None once it is admitted, then its events.

        A Failure ends it. ``left`` is the time to its deadline, in seconds, ``fingerprint`` of the
        base that it is for. Raises ReplicaLost.
        """

    async def pool(self, pooling: Pooling, fingerprint: str) -> Floats:
        """What ``Engine.pooled_hidden`` gives, by one of them that runs this base."""

    async def describe(self) -> Description:
        """What one of them says of itself; waits for the first. Raises ReplicaLost."""

    async def reports(self) -> Mapping[str, EngineStats]:
        """What each of them that is up says of its engine, by its id."""
