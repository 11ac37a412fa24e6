"""An HTTP port with keys: who is let in, what tenants see of each other, what is written down."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mora_serve.access.roles import ALLOWED, Role
from mora_serve.errors import ConfigError
from mora_serve.server.app import MoraServer
from tests.access import make
from tests.http.conftest import asking, openai_of, with_http
from tests.server.conftest import Running, running, wait_for, write_adapter

PLAIN = {"model": "base", "prompt": "hi", "max_tokens": 1}
LISTED = "/mora_serve.v1.AdapterService/ListAdapters"
PIN = "/mora_serve.v1.AdapterService/PinAdapter"


@dataclasses.dataclass
class Guarded:
    """A server with keys, by tenant and role, all made before it started."""

    serving: Running
    keys: dict[str, str]
    audit: Path

    def ask(self, key: str = "", **headers: str) -> Any:
        return asking(self.serving, self.keys.get(key, key), **headers)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]


@pytest.fixture(scope="module")
def guarded(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("http-access")
    file, audit, adapters = folder / "access.toml", folder / "audit", folder / "adapters"
    keys = {role.value: make.key(file, role.value, "acme", [role]) for role in Role}
    keys["globex"] = make.key(file, "globex", "globex", list(Role))
    keys["slow"] = make.key(file, "slow", "slow", [Role.GENERATE])
    keys["over"] = make.key(
        file, "over", "acme", [Role.GENERATE], "expires = 2020-01-01T00:00:00Z\n"
    )
    with file.open("a") as more:
        more.write("[tenants.slow]\nrequests_per_second = 0.5\nburst = 1\n")
    for tenant, name in (("acme", "secret"), ("shared", "everyones")):
        write_adapter(adapters / tenant / name, 1, root / "base")
    keys["shared"] = make.key(file, "shared", "shared", list(Role))
    config = with_http(
        root,
        access={"file": str(file), "audit": str(audit)},
        adapters={"root": str(adapters), "slots": 8},
        server={"admin_port": 0},
    )
    with running(config) as serving:
        guarded = Guarded(serving, keys, audit)
        for key, name in (("register", "secret"), ("shared", "everyones")):
            with guarded.ask(key) as http:
                path = "/mora_serve.v1.AdapterService/RegisterAdapter"
                assert http.post(path, json={"name": name, "path": name}).status_code == 200
        yield guarded


def test_every_path_needs_a_key_with_its_role(guarded: Guarded) -> None:
    """Each that is served, with no key, a wrong one, one whose time is over, and each role's."""
    api = guarded.serving.server._http.api  # type: ignore[union-attr]
    opened = {"/", "/console/{file}", "/healthz", "/docs", "/openapi.json"}
    tried = 0
    for route in api.app.routes:
        path, method = route.path, "POST" if "POST" in route.methods else "GET"
        if path in opened:
            continue
        assert path in ALLOWED, path
        for key in ("", "mora_wrong", "over"):
            with guarded.ask(key) as http:
                answer = http.request(method, path.replace("{model:path}", "base"))
                assert answer.status_code == 401, path
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        for role in Role:
            with guarded.ask(role.value) as http:
                answer = http.request(method, path.replace("{model:path}", "base"), json={})
                may = role in ALLOWED[path] and "Pin" not in path and "LoadRouter" not in path
                assert (answer.status_code == 403) != may, (path, role, answer.text)
                tried += 1
    assert tried >= 39


def test_the_health_and_the_documents_need_none(guarded: Guarded) -> None:
    with guarded.ask() as http:
        for path in ("/healthz", "/docs", "/openapi.json"):
            assert http.get(path).status_code == 200


def test_a_key_is_openais_api_key(guarded: Guarded) -> None:
    with openai_of(guarded.serving, api_key=guarded.keys["generate"]) as client:
        assert client.completions.create(**PLAIN).choices
    with (
        openai_of(guarded.serving, api_key="sk-wrong") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.completions.create(**PLAIN)
    assert caught.value.code == "invalid_api_key"


def test_a_tenant_sees_its_own_models_and_shared_ones(guarded: Guarded) -> None:
    def models(key: str) -> set[str]:
        with openai_of(guarded.serving, api_key=guarded.keys[key]) as client:
            return {m.id for m in client.models.list()} - {"base", "auto"}

    assert models("generate") == {"secret", "everyones"}
    assert models("globex") == {"everyones"}


def test_another_tenants_adapter_is_as_unknown_as_none(guarded: Guarded) -> None:
    """By name, in a mixture, as a candidate; the texts do not tell them apart."""
    with guarded.ask("globex") as http:
        for body in (
            {**PLAIN, "model": "NAME"},
            {**PLAIN, "model": "auto", "mora": {"adapters": {"NAME": 1}}},
            {**PLAIN, "model": "auto", "mora": {"candidates": ["NAME"]}},
        ):
            texts = []
            for name in ("secret", "sacred"):
                filled = json.loads(json.dumps(body).replace("NAME", name))
                answer = http.post("/v1/completions", json=filled)
                assert answer.status_code == 404
                texts.append(answer.text.replace(name, "NAME"))
            assert texts[0] == texts[1]
        assert http.get("/v1/models/secret").status_code == 404


def test_another_tenants_name_is_refused(guarded: Guarded) -> None:
    with guarded.ask("generate", **{"mora-tenant": "globex"}) as http:
        answer = http.post("/v1/completions", json=PLAIN)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_tenant")


def test_a_rate_is_429_with_the_time_to_come_again(guarded: Guarded) -> None:
    with guarded.ask("slow") as http:
        answers = [http.post("/v1/completions", json=PLAIN) for _ in range(2)]
    refused = answers[-1]
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["retry-after"] == "2"
    assert 0 < int(refused.headers["retry-after-ms"]) <= 2000
    assert refused.headers["x-should-retry"] == "true"


def test_openais_client_waits_and_succeeds(guarded: Guarded) -> None:
    key = guarded.keys["slow"]
    with openai_of(guarded.serving, api_key=key, max_retries=3) as client:
        for _ in range(2):
            assert client.completions.create(**PLAIN).choices


def test_administration_is_not_served_where_it_has_a_port_of_its_own(guarded: Guarded) -> None:
    with guarded.ask("admin") as http:
        answer = http.post(PIN, json={"name": "secret", "pinned": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_address")


def test_denials_are_in_the_audit_log_and_what_a_caller_makes_up_is_not(guarded: Guarded) -> None:
    def events() -> list[dict[str, Any]]:
        return [e for e in guarded.events() if e["request_id"].startswith("audited-")]

    with guarded.ask("register", **{"x-request-id": "audited-1"}) as http:
        http.post("/v1/completions", json=PLAIN)
    with guarded.ask("mora_wrong", **{"x-request-id": "audited-2"}) as http:
        http.get("/forged/path")
        http.get("/v1/models")
    wait_for(lambda: len(events()) >= 2)
    role, stranger = events()
    assert (role["event"], role["tenant"], role["key"]) == ("denied", "acme", "register")
    assert (role["method"], role["reason"]) == ("/v1/completions", "WRONG_ROLE")
    assert role["request_id"] == "audited-1"
    assert (stranger["tenant"], stranger["method"]) == ("", "/v1/models")


def test_a_body_is_not_read_before_its_key_is_checked(guarded: Guarded) -> None:
    """A stranger who says that 10 MB come is answered before they do."""
    with httpx.Client(base_url=f"http://127.0.0.1:{guarded.serving.server.http_port}") as http:
        sent = []

        def body() -> Iterator[bytes]:
            for _ in range(10_000):
                sent.append(1)
                yield b"x" * 1000

        try:
            answer = http.post(
                "/v1/completions",
                content=body(),
                headers={"content-type": "application/json", "expect": "100-continue"},
            )
            assert answer.status_code == 401
        except httpx.TransportError:  # the answer came while it was still being sent to
            pass
    assert guarded.serving.server._gate.state.value == "serving"


class TestOtherSites:
    """A page of another site, open in a browser on the operator's machine."""

    def test_may_not_call(self, serving: Running) -> None:
        with asking(serving) as http:
            answer = http.get("/v1/models", headers={"origin": "https://evil.example"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "other_origin")
            own = f"http://127.0.0.1:{serving.server.http_port}"
            assert http.get("/v1/models", headers={"origin": own}).status_code == 200
            assert http.get("/v1/models", headers={"origin": "null"}).status_code == 403

    def test_may_not_have_their_name_lead_here(
        self, serving: Running, guarded: Guarded, root: Path
    ) -> None:
        """DNS rebinding: the page's own name has come to mean this machine."""
        with asking(serving) as http:
            for host, status in (
                ("evil.example", 403),
                ("evil.example:80", 403),
                ("127.0.0.1.evil.example", 403),
                ("localhost", 200),
                ("localhost:1", 200),
                ("[::1]:8000", 200),
            ):
                assert http.get("/v1/models", headers={"host": host}).status_code == status
        config = with_http(
            root, access={"allow_anonymous": True}, server={"http_names": "a.example, Mora"}
        )
        with running(config) as named, asking(named) as http:
            for host, status in (
                ("evil.example", 403),
                ("a.example.evil.example", 403),
                ("A.example:8000", 200),
                ("mora", 200),
                ("localhost", 200),
            ):
                assert http.get("/v1/models", headers={"host": host}).status_code == status
        with guarded.ask("generate") as http:  # where there are keys, the page has none
            assert http.get("/v1/models", headers={"host": "a.example"}).status_code == 200


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"server": {"http_host": "0.0.0.0"}}, "server.http_host"),
        (
            {"server": {"http_host": "0.0.0.0"}, "access": {"allow_anonymous": True}},
            "server.http_host",
        ),
        ({"server": {"http_host": "no.such.host.invalid"}}, "server.http_host"),
        ({"server": {"http_host": "127.0.0.1", "tls_cert": "/none"}}, "server.tls_key"),
    ],
)
async def test_beyond_this_machine_the_rules_are_those_of_grpc(
    root: Path, sections: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        async with MoraServer(with_http(root, **sections)):
            pass
    assert caught.value.field == field


def test_the_console_is_open_and_what_it_asks_is_not(guarded: Guarded) -> None:
    """A path below that of its files is not taken for one of them."""
    with guarded.ask() as http:
        assert http.get("/").status_code == 200
        assert http.get("/console/main.js").status_code == 200
        for method in ("POST", "PUT", "GET"):
            assert http.request(method, "/console/map", json={}).status_code in (401, 404, 405)
        assert http.post("/console/map", json={}).status_code == 401
    with guarded.ask("register") as http:
        assert http.post("/console/map", json={}).status_code == 403
    with guarded.ask("generate") as http:
        assert http.post("/console/map", json={}).status_code == 200
