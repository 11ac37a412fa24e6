"""This server's own calls over HTTP: what gRPC answers, as JSON."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from mora_serve.http import rpc
from tests.http.conftest import asking
from tests.server.conftest import Running

ADAPTERS = "/mora_serve.v1.AdapterService"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def form(directory: Path, header: dict[str, Any], *names: str) -> list[tuple[str, Any]]:
    """An upload as a browser sends it."""
    files = [(n, (n, (directory / n).read_bytes())) for n in names or FILES]
    return [("header", (None, json.dumps(header))), *files]


def test_every_call_with_one_answer_is_served() -> None:
    paths = [path for path, _, _ in rpc.endpoints(lambda: None, None)]  # type: ignore[arg-type,return-value]
    assert {p.rpartition("/")[2] for p in paths} == {
        *("RegisterAdapter", "UploadAdapter", "UpdateAdapter", "UnregisterAdapter"),
        *("ListAdapters", "GetAdapter", "PinAdapter"),
        *("Route", "LoadRouter", "GetRouter", "GetServerInfo"),
    }


def test_an_adapter_lives_and_ends(serving: Running, root: Path) -> None:
    """Uploaded as a form, listed, described, changed, pinned, used, removed."""
    with asking(serving, **{"mora-tenant": "rpc-life"}) as http:

        def call(method: str, **request: Any) -> Any:
            answer = http.post(f"{ADAPTERS}/{method}", json=request)
            assert answer.status_code == 200, answer.text
            return answer.json()

        header = {"name": "mine", "card": {"tasks": ["t"], "prompts": ["a b", "c d"]}}
        directory = root / "adapters" / "plain"
        answer = http.post(f"{ADAPTERS}/UploadAdapter", files=form(directory, header))
        assert answer.status_code == 200, answer.text
        assert answer.json()["created"] is True
        assert [a["name"] for a in call("ListAdapters")["adapters"]] == ["mine"]
        adapter = call("GetAdapter", name="mine")["adapter"]
        assert (adapter["version"], adapter["card"]["tasks"]) == (1, ["t"])
        assert call("UpdateAdapter", name="mine", card={"tasks": ["u"]})["adapter"]["card"][
            "tasks"
        ] == ["u"]
        assert call("PinAdapter", name="mine", pinned=True)["adapter"]["pinned"] is True
        chat = {"model": "mine", "prompt": "hi", "max_tokens": 1}
        assert http.post("/v1/completions", json=chat).status_code == 200
        call("UnregisterAdapter", name="mine")
        assert call("ListAdapters")["adapters"] == []


def test_the_router_and_the_server_are_described(demo: Running) -> None:
    with asking(demo) as http:
        info = http.post("/mora_serve.v1.ServerService/GetServerInfo", json={}).json()
        router = http.post("/mora_serve.v1.RouterService/GetRouter", json={}).json()["router"]
        body = {"prompt": {"text": "Write this in capitals: quiet river"}}
        decision = http.post("/mora_serve.v1.RouterService/Route", json=body).json()["decision"]
    assert info["base"]["name"] == "demo"
    assert info["router_digest"] == router["digest"] == decision["router_digest"]
    assert decision["source"] == "SOURCE_ROUTER"
    assert decision["candidates"][0]["score"] > 0


def test_large_json_is_read_on_a_thread(
    http: httpx.Client, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a body as of an upload's header: some megabytes would keep everybody waiting."""
    parse, threads = rpc._parsed, []

    def parsed(data: bytes, message: Any, field: str) -> Any:
        threads.append((len(data) > rpc._SHORT, threading.current_thread().name[:8]))
        return parse(data, message, field)

    monkeypatch.setattr(rpc, "_parsed", parsed)
    for text in ("word", "word" * 3000):
        body = {"prompt": {"text": text}, "selection": {"auto": {"text": 5}}}
        answer = http.post("/mora_serve.v1.RouterService/Route", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body")
        header = {"name": "Not a name", "card": {"prompts": [text]}}
        upload = form(root / "adapters" / "plain", header)
        answer = http.post(f"{ADAPTERS}/UploadAdapter", files=upload)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "header.name")
    small, large = (
        [n for is_large, n in threads if not is_large],
        [n for is_large, n in threads if is_large],
    )
    assert len(small) == len(large) == 2
    assert set(large) == {"tokenize"}
    assert "tokenize" not in small


def test_errors_name_the_fields_of_the_messages(serving: Running) -> None:
    with asking(serving) as http:
        for name, body, status, param in (
            ("GetAdapter", {"name": "nothing"}, 404, "name"),
            ("ListAdapters", {"page_size": 100_000}, 400, "page_size"),
            ("ListAdapters", {"nothing": 1}, 400, "body"),
            ("ListAdapters", [], 400, "body"),
            ("RegisterAdapter", {"name": "\ud800"}, 400, "body"),
        ):
            data = json.dumps(body).encode()
            answer = http.post(
                f"{ADAPTERS}/{name}", content=data, headers={"content-type": "application/json"}
            )
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"data": b"--b\r\n"}, "header"),
        ({"data": b"nothing of a form"}, "body"),
        ({"data": b"--b\r\nx: " + b"y" * 5000 + b"\r\n\r\n\r\n--b--\r\n"}, "body"),
        (
            {"data": b'--b\r\ncontent-disposition: form-data; name="x"\r\n\r\n1\r\n--b--\r\n'},
            "body",
        ),
        (
            {"data": b'--b\r\ncontent-disposition: form-data; name="header"\r\n\r\n{\r\n--b--\r\n'},
            "header",
        ),
        (
            {
                "data": b'--b\r\ncontent-disposition: form-data; name="f"; filename="../x"\r\n\r\n1'
                b"\r\n--b--\r\n"
            },
            "kind",
        ),
        ({"data": b"{}", "kind": "application/json"}, "content-type"),
        ({"data": b"{}", "kind": "multipart/form-data"}, "content-type"),
    ],
)
def test_an_upload_in_another_form_is_refused(
    http: httpx.Client, change: dict[str, Any], field: str
) -> None:
    kind = change.get("kind", "multipart/form-data; boundary=b")
    answer = http.post(
        f"{ADAPTERS}/UploadAdapter", content=change["data"], headers={"content-type": kind}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_an_upload_is_checked_as_grpcs(http: httpx.Client, root: Path) -> None:
    directory = root / "adapters" / "plain"
    for header, names, field in (
        ({"name": "Not a name"}, FILES, "header.name"),
        ({"name": "x", "sha256": "0" * 64}, FILES, "header.sha256"),
        ({"name": "x"}, FILES[:1], FILES[1]),
    ):
        answer = http.post(f"{ADAPTERS}/UploadAdapter", files=form(directory, header, *names))
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == field
