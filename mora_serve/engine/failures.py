"""What goes wrong in the engine, as callers are told: plain messages, without its insides."""

from __future__ import annotations

import torch

from mora_serve.engine.sequence import Sequence
from mora_serve.errors import Failure, Unavailable

ENGINE_FAILED = Failure(
    "UNAVAILABLE", "ENGINE_FAILED", "server: its engine has failed; send the call to another one"
)


class DeviceLost(Unavailable):
    """What computes is gone, or a part of it: no request is at fault, and no other can be run.

    The engine ends by it.
    """

    reason = ENGINE_FAILED.reason


# torch has no class of its own for these on a CPU.
_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


def step_failed(request_id: str) -> Failure:
    """The step raised for this request; the log has the rest under the same id."""
    return Failure(
        "INTERNAL",
        "STEP_FAILED",
        f"generation: a step of request {request_id} failed; retry it, and report it if it fails "
        "again",
    )


def text_failed(request_id: str) -> Failure:
    """Its tokens could not be made text."""
    return Failure(
        "INTERNAL",
        "TEXT_FAILED",
        f"generation: the tokens of request {request_id} cannot be decoded; retry it with another "
        "seed or prompt",
    )


def out_of_memory(request_id: str) -> Failure:
    """There was no memory even for this request alone."""
    return Failure(
        "RESOURCE_EXHAUSTED",
        "OUT_OF_MEMORY",
        f"generation: the server has no memory for request {request_id}; shorten the prompt, or "
        "retry later",
    )


def not_finite(sequence: Sequence) -> Failure:
    """Its logits have an infinity or no number at all."""
    if not sequence.digests:
        return Failure("INTERNAL", "NOT_FINITE", "generation: the base's numbers are not finite")
    return Failure(
        "FAILED_PRECONDITION",
        "NOT_FINITE",
        "mixture: with these adapters and weights the numbers are not finite; lower the weights, "
        "or leave out the adapter that overflows",
        "mixture",
    )


def stopped() -> Unavailable:
    """The engine ends because the server does."""
    return Unavailable("the server is shutting down; retry elsewhere", retry_after=1.0)


def is_memory(error: Exception) -> bool:
    """Whether there was not enough memory, on the device or beside it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY)
