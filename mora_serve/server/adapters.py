"""AdapterService: the registry over gRPC. Files are read and records written off the event loop."""

# ruff: noqa: N802 - methods carry the names of their calls

from __future__ import annotations

import asyncio
import bisect
import contextlib
import contextvars
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from mora_serve.access.audit import Audit
from mora_serve.adapters import checksum
from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.checksum import stated_sum
from mora_serve.adapters.record import Quota
from mora_serve.adapters.registry import AdapterRecord, Registry
from mora_serve.adapters.untrusted import check_name
from mora_serve.adapters.validate import ValidatedAdapter, read_directory, read_upload
from mora_serve.config import Config
from mora_serve.core import SHARED_TENANT
from mora_serve.errors import InvalidArgument, MoraError
from mora_serve.model.shape import ModelShape
from mora_serve.router.routing import Routing
from mora_serve.server import call as calls
from mora_serve.server.convert import invalid
from mora_serve.server.follow import Pins
from mora_serve.server.gate import Places
from mora_serve.server.upload import Upload, steadily
from mora_serve.v1 import adapters_pb2 as pb
from mora_serve.v1.adapters_pb2_grpc import AdapterServiceServicer

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

DEFAULT_PAGE = 100
MAX_PAGE = 200
MAX_UPLOADS = 8  # at the same time; each holds up to adapters.max_bytes of disk
MAX_REGISTRATIONS = 16  # at the same time, those that wait for a thread included
MAX_CHANGES = 64  # other changes, likewise
MAX_LOOKUPS = 256

T = TypeVar("T")


class AdapterServicer(AdapterServiceServicer):
    """The life cycle of a tenant's adapters.

    ``resident`` tells the digests in device slots. ``fingerprint`` is the base's. ``executor``
    is for work on the disk, ``short`` for what takes no more than milliseconds.
    """

    def __init__(
        self,
        registry: Registry,
        routing: Routing,
        pins: Pins,
        resident: Callable[[], Collection[str]],
        config: Config,
        shape: ModelShape,
        fingerprint: str,
        executor: Executor,
        short: Executor,
        audit: Audit,
    ) -> None:
        self._registry = registry
        self._routing = routing
        self._pins = pins
        self._resident = resident
        self._config = config
        self._limits = config.adapters
        self._stall_seconds = config.engine.stall_seconds
        self._shape = shape
        self._fingerprint = fingerprint
        self._executor = executor
        self._short = short
        self._audit = audit
        self._uploads = Places(MAX_UPLOADS, "uploads")
        self._registrations = Places(MAX_REGISTRATIONS, "registrations")
        self._changes = Places(MAX_CHANGES, "changes of adapters")
        self._lookups = Places(MAX_LOOKUPS, "look-ups of adapters")

    async def RegisterAdapter(
        self, request: pb.RegisterAdapterRequest, context: Context
    ) -> pb.RegisterAdapterResponse:
        """Register a directory under the adapter root."""
        check_name(request.name, "name")
        stated = stated_sum(request.sha256, required=self._limits.require_sha256)

        root, path = calls.root_of(self._config), request.path

        def read() -> ValidatedAdapter:
            fingerprint = self._fingerprint
            return read_directory(root, path, self._shape, self._limits, fingerprint, sha256=stated)

        with self._registrations.taken(calls.current().tenant):
            record, created = await self._register(request, read, "card")
        return pb.RegisterAdapterResponse(adapter=self._message(record), created=created)

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.UploadAdapterResponse:
        """Register the files that the client sends."""
        with self._uploads.taken(calls.current().tenant):
            header, stated, upload = None, "", Upload(self._limits)
            with upload:
                async for message in steadily(request_iterator, self._stall_seconds):
                    kind = message.WhichOneof("kind")
                    if kind == "chunk" and header is not None:
                        await self._run(upload.write, message.chunk.file, message.chunk.data)
                    elif kind == "header" and header is None:
                        header = message.header
                        check_name(header.name, "header.name")
                        with _of_header():
                            stated = stated_sum(header.sha256, required=self._limits.require_sha256)
                    else:
                        raise invalid(
                            "kind", "send one header first and then nothing but chunks", "ORDER"
                        )
                if header is None:
                    raise invalid("header", "the upload has none; send it first", "ORDER")

                def read() -> ValidatedAdapter:
                    arrived, limits, fingerprint = upload.files(), self._limits, self._fingerprint
                    with _of_header():
                        return read_upload(
                            *arrived, self._shape, limits, fingerprint, sha256=stated
                        )

                record, created = await self._register(header, read, "header.card")
        return pb.UploadAdapterResponse(adapter=self._message(record), created=created)

    async def UpdateAdapter(
        self, request: pb.UpdateAdapterRequest, context: Context
    ) -> pb.UpdateAdapterResponse:
        """Replace the routing card."""
        check_name(request.name, "name")
        if not request.HasField("card"):
            raise invalid("card", "it is missing; give the whole new card")
        tenant, name = calls.current().tenant, request.name

        def update() -> AdapterRecord:
            card = self._card(request.card, "card")
            with _of_name():
                record = self._registry.update(tenant, name, card=card)
            return self._recorded("adapter.updated", record)

        with self._changes.taken(tenant):
            record = await self._run(update)
            await self._keyed(record)
        return pb.UpdateAdapterResponse(adapter=self._message(record))

    async def UnregisterAdapter(
        self, request: pb.UnregisterAdapterRequest, context: Context
    ) -> pb.UnregisterAdapterResponse:
        """Remove an adapter."""
        check_name(request.name, "name")
        tenant, name = calls.current().tenant, request.name

        def unregister() -> AdapterRecord:
            with _of_name():
                record = self._registry.unregister(tenant, name)
            return self._recorded("adapter.unregistered", record)

        with self._changes.taken(tenant):
            await self._run(unregister)
        return pb.UnregisterAdapterResponse()

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        """A page of adapters; its token is the name of the last one before it."""
        if request.page_size > MAX_PAGE:
            raise invalid(
                "page_size",
                f"{request.page_size} is too large; ask for at most {MAX_PAGE} and follow "
                "next_page_token",
            )
        if request.page_token:
            try:
                check_name(request.page_token, "page_token")
            except InvalidArgument:
                raise invalid(
                    "page_token", "it is no token; give next_page_token of the page before, or none"
                ) from None
        records = self._registry.list(calls.current().tenant)
        start = bisect.bisect_right(records, request.page_token, key=lambda r: r.name)
        end = start + (request.page_size or DEFAULT_PAGE)
        resident = self._resident()
        adapters = [
            self._message(r, r.digest in resident, prompts=False) for r in records[start:end]
        ]
        token = adapters[-1].name if end < len(records) else ""
        return pb.ListAdaptersResponse(adapters=adapters, next_page_token=token)

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: Context
    ) -> pb.GetAdapterResponse:
        """Describe an adapter."""
        check_name(request.name, "name")
        # Not on the event loop: where there is no such name, the nearest ones are sought.
        tenant = calls.current().tenant
        get = partial(self._registry.get, tenant, request.name)
        with self._lookups.taken(tenant), _of_name():
            record = await asyncio.get_running_loop().run_in_executor(self._short, get)
        return pb.GetAdapterResponse(adapter=self._message(record))

    async def PinAdapter(
        self, request: pb.PinAdapterRequest, context: Context
    ) -> pb.PinAdapterResponse:
        """Pin or unpin an adapter."""
        check_name(request.name, "name")
        tenant, name, pinned = calls.current().tenant, request.name, request.pinned

        def pin() -> AdapterRecord:
            with _of_name():
                if not pinned:
                    record = self._registry.pin(tenant, name, False)
                    return self._recorded("adapter.unpinned", record)
                digest = self._registry.get(tenant, name).digest
                self._registry.fetch(digest)  # so that the engine need not
                with self._pins.reserved(digest):
                    record = self._registry.pin(tenant, name, True)
            return self._recorded("adapter.pinned", record)

        with self._changes.taken(tenant):
            record = await self._run(pin)
        return pb.PinAdapterResponse(adapter=self._message(record))

    async def _register(
        self,
        request: pb.RegisterAdapterRequest | pb.UploadHeader,
        read: Callable[[], ValidatedAdapter],
        card_field: str,
    ) -> tuple[AdapterRecord, bool]:
        caller = calls.current().caller
        quota = Quota(caller.limits.adapters, caller.limits.bytes)

        def register() -> tuple[AdapterRecord, bool]:
            given = request.HasField("card")
            card = self._card(request.card, card_field) if given else None
            record, created = self._registry.register(
                caller.tenant,
                request.name,
                read(),
                card=card,
                replace=request.replace,
                quota=quota,
            )
            if created:
                self._recorded("adapter.registered", record)
            return record, created

        record, created = await self._run(register)
        await self._keyed(record)
        return record, created

    def _recorded(self, event: str, record: AdapterRecord) -> AdapterRecord:
        """The record, once the audit log has what was done: also where the client has left."""
        calls.record(
            self._audit, event, adapter=record.name, version=record.version, digest=record.digest
        )
        return record

    async def _keyed(self, record: AdapterRecord) -> None:
        """Return when the router knows the adapter; no thread waits where that takes the base."""
        while (key := self._routing.expected(record.key)) is not None:
            await asyncio.wrap_future(key)

    def _card(self, message: pb.RoutingCard, field: str) -> RoutingCard:
        """The card of a message, checked; ``field`` is where it stands in the request."""
        card = card_of(message)
        try:
            self._registry.check_card(card)
        except InvalidArgument as e:
            raise e.at(f"{field}.{e.field}") from None
        return card

    async def _run(self, work: Callable[..., T], *args: Any) -> T:
        """Run ``work`` on a thread for the disk, as a part of this call."""
        run = contextvars.copy_context().run
        return await asyncio.get_running_loop().run_in_executor(self._executor, run, work, *args)

    def _message(
        self, record: AdapterRecord, resident: bool | None = None, *, prompts: bool = True
    ) -> pb.Adapter:
        """An adapter as the API says it; looks up whether it is ``resident`` where not told."""
        if resident is None:
            resident = record.digest in self._resident()
        message = adapter_message(record, resident, prompts)
        message.verified = self._registry.verified(record)
        message.routable = self._registry.routable(record)
        return message


@contextlib.contextmanager
def _of_name() -> Iterator[None]:
    """The registry's errors about an adapter are about the field ``name`` of these requests."""
    try:
        yield
    except MoraError as e:
        raise (e.at("name") if e.field == "adapter" else e) from None


@contextlib.contextmanager
def _of_header() -> Iterator[None]:
    """Errors about the stated sum are about a field of the header of an upload."""
    try:
        yield
    except MoraError as e:
        raise (e.at(f"header.{e.field}") if e.field == checksum.FIELD else e) from None


def card_of(message: pb.RoutingCard) -> RoutingCard:
    """The card of a message, unchecked."""
    return RoutingCard(
        description=message.description,
        tasks=tuple(message.tasks),
        group=message.group,
        prompts=tuple(message.prompts),
        base_fingerprint=message.base_fingerprint,
        router_digest=message.router_digest,
    )


def adapter_message(record: AdapterRecord, resident: bool, prompts: bool) -> pb.Adapter:
    """What an adapter is on any base, its example prompts only on request."""
    card = record.card
    message = pb.Adapter(
        name=record.name,
        digest=record.digest,
        version=record.version,
        rank=record.rank,
        size_bytes=record.nbytes,
        targets=record.targets,
        dora=record.dora,
        rslora=record.rslora,
        card=pb.RoutingCard(
            tasks=card.tasks,
            prompts=card.prompts if prompts else (),
            description=card.description,
            group=card.group,
            base_fingerprint=card.base_fingerprint,
            router_digest=card.router_digest,
        ),
        pinned=record.pinned,
        resident=resident,
        prompt_count=len(card.prompts),
    )
    message.shared = record.tenant == SHARED_TENANT
    message.register_time.FromNanoseconds(int(record.created * 1e9))
    return message
