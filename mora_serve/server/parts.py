"""What a server needs of the base and of the engine, wherever they run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from mora_serve.core import AdapterLoad, EngineStats, Event, Finish, Request
from mora_serve.model.shape import ModelShape
from mora_serve.model.tokenizer import Tokenizer
from mora_serve.router.arrays import Floats


class BaseModel(Protocol):
    """The base, as the server speaks of it. ``dtype`` is of its activations: bf16 or fp32."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def shape(self) -> ModelShape:
        """Its sizes."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""

    @property
    def fingerprint(self) -> str:
        """What tells it from other bases."""

    @property
    def quantization(self) -> str:
        """How its linear layers are kept."""

    @property
    def dtype(self) -> str:
        """What it computes in."""

    @property
    def device(self) -> str:
        """What it computes on."""


class ServedEngine(Protocol):
    """An engine in this process, or those of the replicas; see ``mora_serve.engine.engine``."""

    @property
    def base(self) -> BaseModel:
        """The base that it runs."""

    @property
    def max_context(self) -> int:
        """Prompt and answer in tokens, at most."""

    @property
    def slots(self) -> int:
        """Adapters on the device at the same time; of a replica, where there are several."""

    @property
    def adapter_dtype(self) -> str:
        """How these are kept."""

    def start(
        self,
        deliver: Callable[[Sequence[Event | AdapterLoad]], None],
        failed: Callable[[], object] | None = None,
    ) -> None:
        """Begin to serve."""

    def stop(self) -> None:
        """Abort what runs and end."""

    def submit(self, request: Request) -> Awaitable[None] | None:
        """Queue a request."""

    def check_line(self, tenant: str, prompt: int, max_tokens: int, left: float | None) -> None:
        """Raise what ``submit`` would for want of a place, or of time."""

    def abort(self, request_id: str, finish: Finish = Finish.CANCELLED) -> None:
        """End a request early."""

    def pooled_hidden(
        self,
        texts: Sequence[str],
        depth: int,
        max_tokens: int,
        *,
        background: bool = False,
        tenant: str = "",
    ) -> Future[Floats]:
        """The pooled hidden states [texts, hidden] of the base, in a while."""

    def pin(self, digest: str) -> None:
        """Keep an adapter in its slot."""

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted again."""

    def stats(self) -> EngineStats:
        """The newest snapshot for metrics."""
