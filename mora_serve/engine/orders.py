"""What rank 0 and its workers say to each other, over two pipes a worker: plain messages.

One pipe is for steps, and a worker's engine thread reads it; the other is for adapters, and its
loading thread reads it. Orders are carried out as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mora_serve.adapters.validate import LoraModule
from mora_serve.config import Config
from mora_serve.engine.step_inputs import StepInputs

if TYPE_CHECKING:
    from mora_serve.engine.kernel_step import LaidOut, Room  # imports triton

# Of steps, to a worker.


@dataclass(frozen=True, slots=True)
class Begin:
    """Join the group that meets at the file ``path``, and load a part of the base."""

    config: Config
    rank: int
    size: int
    device: str
    path: str
    seconds: float  # to wait for other ranks
    log_level: int


@dataclass(frozen=True, slots=True)
class Serve:
    """Make slots, key/value pages and what steps are computed by: kernels, where ``room`` says for
    how much, else torch.
    """

    slots: int
    max_rank: int
    pages: int
    page_size: int
    threads: int
    room: Room | None = None


@dataclass(frozen=True, slots=True)
class Prepare:
    """Do what would make the first steps slow, together with all ranks."""


@dataclass(frozen=True, slots=True)
class Step:
    """Compute a step, together with all ranks."""

    inputs: StepInputs | LaidOut


@dataclass(frozen=True, slots=True)
class Pool:
    """Compute the pooled states of texts after ``depth`` layers, together with all ranks."""

    texts: Sequence[Sequence[int]]
    depth: int


@dataclass(frozen=True, slots=True)
class Clear:
    """Zero key/value pages."""

    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Settle:
    """Something raised on rank 0: answer with ``Settled``."""


# Of steps, from a worker.


@dataclass(frozen=True, slots=True)
class Hello:
    """It is there."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Its part of the base is loaded: which base, and the type that it computes in."""

    fingerprint: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Serving:
    """Steps can come."""


@dataclass(frozen=True, slots=True)
class Refused:
    """It cannot start, and ends: a ConfigError's message and field."""

    message: str
    field: str


@dataclass(frozen=True, slots=True)
class Raised:
    """An order raised; the log says what."""


@dataclass(frozen=True, slots=True)
class Settled:
    """All orders so far have ended; ``calls`` are the group's (see RankGroup)."""

    calls: int


@dataclass(frozen=True, slots=True)
class LogLine:
    """For rank 0's log, under a logger's name."""

    name: str
    level: int
    text: str


# Of adapters, to a worker.


@dataclass(frozen=True, slots=True)
class Convert:
    """Convert an adapter; the handle of a file with its weights follows."""

    digest: str
    rank: int
    dora: bool
    nbytes: int
    modules: tuple[LoraModule, ...]


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums of all ranks' ``Squares``: float32, as bytes."""

    values: bytes


@dataclass(frozen=True, slots=True)
class Abandon:
    """There will be no sums."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Hold the adapter converted last."""

    digest: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Hold an adapter no longer; ``scales``: nor its DoRA scales."""

    digest: str
    scales: bool = False


@dataclass(frozen=True, slots=True)
class Fill:
    """Write an adapter that is held into a slot."""

    slot: int
    digest: str


# Of adapters, from a worker.


@dataclass(frozen=True, slots=True)
class Squares:
    """Of DoRA's norms this rank's parts, to be added up: float32, as bytes."""

    values: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """Converted, or filled. ``error``: it was not, and why."""

    error: str = ""
