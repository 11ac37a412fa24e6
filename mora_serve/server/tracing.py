"""Traces: a span for each generation, by OpenTelemetry's conventions for generative AI.

A span says what was asked for and what came of it: model, sampling, token counts, the adapters that
answered and who chose them; and, as events, when the request left the queue, had its first token
and had its last. It carries no prompt and no answer. Its parent is what the caller's
``traceparent`` names. Where spans go is said by OpenTelemetry's own variables of the environment.

The names of attributes are those of the conventions for GenAI spans; ``mora.`` is this server's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mora_serve import __version__
from mora_serve.config import Config
from mora_serve.core import Decision
from mora_serve.errors import ConfigError, MoraError
from mora_serve.server import call as calls
from mora_serve.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from mora_serve.server.answers import Asked
    from mora_serve.server.bridge import Generation

log = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_SAMPLING = (
    *("max_tokens", "temperature", "top_p", "top_k"),
    *("presence_penalty", "frequency_penalty"),
)


def of(config: Config, environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """The traces that ``server.traces``, or an endpoint in the environment, asks for, if any.

    Raises ConfigError where they cannot be made and ``server.traces`` asks for them. The
    environment may be meant for others: what it alone asks for in vain is logged.
    """
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    off = off or environ.get("OTEL_TRACES_EXPORTER", "").lower() == "none"
    if off or not (config.server.traces or any(environ.get(name) for name in _ENDPOINTS)):
        return None
    try:
        return start(Path(config.base.model).name)
    except ConfigError as e:
        if config.server.traces:
            raise
        log.warning("%s", e.message)
        return None


def start(base: str) -> Tracing:
    """Traces to where the environment says, of a server of a base model.

    Raises ConfigError where the extra is not installed, or another exporter is asked for.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as e:
        raise _missing(e) from None
    resource = Resource.create({"service.version": __version__})
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "mora-serve"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter()))
    return Tracing(provider, base)


def exporter(environ: Mapping[str, str] = os.environ) -> SpanExporter:
    """The exporter that the environment asks for: OTLP over gRPC.

    Raises ConfigError for another one.
    """
    for name, served in (
        ("OTEL_TRACES_EXPORTER", "otlp"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
    ):
        if environ.get(name, served) != served:
            raise ConfigError(
                f"server.traces: the environment's {name} is not {served!r}, which is what this "
                "server speaks; set it so, or leave it out",
                field="server.traces",
            )
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as e:
        raise _missing(e) from None
    return OTLPSpanExporter()


def _missing(error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(
        f"server.traces: traces need {error.name}, which is not installed; "
        "pip install 'mora-serve[otel]', or unset server.traces and OTEL_EXPORTER_OTLP_ENDPOINT",
        field="server.traces",
    )


class Tracing:
    """Makes spans with a provider of its own; ``base`` is the name of the base model."""

    def __init__(self, provider: TracerProvider, base: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("mora_serve", __version__)
        self._parents = TraceContextTextMapPropagator()
        self._base = base

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()

    @contextmanager
    def generation(self, asked: Asked) -> Iterator[GenerationSpan]:
        """The span of what the context does, for the call in progress."""
        from opentelemetry.trace import SpanKind

        call = calls.current()
        chat = asked.prompt.WhichOneof("kind") == "chat"
        operation = "chat" if chat else "text_completion"
        model = _model(asked.selection, self._base)
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=self._parents.extract(call.parent),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "mora_serve",
                "gen_ai.request.model": model,
                "gen_ai.response.model": self._base,
                "gen_ai.response.id": call.request_id,
                "mora.tenant": call.tenant,
                **_sampling(asked),
            },
        )
        made = GenerationSpan(span)
        try:
            yield made
        except MoraError as e:
            made.failed(e.code, e.reason)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            made.failed("CANCELLED", "")
            raise
        except BaseException:
            made.failed("INTERNAL", "")
            raise
        finally:
            span.end()


class GenerationSpan:
    """The span of one decision and the answers from it."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._start = time.time_ns()

    def decided(self, decision: Decision) -> None:
        """The adapters that answer are known."""
        adapters, candidates = decision.mixture.adapters, decision.candidates
        self._span.set_attributes(
            {
                "mora.adapters": [a.adapter for a in adapters],
                "mora.adapter.weights": [a.weight for a in adapters],
                "mora.adapter.digests": [a.digest for a in adapters],
                "mora.source": decision.source.value,
                "mora.router.digest": decision.router_digest,
                "mora.router.candidates": [c.adapter for c in candidates],
                "mora.router.scores": [c.score for c in candidates],
            }
        )
        self._span.add_event("decided")

    def answered(self, generations: tuple[Generation, ...]) -> None:
        """What came of the answers, as far as they came."""
        lasts = [g.last for g in generations if g.last is not None]
        usages = [last.usage for last in lasts if last.usage is not None]
        if lasts:
            reasons = [last.finish.value for last in lasts if last.finish is not None]
            self._span.set_attribute("gen_ai.response.finish_reasons", reasons)
        if not usages:
            return
        first = usages[0]
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": first.prompt_tokens,
                "gen_ai.usage.output_tokens": sum(u.completion_tokens for u in usages),
                "gen_ai.usage.cache_read.input_tokens": first.cached_tokens,
                "mora.preemptions": sum(u.preemptions for u in usages),
            }
        )
        if first.completion_tokens:
            self._span.set_attribute(
                "gen_ai.response.time_to_first_chunk", min(u.first_token_seconds for u in usages)
            )
        for i, usage in enumerate(usages):
            ends = [("queue", usage.queue_seconds), ("decode", usage.total_seconds)]
            if usage.completion_tokens:
                ends.insert(1, ("prefill", usage.first_token_seconds))
            begin = 0.0
            for name, end in ends:
                self._span.add_event(
                    name,
                    {"mora.seconds": end - begin, "mora.answer": i},
                    timestamp=self._start + int(end * 1e9),
                )
                begin = end

    def failed(self, code: str, reason: str) -> None:
        """It ended without an answer."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", reason or code)
        if code != "CANCELLED":
            self._span.set_status(Status(StatusCode.ERROR, code))


def _model(selection: pb.Selection, base: str) -> str:
    """What is asked for, in the words of the HTTP API's ``model``."""
    kind = selection.WhichOneof("kind")
    if kind == "base" or (kind == "mixture" and not selection.mixture.adapters):
        return base
    if kind != "mixture":
        return "auto"
    return "+".join(a.adapter[:64] for a in selection.mixture.adapters[:8])


def _sampling(asked: Asked) -> dict[str, Any]:
    given = {field.name: value for field, value in asked.sampling.ListFields()}
    out = {f"gen_ai.request.{name}": given[name] for name in _SAMPLING if name in given}
    if "seed" in given:
        out["gen_ai.request.seed"] = given["seed"] % 2**63  # a signed 64-bit number
    if asked.count > 1:
        out["gen_ai.request.choice.count"] = asked.count
    return out
