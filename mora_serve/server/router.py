"""RouterService: decisions without generating, and the router itself."""

# ruff: noqa: N802 - methods carry the names of their calls

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from mora_serve.access.audit import Audit
from mora_serve.adapters.files import open_directory, read_regular
from mora_serve.config import Config
from mora_serve.errors import FailedPrecondition, NotFound
from mora_serve.messages import decision_message
from mora_serve.router.feedback import FeedbackRow, Page, Position
from mora_serve.router.format import MAX_BYTES
from mora_serve.router.routing import Routing
from mora_serve.server import call as calls
from mora_serve.server.convert import invalid
from mora_serve.server.decider import Decider
from mora_serve.server.feedback import FeedbackRecorder
from mora_serve.server.gate import Places
from mora_serve.server.prompts import Prompts
from mora_serve.v1 import router_pb2 as pb
from mora_serve.v1.router_pb2_grpc import RouterServiceServicer

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

MAX_LOADS = 4  # of routers at the same time, those that wait for the thread included

_TIMES = range(-62_135_596_800, 253_402_300_800)  # seconds of the years 1 to 9999, a Timestamp's


class RouterServicer(RouterServiceServicer):
    """Route, LoadRouter, GetRouter, ExportFeedback.

    ``feedback`` is None where it is off.
    """

    def __init__(
        self,
        prompts: Prompts,
        decider: Decider,
        routing: Routing,
        config: Config,
        executor: Executor,
        feedback: FeedbackRecorder | None,
        audit: Audit,
    ) -> None:
        self._prompts = prompts
        self._decider = decider
        self._routing = routing
        self._config = config
        self._executor = executor
        self._loads = Places(MAX_LOADS, "loads of routers")
        self._feedback = feedback
        self._audit = audit

    async def Route(self, request: pb.RouteRequest, context: Context) -> pb.RouteResponse:
        """Decide as Generate would."""
        self._prompts.check(request.prompt)
        async with self._decider.decided(request.selection, request.prompt) as decision:
            return pb.RouteResponse(decision=decision_message(decision))

    async def LoadRouter(
        self, request: pb.LoadRouterRequest, context: Context
    ) -> pb.LoadRouterResponse:
        """Replace the router."""
        source = request.WhichOneof("source")
        if source is None:
            raise invalid("source", "it is missing; give a path under the root, or data")

        root = calls.root_of(self._config)

        def load() -> None:
            data = request.data if source == "data" else read_file(root, request.path)
            calls.record(self._audit, "router.loaded", digest=self._routing.load(data).digest)

        run = contextvars.copy_context().run
        with self._loads.taken(calls.current().tenant):
            await asyncio.get_running_loop().run_in_executor(self._executor, run, load)
        return pb.LoadRouterResponse(router=self._describe())

    async def GetRouter(
        self, request: pb.GetRouterRequest, context: Context
    ) -> pb.GetRouterResponse:
        """Describe the router."""
        return pb.GetRouterResponse(router=self._describe())

    async def ExportFeedback(
        self, request: pb.ExportFeedbackRequest, context: Context
    ) -> AsyncIterator[pb.ExportFeedbackResponse]:
        """Give the caller's labelled prompts."""
        start, since = Position.of(request.cursor), _since(request)
        if (feedback := self._feedback) is None:
            raise FailedPrecondition(
                "router.feedback: this server keeps no feedback; set router.feedback = true to "
                "keep the prompts of task hints from then on",
                field="router.feedback",
                reason="FEEDBACK_OFF",
            )
        async for part in feedback.pages(calls.current().tenant, start, since, page_message):
            yield part

    def _describe(self) -> pb.Router | None:
        snapshot = self._routing.snapshot
        if snapshot is None:
            return None
        return pb.Router(
            digest=snapshot.router.digest,
            routable_adapters=self._routing.listed(calls.current().tenant),
            max_adapters=self._config.router.max_adapters,
            dims=snapshot.router.dims,
            base_fingerprint=snapshot.router.content.fingerprint,
            features=snapshot.router.content.features.kind,
        )


def read_file(root: str, path: str) -> bytes:
    """A router's file under ``root``.

    Raises what ``open_directory`` and ``read_regular`` raise, and NotFound where there is no
    such file.
    """
    name = PurePosixPath(path).name
    if name in ("", "..") or "\0" in name:
        raise invalid(
            "path", "it names no file; give a regular file under adapters.root", "INVALID_PATH"
        )
    with open_directory(root, str(PurePosixPath(path).parent)) as directory:
        data = read_regular(directory, name, "path", _check_size)
    if data is None:
        raise NotFound(
            "path: there is no such file under adapters.root; give one relative to it",
            field="path",
            reason="NO_FILE",
        )
    return data


def page_message(page: Page) -> pb.ExportFeedbackResponse:
    """A part of the labelled prompts as the API says it."""
    rows = [row_message(row) for row in page.rows]
    return pb.ExportFeedbackResponse(rows=rows, cursor=page.end.cursor())


def row_message(row: FeedbackRow) -> pb.FeedbackRow:
    """A labelled prompt as the API says it."""
    message = pb.FeedbackRow(
        prompt=row.prompt,
        tasks=row.tasks,
        adapters=() if row.ranked else row.adapters,
        routed_adapters=row.routed,
        router_digest=row.router_digest,
        base_fingerprint=row.base_fingerprint,
    )
    message.accept_time.FromNanoseconds(int(row.time * 1e9))
    return message


def _since(request: pb.ExportFeedbackRequest) -> float:
    """The earliest time asked for, in unix seconds; minus infinity where none is."""
    if not request.HasField("since"):
        return -math.inf
    time = request.since
    if time.seconds not in _TIMES or not 0 <= time.nanos < 1e9:
        raise invalid("since", "it is no time; give a protobuf Timestamp, or leave it out")
    return time.seconds + time.nanos / 1e9


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise invalid(
            "path",
            f"{size} bytes are more than the {MAX_BYTES} of a router's file; give a router's file",
            "TOO_LARGE",
        )
