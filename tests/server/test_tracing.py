"""Traces: what a span says, whose child it is, and that it reaches a collector."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from mora_serve import errors
from mora_serve.config import Config, ServerConfig
from mora_serve.errors import ConfigError
from mora_serve.server import tracing
from mora_serve.v1 import generation_pb2, generation_pb2_grpc
from tests.server.conftest import Running, configuration, running, running_with, wait_for

UNTOLD = "what nobody but the model is to read"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(root: Path, spans: InMemorySpanExporter) -> Iterator[Running]:
    config = configuration(root, server={"traces": True, "http_port": 0})
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tracing, "exporter", lambda: spans)
            serving = stack.enter_context(running_with(config, "rev", "sum"))
        yield serving


def only(traced: Running, spans: InMemorySpanExporter) -> Any:
    """The span that has come of a call, and no other."""
    traced.server._tracing._provider.force_flush()  # type: ignore[union-attr]
    [span] = spans.get_finished_spans()
    spans.clear()
    return span


def test_a_span_says_what_was_asked_and_what_came_of_it(
    traced: Running, spans: InMemorySpanExporter
) -> None:
    with traced.client() as client:
        result = client.generate(
            UNTOLD,
            adapters={"rev": 1.0, "sum": 0.5},
            max_tokens=5,
            ignore_eos=True,
            temperature=0.5,
            seed=3,
            request_id="traced-1",
            stop=[UNTOLD],
        )
    span = only(traced, spans)
    assert (span.name, span.kind) == ("text_completion rev+sum", SpanKind.SERVER)
    said = dict(span.attributes)
    assert said["gen_ai.operation.name"] == "text_completion"
    assert said["gen_ai.request.model"] == "rev+sum"
    assert said["gen_ai.response.model"] == "base"
    assert said["gen_ai.response.id"] == "traced-1"
    assert (said["gen_ai.request.max_tokens"], said["gen_ai.request.seed"]) == (5, 3)
    assert said["gen_ai.request.temperature"] == 0.5
    assert said["gen_ai.response.finish_reasons"] == ("length",)
    assert said["gen_ai.usage.input_tokens"] == result.usage.prompt_tokens
    assert said["gen_ai.usage.output_tokens"] == 5
    assert said["mora.adapters"] == ("rev", "sum")
    assert said["mora.adapter.weights"] == (1.0, 0.5)
    assert said["mora.adapter.digests"] == tuple(a.digest for a in result.decision.mixture.adapters)
    assert said["mora.source"] == "explicit"
    assert span.status.status_code is StatusCode.UNSET
    assert UNTOLD not in span.to_json()


def test_its_events_are_the_parts_of_an_answers_time(
    traced: Running, spans: InMemorySpanExporter
) -> None:
    with traced.client() as client:
        usage = client.generate("hello", base=True, max_tokens=5, ignore_eos=True).usage
    span = only(traced, spans)
    decided, *parts = span.events
    assert decided.name == "decided"
    assert [e.name for e in parts] == ["queue", "prefill", "decode"]
    assert sum(e.attributes["mora.seconds"] for e in parts) == pytest.approx(usage.total_seconds)
    assert [e.timestamp for e in parts] == sorted(e.timestamp for e in parts)
    assert all(span.start_time <= e.timestamp <= span.end_time + 10**7 for e in parts)


@pytest.mark.parametrize("stream", [False, True])
def test_http_has_the_same_spans_under_the_callers(
    traced: Running, spans: InMemorySpanExporter, stream: bool
) -> None:
    body = {"model": "rev", "messages": [{"role": "user", "content": UNTOLD}], "n": 2}
    httpx.post(
        f"http://127.0.0.1:{traced.server.http_port}/v1/chat/completions",
        json={**body, "max_tokens": 3, "ignore_eos": True, "stream": stream},
        headers={"traceparent": TRACEPARENT},
    )
    span = only(traced, spans)
    assert span.name == "chat rev"
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.attributes["gen_ai.request.choice.count"] == 2
    assert span.attributes["gen_ai.usage.output_tokens"] == 6
    assert span.attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    assert UNTOLD not in span.to_json()


def test_grpcs_metadata_names_the_parent(traced: Running, spans: InMemorySpanExporter) -> None:
    request = generation_pb2.GenerateRequest(
        prompt=generation_pb2.Prompt(text="hello"),
        sampling=generation_pb2.SamplingParams(max_tokens=1),
    )
    with grpc.insecure_channel(traced.server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stub.Generate(request, metadata=(("traceparent", TRACEPARENT),))
        span = only(traced, spans)
        assert f"{span.context.trace_id:032x}" == TRACE
        stub.Generate(request, metadata=(("traceparent", "no such thing"),))
    assert only(traced, spans).parent is None


def test_what_fails_says_how(traced: Running, spans: InMemorySpanExporter) -> None:
    with traced.client() as client:
        with pytest.raises(errors.NotFound):
            client.generate("hello", adapters={"nothing": 1.0})
        span = only(traced, spans)
        assert span.attributes["error.type"] == "ADAPTER_NOT_FOUND"
        assert span.status.status_code is StatusCode.ERROR
        stream = client.stream("hello", base=True, max_tokens=2000, ignore_eos=True)
        stream.cancel()
        wait_for(lambda: not traced.server._gate._inside)
        span = only(traced, spans)
        assert span.attributes["error.type"] == "CANCELLED"
        assert span.status.status_code is StatusCode.UNSET  # nothing is wrong with the server


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What an OpenTelemetry collector does with traces: it takes them."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the call's name
        for resource in request.resource_spans:
            named = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.resources.append(named)
            self.spans += [s for scope in resource.scope_spans for s in scope.spans]
        return otlp.ExportTraceServiceResponse()


def test_spans_reach_a_collector(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OTLP to a real gRPC server, by nothing but OpenTelemetry's variables; the last at the end."""
    collector = Collector()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        with running(configuration(root)) as serving, serving.client() as client:
            client.generate("hello", base=True, max_tokens=1)
        wait_for(lambda: collector.spans)
    finally:
        server.stop(0)
    [span], [resource, *_] = collector.spans, collector.resources
    assert span.name == "text_completion base"
    assert resource["service.name"] == "mora-serve"
    assert resource["deployment.environment.name"] == "test"


def test_a_collector_that_is_not_there_holds_nobody_up(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    config = configuration(root, server={"drain_seconds": 2.0})
    with running(config) as serving, serving.client() as client:
        assert client.generate("hello", base=True, max_tokens=1).usage.completion_tokens == 1
        stopping = asyncio.run_coroutine_threadsafe(serving.server.stop(), serving.loop)
        stopping.result(30)


class TestWanted:
    CONFIG = Config(server=ServerConfig(traces=True))

    def test_off_unless_something_says_so(self) -> None:
        assert tracing.of(Config(), {}) is None

    @pytest.mark.parametrize(
        "environ", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}]
    )
    def test_off_where_opentelemetrys_variables_say_so(self, environ: dict[str, str]) -> None:
        assert tracing.of(self.CONFIG, environ) is None

    @pytest.mark.parametrize(
        "environ",
        [{"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, {"OTEL_TRACES_EXPORTER": "zipkin"}],
    )
    def test_another_exporter_is_an_error(self, environ: dict[str, str]) -> None:
        with pytest.raises(ConfigError) as caught:
            tracing.exporter(environ)
        assert next(iter(environ)) in caught.value.message

    def test_without_the_extra_the_remedy_is_told(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Where the environment alone asks for traces, a warning: it may be meant for others."""
        import sys

        monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
        with pytest.raises(ConfigError) as caught:
            tracing.of(self.CONFIG, {})
        assert "pip install 'mora-serve[otel]'" in caught.value.message
        assert tracing.of(Config(), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}) is None
        assert "pip install" in caplog.text
