"""The nouns that every part shares: plain, frozen, serialisable, without torch or grpc."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from mora_serve.errors import Failure

DEFAULT_TENANT = "default"
API_KEY = "MORA_API_KEY"  # the variable of the environment that holds a client's key
SHARED_TENANT = "shared"  # owns what every tenant may use


class Source(enum.Enum):
    """Who chose a request's mixture."""

    EXPLICIT = "explicit"  # the caller gave the mixture
    TASK = "task"  # the caller gave tasks, each resolved to an adapter
    ROUTER = "router"  # the router picked
    ABSTAINED = "abstained"  # the router declined: the base answers
    BASE = "base"  # the caller asked for the base


@dataclass(frozen=True, slots=True)
class AdapterWeight:
    """One adapter of a mixture: ``weight`` multiplies the adapter's delta.

    ``digest`` (hex SHA-256 of the adapter's content) is empty until the mixture is resolved.
    """

    adapter: str
    weight: float = 1.0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Adapters and their weights; empty means the base alone."""

    adapters: tuple[AdapterWeight, ...] = ()

    def merged(self) -> tuple[tuple[str, float], ...]:
        """(digest, weight) of a resolved mixture: sorted, equal digests added, zeros dropped."""
        weights: dict[str, float] = {}
        for a in self.adapters:
            weights[a.digest] = weights.get(a.digest, 0.0) + a.weight
        return tuple((d, w) for d, w in sorted(weights.items()) if w != 0.0)

    def key(self) -> bytes:
        """The identity of a resolved mixture for cache keys, weights as float32 bits."""
        return b"".join(bytes.fromhex(d) + struct.pack("<f", w) for d, w in self.merged())


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the router says of one adapter: its score, a mean of cosines; its gate's probability."""

    adapter: str
    score: float
    probability: float


@dataclass(frozen=True, slots=True)
class Decision:
    """The mixture a request runs with, who chose it, and what the router saw."""

    mixture: Mixture
    source: Source
    candidates: tuple[Candidate, ...] = ()
    router_digest: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when a request ends.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch a filter off.
    ``seed`` fixes the noise: the same seed gives the same text whatever else is in the batch.
    ``logprobs`` is the number of alternatives reported a token; None reports nothing.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One generation as the engine sees it: token ids and a resolved mixture.

    ``arrival`` and ``deadline`` are ``time.monotonic()`` seconds; no deadline is None.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    mixture: Mixture = field(default_factory=Mixture)
    tenant: str = DEFAULT_TENANT
    arrival: float = 0.0
    deadline: float | None = None


class Finish(enum.Enum):
    """Why a request ended."""

    STOP = "stop"  # an end token, a stop id or a stop string
    LENGTH = "length"  # max_tokens or the context's end
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


class Logprob(NamedTuple):
    """One alternative at a position: natural logarithm of its probability."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenOut:
    """One sampled token; ``top`` holds the requested alternatives, best first."""

    id: int
    logprob: float | None = None
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts and timings (seconds) of a finished request."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """What one step did for one request: engine -> server.

    ``text`` is the text that became final in this step; it never ends inside a character, and
    holds back what may turn out to be the start of a stop string. The last event of a request
    has ``finish`` and ``usage`` set, and ``error`` when ``finish`` is ERROR.
    """

    request_id: str
    tokens: tuple[TokenOut, ...] = ()
    text: str = ""
    finish: Finish | None = None
    usage: Usage | None = None
    error: Failure | None = None


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """One adapter brought into a device slot (or the reason why it was not)."""

    digest: str
    seconds: float
    nbytes: int
    error: Failure | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics: gauges as they are now, counters since the start."""

    running: int = 0
    waiting: int = 0
    kv_pages: int = 0
    kv_pages_used: int = 0
    page_size: int = 0  # tokens a page
    slots: int = 0
    slots_used: int = 0  # by running requests
    resident: tuple[str, ...] = ()  # digests in device slots
    running_adapters: tuple[str, ...] = ()  # digests used by running requests
    waiting_adapters: tuple[str, ...] = ()  # digests wanted by waiting requests
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    pooled_tokens: int = 0  # read by the base for the router
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # of these, found
    preemptions: int = 0
    slot_hits: int = 0
    slot_misses: int = 0
    slot_evictions: int = 0
    failed_runs: int = 0  # forwards that raised, those of parts of a batch included
    integrity_checks: int = 0
    integrity_violations: int = 0
