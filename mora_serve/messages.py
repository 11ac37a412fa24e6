"""Core nouns to and from the API's messages, for the server and the client alike.

Nothing is checked here: what a client sends is checked in ``server/convert.py``.
"""

from __future__ import annotations

from mora_serve.core import (
    AdapterWeight,
    Candidate,
    Decision,
    Finish,
    Logprob,
    Mixture,
    Source,
    TokenOut,
    Usage,
)
from mora_serve.v1 import generation_pb2 as pb

_SOURCES = {
    Source.EXPLICIT: pb.SOURCE_EXPLICIT,
    Source.TASK: pb.SOURCE_TASK,
    Source.ROUTER: pb.SOURCE_ROUTER,
    Source.ABSTAINED: pb.SOURCE_ABSTAINED,
    Source.BASE: pb.SOURCE_BASE,
}
_FINISHES = {Finish.STOP: pb.FINISH_REASON_STOP, Finish.LENGTH: pb.FINISH_REASON_LENGTH}
_SOURCE_OF = {number: source for source, number in _SOURCES.items()}
_FINISH_OF = {number: finish for finish, number in _FINISHES.items()}


def mixture_message(mixture: Mixture) -> pb.Mixture:
    """A mixture as the API says it."""
    return pb.Mixture(
        adapters=[
            pb.AdapterWeight(adapter=a.adapter, weight=a.weight, digest=a.digest)
            for a in mixture.adapters
        ]
    )


def mixture_of(message: pb.Mixture) -> Mixture:
    """The mixture of a message; an unset weight is 1."""
    return Mixture(
        tuple(
            AdapterWeight(a.adapter, a.weight if a.HasField("weight") else 1.0, a.digest)
            for a in message.adapters
        )
    )


def decision_message(decision: Decision) -> pb.Decision:
    """A decision as the API says it."""
    return pb.Decision(
        mixture=mixture_message(decision.mixture),
        source=_SOURCES[decision.source],
        candidates=[
            pb.Candidate(adapter=c.adapter, score=c.score, probability=c.probability)
            for c in decision.candidates
        ],
        router_digest=decision.router_digest,
    )


def decision_of(message: pb.Decision) -> Decision:
    """The decision of a message."""
    return Decision(
        mixture_of(message.mixture),
        _SOURCE_OF[message.source],
        tuple(Candidate(c.adapter, c.score, c.probability) for c in message.candidates),
        message.router_digest,
    )


def token_message(token: TokenOut) -> pb.Token:
    """A sampled token as the API says it."""
    top = [pb.TokenLogprob(id=t.token, logprob=t.logprob) for t in token.top]
    return pb.Token(id=token.id, logprob=token.logprob, top=top)


def token_of(message: pb.Token) -> TokenOut:
    """The sampled token of a message."""
    return TokenOut(
        message.id,
        message.logprob if message.HasField("logprob") else None,
        tuple(Logprob(t.id, t.logprob) for t in message.top),
    )


def finish_message(finish: Finish) -> pb.FinishReason:
    """Why an answer ended; only STOP and LENGTH end one without an error."""
    return _FINISHES[finish]


def finish_of(message: pb.FinishReason) -> Finish:
    """Why an answer ended."""
    return _FINISH_OF[message]


def usage_messages(usage: Usage) -> tuple[pb.Usage, pb.Timings]:
    """Counts and timings as the API says them."""
    counts = pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )
    timings = pb.Timings(
        queue_seconds=usage.queue_seconds,
        first_token_seconds=usage.first_token_seconds,
        total_seconds=usage.total_seconds,
        preemptions=usage.preemptions,
    )
    return counts, timings


def usage_of(counts: pb.Usage, timings: pb.Timings) -> Usage:
    """Counts and timings of two messages."""
    return Usage(
        counts.prompt_tokens,
        counts.cached_tokens,
        counts.completion_tokens,
        timings.queue_seconds,
        timings.first_token_seconds,
        timings.total_seconds,
        timings.preemptions,
    )
