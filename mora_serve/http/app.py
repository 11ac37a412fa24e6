"""The HTTP API as an application: its paths, and what answers them once the model is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from prometheus_client.exposition import choose_encoder
from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Scope

from mora_serve import __version__
from mora_serve.adapters.registry import Registry
from mora_serve.config import Config
from mora_serve.http import asking, console, models, rpc
from mora_serve.http.answering import EventStream, Writer
from mora_serve.http.aside import Aside
from mora_serve.http.docs import page
from mora_serve.http.entrance import Guard
from mora_serve.http.forms import ChatForm, CompletionForm, Envelope, Form
from mora_serve.http.schema import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    Generation,
    MapRequest,
    parsed,
)
from mora_serve.http.tokens import TokenTexts
from mora_serve.metrics import Metrics
from mora_serve.router.routing import Routing
from mora_serve.server import call as calls
from mora_serve.server.gate import Places, State
from mora_serve.server.interceptors import Entrance
from mora_serve.server.prompts import Tokenizer
from mora_serve.server.services import Services, Threads

DESCRIPTION = """\
OpenAI's chat and plain completions on one base model and many LoRA adapters. `model` names an
adapter; `auto` lets the router pick; `base`, or the base model's name, uses none. Whatever is not
described here is refused by name. The calls of this server's own API, for adapters and the router,
are served under the names that gRPC has for them, such as
`POST /mora_serve.v1.AdapterService/ListAdapters`, with the messages of the .proto files as JSON.
"""
_ALONE = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
MAX_LOOKUPS = 64
MAX_LARGE = 64  # bodies being read, those that wait for a thread included
_SHORT = 64 << 10  # bytes of a body that is read on the event loop: some milliseconds

B = TypeVar("B", bound=Generation)


@dataclass(frozen=True)
class Parts:
    """What answers, from the time when the model is loaded."""

    services: Services
    registry: Registry
    tokenizer: Tokenizer
    texts: TokenTexts
    base: str
    fingerprint: str
    routing: Routing


class _Application(FastAPI):
    """FastAPI whose errors reach the layer around it, which has the one table of them.

    ``bodies`` are those that endpoints read themselves, by their paths: large ones, not on the
    event loop.
    """

    bodies: Mapping[str, type[Body]] = {
        "/v1/chat/completions": ChatCompletionRequest,
        "/v1/completions": CompletionRequest,
    }

    def openapi(self) -> dict[str, Any]:
        """The description, bodies included."""
        if self.openapi_schema is None:
            spec = super().openapi()
            kinds = [(kind, "validation") for kind in self.bodies.values()]
            refs, definitions = models_json_schema(
                kinds,  # type: ignore[arg-type]  # a literal
                ref_template="#/components/schemas/{model}",
            )
            spec.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            for path, kind in self.bodies.items():
                content = {"application/json": {"schema": refs[(kind, "validation")]}}
                spec["paths"][path]["post"]["requestBody"] = {"content": content, "required": True}
        return self.openapi_schema or {}

    def build_middleware_stack(self) -> ASGIApp:
        """The routes, and what FastAPI needs around them."""
        return AsyncExitStackMiddleware(self.router)


class HttpApi:
    """The application; ``asgi`` is what a web server calls. Gets its ``parts`` late."""

    def __init__(
        self, config: Config, metrics: Metrics, entrance: Entrance, threads: Threads
    ) -> None:
        self.parts: Parts | None = None
        self._config = config
        self._metrics = metrics
        self._gate = entrance.gate
        self._threads = threads
        self._reading = Aside(threads.tokenize, Places(MAX_LARGE, "large bodies"))
        self._looking_up = Aside(threads.route, Places(MAX_LOOKUPS, "look-ups"))
        app = _Application(
            title="mora-serve",
            version=__version__,
            description=DESCRIPTION,
            docs_url=None,
            redoc_url=None,
            openapi_url="/openapi.json",
        )
        self.app = app
        app.post("/v1/chat/completions", summary="Continue a conversation")(self.chat_completions)
        app.post("/v1/completions", summary="Continue a text")(self.completions)
        app.get("/v1/models", summary="List what `model` can be")(self.list_models)
        app.get("/v1/models/{model:path}", summary="Describe a model")(self.get_model)
        app.get("/healthz", summary="200 while the server serves, 503 otherwise")(self.healthz)
        app.head("/healthz", include_in_schema=False)(self.healthz)
        app.get("/metrics", summary="Prometheus metrics")(self.metrics)
        app.get("/docs", include_in_schema=False)(self.docs)
        app.get("/", include_in_schema=False)(self.console)
        app.post("/console/map", include_in_schema=False)(self.key_map)
        app.get("/console/{file}", include_in_schema=False)(self.console_file)
        for path, summary, endpoint in rpc.endpoints(self._services, self._reading):
            app.router.add_route(path, endpoint, ["POST"], name=summary)
        self.asgi = Guard(
            app,
            self._name_of,
            metrics,
            entrance,
            config.engine.stall_seconds,
            config.server.max_message_bytes,
            streaming={rpc.UPLOAD},
            hosts=_hosts(config, locked=entrance.door.locked),
            log_calls=config.server.log_calls,
            apart=config.server.admin_port >= 0,
        )

    def _name_of(self, scope: Scope) -> str | None:
        """The path of the route that a request takes, as it is declared.

        It has to be the very one that the router takes, as roles go by it: the first that has the
        path and the HTTP method, or else the first that has the path.
        """
        found: str | None = None
        for route in self.app.routes:
            match, _ = route.matches(scope)
            path: str = getattr(route, "path", "")
            if match is Match.FULL:
                return path
            if match is Match.PARTIAL and found is None:
                found = path
        return found

    def _served(self) -> Parts:
        if self.parts is None:
            raise RuntimeError("the gate lets nobody in before there are parts")
        return self.parts

    def _services(self) -> Services:
        return self._served().services

    async def chat_completions(self, request: Request) -> Response:
        """OpenAI's chat completions."""
        body, question = await self._read(request, ChatCompletionRequest, asking.chat)
        return await self._answer(body, question, ChatForm())

    async def completions(self, request: Request) -> Response:
        """OpenAI's plain completions."""
        body, question = await self._read(request, CompletionRequest, asking.completion)
        if body.echo:
            echo = [self._text(asked.prompt) for asked in question.asked]
            question = asking.Question(question.asked, question.names, tuple(echo))
        return await self._answer(body, question, CompletionForm())

    async def list_models(self) -> Response:
        """The base, the router, and the adapters that the caller may use."""
        parts, tenant = self._served(), calls.current().tenant

        def answer() -> Response:  # written there as well: there may be thousands
            data = models.listed(parts.registry, parts.base, tenant)
            return JSONResponse({"object": "list", "data": data})

        return await self._looking_up.run(answer)

    async def get_model(self, model: str) -> Response:
        """One of them."""
        parts, tenant = self._served(), calls.current().tenant
        described = partial(models.described, parts.registry, parts.base, tenant, model)
        return JSONResponse(await self._looking_up.run(described))

    async def healthz(self) -> Response:
        """Whether the server serves."""
        state = self._gate.state
        status = 200 if state is State.SERVING else 503
        return JSONResponse({"status": state.value}, status, {"cache-control": "no-store"})

    async def metrics(self, request: Request) -> Response:
        """What the Prometheus port gives, to administrators."""
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(self._threads.route, encode, self._metrics.registry)
        return Response(data, media_type=kind)

    async def docs(self) -> Response:
        """The API as a page, from the same description as /openapi.json."""
        return HTMLResponse(page(self.app.openapi()), headers=_ALONE)

    async def console(self) -> Response:
        """The console's page."""
        return console.file("index.html")

    async def console_file(self, file: str) -> Response:
        """What the console's page is made of."""
        return console.file(file)

    async def key_map(self, request: Request) -> Response:
        """The router's keys as points of a plane, and a text among them."""
        body = parsed(MapRequest, await request.body())
        routing, tenant = self._served().routing, calls.current().tenant

        def answer() -> Response:  # written there as well: there may be thousands of points
            return JSONResponse(console.map_object(routing.key_map(tenant, body.text)))

        return await self._looking_up.run(answer)

    async def _answer(self, body: Generation, question: asking.Question, form: Form) -> Response:
        parts = self._served()
        if question.asked[0].sampling.HasField("logprobs"):
            await self._looking_up.run(parts.texts.load)
        envelope = Envelope(
            form, calls.current().request_id, body.model, f"fp_{parts.fingerprint[:12]}"
        )
        usage = body.stream_options is not None and body.stream_options.include_usage
        writer = Writer(
            parts.services.answers, parts.texts, question, envelope, self._threads.route, usage
        )
        return EventStream(writer.chunks()) if body.stream else await writer.whole()

    async def _read(
        self, request: Request, kind: type[B], ask: Callable[[B, str, int, str], asking.Question]
    ) -> tuple[B, asking.Question]:
        """The body of a request, and what it asks."""
        data, base = await request.body(), self._served().base
        most, timeout = self._config.engine.max_tokens, request.headers.get(asking.TIMEOUT, "")

        def read() -> tuple[B, asking.Question]:
            body = parsed(kind, data)
            return body, ask(body, base, most, timeout)

        return read() if len(data) <= _SHORT else await self._reading.run(read)

    def _text(self, prompt: Any) -> str:
        if prompt.WhichOneof("kind") == "text":
            return str(prompt.text)
        return self._served().tokenizer.decode(list(prompt.token_ids.ids))


def _hosts(config: Config, *, locked: bool) -> frozenset[str] | None:
    """The names that the port may be asked for by, besides this machine's; None for any."""
    names = frozenset(name.strip().lower() for name in config.server.http_names.split(","))
    if names != {""}:
        return names - {""}
    # Where whoever comes is let in, a page of another site could have its own name lead here.
    return None if locked or config.access.allow_anonymous else frozenset()
