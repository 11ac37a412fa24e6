"""A server with keys: who is let in, what tenants see of each other, what is written down."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from benchmarks import refusals
from benchmarks.rich_status import reason_of
from benchmarks.rpcs import Rpc, call, rpcs
from mora_serve.access.roles import Role
from mora_serve.config import Config
from mora_serve.errors import ConfigError
from mora_serve.server.app import MoraServer
from mora_serve.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from tests.access import make
from tests.server.conftest import PROMPTS, configuration, running, wait_for, write_adapter

ROLES = [role.value for role in Role]


@dataclasses.dataclass
class Caller:
    """One key's calls."""

    channel: grpc.Channel
    secret: str

    def stub(self, kind: Any) -> Any:
        intercepted = grpc.intercept_channel(self.channel, _Bearer(self.secret))
        return kind(intercepted)

    @property
    def adapters(self) -> Any:
        return self.stub(adapters_pb2_grpc.AdapterServiceStub)

    def names(self) -> list[str]:
        answer = self.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
        return [a.name for a in answer.adapters]

    def register(self, name: str, path: str, **more: Any) -> Any:
        request = adapters_pb2.RegisterAdapterRequest(name=name, path=path, **more)
        return self.adapters.RegisterAdapter(request).adapter

    def generate(self, text: str = "hello", **selection: Any) -> Any:
        request = generation_pb2.GenerateRequest(
            prompt=generation_pb2.Prompt(text=text),
            selection=generation_pb2.Selection(**selection),
            sampling=generation_pb2.SamplingParams(max_tokens=4, ignore_eos=True),
        )
        return self.stub(generation_pb2_grpc.GenerationServiceStub).Generate(request)


class _Bearer(grpc.UnaryUnaryClientInterceptor):
    def __init__(self, secret: str) -> None:
        self._metadata = make.authorization(secret)

    def intercept_unary_unary(self, continuation, details, request):
        return continuation(details._replace(metadata=self._metadata, timeout=30), request)


@dataclasses.dataclass
class Guarded:
    """A server with keys of three tenants, one of them the owner of what is shared."""

    server: MoraServer
    file: Path
    audit: Path
    channel: grpc.Channel
    admin: grpc.Channel

    def key(self, tenant: str, roles: Sequence[str] = ROLES, **more: str) -> Caller:
        secret = make.key(self.file, f"{tenant}-{len(self.file.read_text())}", tenant, roles)
        caller = Caller(self.channel, secret)
        stub = caller.stub(server_pb2_grpc.ServerServiceStub)
        wait_for(lambda: refused(lambda: stub.GetServerInfo(INFO)) is None)
        return caller

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = map(json.loads, self.audit.read_text().splitlines())
        return [line for line in lines if line["event"] == name]


INFO = server_pb2.GetServerInfoRequest()
INFO_RPC = Rpc("/mora_serve.v1.ServerService/GetServerInfo", False, False)


def refused(act: Callable[[], Any]) -> tuple[str, str] | None:
    """The code and the reason of the error of a call; None where it went well."""
    try:
        act()
    except grpc.RpcError as e:
        return e.code().name, reason_of(e)
    return None


@pytest.fixture(scope="module")
def guarded(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("access")
    file, audit, adapters = folder / "access.toml", folder / "audit", folder / "adapters"
    make.key(file, "first", "acme", ROLES)
    for tenant in ("acme", "globex", "shared"):
        for seed, name in enumerate(("rev", "sum")):
            path = write_adapter(adapters / tenant / name, seed, root / "base")
            card = {"tasks": [f"do-{name}"], "prompts": PROMPTS[name]}
            (path / "routing_card.json").write_text(json.dumps(card))
    config = configuration(
        root,
        access={"file": str(file), "audit": str(audit)},
        server={"admin_port": 0},
        adapters={"root": str(adapters), "slots": 8},
    )
    with running(config) as serving:
        main = grpc.insecure_channel(serving.server.address)
        admin = grpc.insecure_channel(f"127.0.0.1:{serving.server.admin_port}")
        with main, admin:
            yield Guarded(serving.server, file, audit, main, admin)


def test_vllm_cve_2026_48746_every_call_needs_a_key_with_its_role(guarded: Guarded) -> None:
    """vLLM CVE-2026-48746: one server's calls were open beside those that asked for a key."""
    # First, so that it is in use, and not merely unknown, when the others are.
    over = make.key(guarded.file, "over", "acme", ROLES, "expires = 2020-01-01T00:00:00Z\n")
    secrets = {role: guarded.key("acme", [role.value]).secret for role in Role}
    result = refusals.tried(guarded.channel, guarded.admin, secrets, over)
    assert result["wrong"] == []
    assert result["rpcs"] == len(list(rpcs())) >= 15
    assert len(guarded.events("denied")) > 10


def test_a_call_is_denied_without_being_read(guarded: Guarded) -> None:
    """A stranger's request may be as large as a message can be: it stays in the socket."""
    rpc = next(r for r in rpcs() if r.method.endswith("/LoadRouter"))
    large = b"\0" * (80 << 20)  # beyond server.max_message_bytes, which would be another error
    outcome = call(guarded.channel, rpc, (large,))
    assert (outcome.code.name, outcome.reason) == ("UNAUTHENTICATED", "NO_KEY")


def test_unknown_methods_are_denied_too(guarded: Guarded) -> None:
    unknown = Rpc("/mora_serve.v1.AdapterService/Nothing", False, False)
    assert call(guarded.channel, unknown).reason == "NO_KEY"
    secret = guarded.key("acme").secret
    outcome = call(guarded.channel, unknown, metadata=make.authorization(secret))
    assert (outcome.code.name, outcome.reason) == ("PERMISSION_DENIED", "WRONG_ROLE")


def test_a_methods_name_is_no_way_to_write_to_the_audit_log(guarded: Guarded) -> None:
    """What a caller makes up is not in it; a call of this server's is named."""
    secret = guarded.key("acme", ["generate"]).secret
    before = len(guarded.events("denied"))
    admin = Rpc("/mora_serve.v1.RouterService/LoadRouter", False, False)
    for rpc in (Rpc("/forged/" + "x" * 1000, False, False), admin):
        call(guarded.channel, rpc, metadata=make.authorization(secret))
    wait_for(lambda: len(guarded.events("denied")) >= before + 2)
    assert [e["method"] for e in guarded.events("denied")[-2:]] == ["unknown", admin.method]


def test_strangers_do_not_fill_the_log(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    """A refusal without a key is told to those who look for it; one of a key's, to all."""
    secret = guarded.key("acme", ["generate"]).secret
    rpc = Rpc("/mora_serve.v1.RouterService/LoadRouter", False, False)
    with caplog.at_level(logging.DEBUG, "mora_serve.calls"):
        for secret_of in ("mora_none", secret):
            call(guarded.channel, rpc, metadata=make.authorization(secret_of))
        told = lambda: [  # noqa: E731
            r.levelname for r in list(caplog.records) if rpc.method in r.getMessage()
        ]
        wait_for(lambda: len(told()) == 2)
    assert told() == ["DEBUG", "INFO"]


def test_reflection_is_metered_as_other_calls_are(guarded: Guarded) -> None:
    with guarded.file.open("a") as file:
        file.write("\n[tenants.reflective]\nconcurrency = 1\n")
    metadata = make.authorization(make.key(guarded.file, "reflective", "reflective", ROLES))
    wait_for(lambda: call(guarded.channel, INFO_RPC, metadata=metadata).reason != "BAD_KEY")
    over = threading.Event()

    def messages() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        over.wait(60)

    stub = reflection_pb2_grpc.ServerReflectionStub(guarded.channel)
    answers = stub.ServerReflectionInfo(messages(), metadata=metadata, timeout=60)
    try:
        assert next(answers).list_services_response.service
        assert call(guarded.channel, INFO_RPC, metadata=metadata).reason == "TENANT_CONCURRENCY"
    finally:
        over.set()
    assert list(answers) == []
    wait_for(lambda: call(guarded.channel, INFO_RPC, metadata=metadata).code.name == "OK")


def test_health_needs_no_key(guarded: Guarded) -> None:
    for channel in (guarded.channel, guarded.admin):
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_key_is_in_use_when_it_is_in_the_file_and_not_when_it_is_gone(guarded: Guarded) -> None:
    before = guarded.file.read_text()
    caller = guarded.key("acme")
    guarded.file.write_text(before)
    stub = caller.stub(server_pb2_grpc.ServerServiceStub)
    wait_for(lambda: refused(lambda: stub.GetServerInfo(INFO)) == ("UNAUTHENTICATED", "BAD_KEY"))


def test_tenants_see_their_own_and_what_is_shared_and_nothing_else(guarded: Guarded) -> None:
    acme, globex, shared = map(guarded.key, ("acme", "globex", "shared"))
    acme.register("mine", "rev")
    globex.register("theirs", "sum")
    record = shared.register("common", "rev")
    assert record.shared
    assert acme.names() == ["common", "mine"]
    assert globex.names() == ["common", "theirs"]
    get = lambda caller, name: caller.adapters.GetAdapter(  # noqa: E731
        adapters_pb2.GetAdapterRequest(name=name)
    )
    assert refused(lambda: get(acme, "theirs")) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    for caller, count in ((acme, 2), (globex, 2), (shared, 1)):
        info = caller.stub(server_pb2_grpc.ServerServiceStub).GetServerInfo(INFO)
        assert info.adapters == count
    for name, expected in (
        ("mine", None),
        ("common", None),
        ("theirs", ("NOT_FOUND", "ADAPTER_NOT_FOUND")),
    ):
        mixture = generation_pb2.Mixture(adapters=[{"adapter": name}])
        assert refused(lambda m=mixture: acme.generate(mixture=m)) == expected
    task = generation_pb2.TaskHint(tasks=["do-sum"])
    assert refused(lambda: acme.generate(task=task)) == ("NOT_FOUND", "TASK_NOT_FOUND")
    assert globex.generate(task=task).decision.mixture.adapters[0].adapter == "theirs"
    remove = adapters_pb2.UnregisterAdapterRequest(name="common")
    assert refused(lambda: acme.adapters.UnregisterAdapter(remove)) == (
        "PERMISSION_DENIED",
        "SHARED_ADAPTER",
    )
    wait_for(lambda: guarded.events("denied")[-1]["reason"] == "SHARED_ADAPTER")
    denied = guarded.events("denied")[-1]
    assert denied["method"] == "/mora_serve.v1.AdapterService/UnregisterAdapter"
    assert denied["tenant"] == "acme"
    shared.adapters.UnregisterAdapter(remove)
    for caller, name in ((acme, "mine"), (globex, "theirs")):
        caller.adapters.UnregisterAdapter(adapters_pb2.UnregisterAdapterRequest(name=name))
    assert [e["adapter"] for e in guarded.events("adapter.registered")][-3:] == [
        *("mine", "theirs", "common"),
    ]
    assert {"tenant": "acme", "adapter": "mine", "version": 1}.items() <= (
        guarded.events("adapter.unregistered")[-2].items()
    )


def test_each_tenant_reads_only_its_own_directory(guarded: Guarded) -> None:
    acme, other = guarded.key("acme"), guarded.key("nobody")
    for path in ("../globex/rev", str(guarded.file.parent / "adapters" / "globex" / "rev")):
        error = refused(lambda p=path: acme.register("x", p))
        assert error is not None
        assert error[0] in ("INVALID_ARGUMENT", "NOT_FOUND")
    assert refused(lambda: other.register("x", "rev")) == ("FAILED_PRECONDITION", "NO_ROOT")


def test_the_limits_of_a_tenant_hold_and_are_its_own(guarded: Guarded) -> None:
    with guarded.file.open("a") as file:
        file.write("\n[tenants.small]\nrequests_per_second = 0.001\nburst = 3\n")
    metadata = make.authorization(make.key(guarded.file, "small", "small", ROLES))
    # Until the file is read again the key is not valid: such calls do not count.
    wait_for(lambda: call(guarded.channel, INFO_RPC, metadata=metadata).reason != "BAD_KEY")
    caller = Caller(guarded.channel, metadata[0][1].removeprefix("Bearer "))
    assert call(guarded.channel, INFO_RPC, metadata=metadata).code is grpc.StatusCode.OK
    assert call(guarded.channel, INFO_RPC, metadata=metadata).code is grpc.StatusCode.OK
    assert refused(caller.generate) == ("RESOURCE_EXHAUSTED", "TENANT_RATE")
    acme = guarded.key("acme")
    assert refused(acme.generate) is None


def test_an_administrators_call_is_written_down(guarded: Guarded) -> None:
    secret = guarded.key("acme").secret
    caller = Caller(guarded.admin, secret)
    load = router_pb2.LoadRouterRequest(data=b"no router")
    stub = caller.stub(router_pb2_grpc.RouterServiceStub)
    assert refused(lambda: stub.LoadRouter(load)) is not None
    assert guarded.events("router.loaded") == []
    caller.register("pinned", "rev")
    caller.adapters.PinAdapter(adapters_pb2.PinAdapterRequest(name="pinned", pinned=True))
    caller.adapters.UnregisterAdapter(adapters_pb2.UnregisterAdapterRequest(name="pinned"))
    assert guarded.events("adapter.pinned")[-1]["adapter"] == "pinned"


def test_without_an_access_file_the_tenant_is_what_the_caller_says(serving: Any) -> None:
    config: Config = serving.server.config
    assert not config.access.file
    with serving.client("some-tenant") as client:
        assert client.server_info().adapters == 0


class TestBeyondThisMachine:
    """Whoever reaches a server without keys may do all: it has to be wanted."""

    @pytest.mark.parametrize(
        ("flags", "field"),
        [
            ({"host": "0.0.0.0"}, "server.host"),
            ({"admin_host": "0.0.0.0", "admin_port": 0}, "server.admin_host"),
        ],
    )
    async def test_a_server_without_keys_does_not_listen(self, configure, flags, field) -> None:
        config = configure(server={"allow_plaintext": True, "metrics_port": -1, **flags})
        with pytest.raises(ConfigError, match=r"access\.allow_anonymous") as caught:
            async with MoraServer(config):
                pass
        assert caught.value.field == field

    async def test_one_with_keys_or_that_is_told_to_does(self, configure, tmp_path: Path) -> None:
        make.key(tmp_path / "access.toml", "k", "acme", ROLES)
        for access in ({"allow_anonymous": True}, {"file": str(tmp_path / "access.toml")}):
            flags = {"host": "0.0.0.0", "allow_plaintext": True, "metrics_port": -1}
            server = MoraServer(configure(server=flags, access=access))
            server._listen()
            assert server.port
            await server.stop(drain_seconds=0)
