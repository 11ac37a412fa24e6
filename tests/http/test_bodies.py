"""Bodies that are wrong: what is not served is refused by name, and nothing makes a fault."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mora_serve.http.schema import ChatCompletionRequest, CompletionRequest
from tests.http.conftest import asking, with_http
from tests.server.conftest import running

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
PLAIN = {"model": "base", "prompt": "hi", "max_tokens": 1}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": PLAIN}


def told(answer: httpx.Response) -> tuple[int, str, str]:
    """Status, parameter and code of an error object; it has no more than that and a message."""
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not any(sign in error["message"] for sign in ("Traceback", "/site-packages", "0x"))
    return answer.status_code, error["param"], error["code"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (path, field, value)
        for path, kind in (
            ("/v1/chat/completions", ChatCompletionRequest),
            ("/v1/completions", CompletionRequest),
        )
        for field in kind.refused
        for value in ({"x": 1},)
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    http: httpx.Client, path: str, field: str, value: Any
) -> None:
    answer = http.post(path, json={**PATHS[path], field: value})
    assert told(answer) == (400, field, "unsupported_parameter")


def test_what_means_nothing_is_taken(http: httpx.Client) -> None:
    """A client's own defaults, and null for everything."""
    neutral = {k: v[0] if v else None for k, v in ChatCompletionRequest.refused.items()}
    nulls = dict.fromkeys(ChatCompletionRequest.model_fields.keys() - CHAT.keys())
    for more in (neutral, nulls, {"n": 1, "stream": False, "user": "me"}):
        answer = http.post("/v1/chat/completions", json={**CHAT, **more})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"nothing": 1}, (400, "nothing", "unknown_parameter")),
        ({"model": None}, (400, "model", "invalid_argument")),
        ({"messages": []}, (400, "messages", "empty_prompt")),
        ({"messages": "hi"}, (400, "messages", "invalid_argument")),
        (
            {"messages": [{"role": "user", "content": "hi", "name": "x"}]},
            (400, "messages[0].name", "unsupported_parameter"),
        ),
        (
            {"messages": [{"role": "robot", "content": "hi"}]},
            (400, "messages[0].role", "unknown_role"),
        ),
        (
            {"messages": [{"role": "user"}]},
            (400, "messages[0].content", "invalid_argument"),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            (400, "messages[0].content[0].type", "invalid_argument"),
        ),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            (400, None, "invalid_json"),
        ),
        ({"temperature": 11}, (400, "temperature", "invalid_argument")),
        (
            {"messages": [{"role": "user", "content": 5}]},
            (400, "messages[0].content", "invalid_argument"),
        ),
        ({"temperature": "hot"}, (400, "temperature", "invalid_argument")),
        ({"temperature": "1"}, (400, "temperature", "invalid_argument")),
        ({"temperature": True}, (400, "temperature", "invalid_argument")),
        ({"temperature": 1e300}, (400, "temperature", "invalid_argument")),
        ({"top_p": 0}, (400, "top_p", "invalid_argument")),
        ({"n": 17}, (400, "n", "invalid_argument")),
        ({"max_tokens": 10**30}, (400, "max_tokens", "invalid_argument")),
        ({"max_tokens": 100_000}, (400, "max_tokens", "invalid_argument")),
        ({"max_completion_tokens": 2}, (400, "max_tokens", "invalid_argument")),
        ({"logprobs": True, "top_logprobs": 21}, (400, "top_logprobs", "invalid_argument")),
        ({"top_logprobs": 2}, (400, "top_logprobs", "invalid_argument")),
        ({"stop": ["a", "b", "c", "d", "e"]}, (400, "stop", "invalid_argument")),
        ({"stop": [""]}, (400, "stop[0]", "invalid_argument")),
        ({"stop": ["a", 5]}, (400, "stop[1]", "invalid_argument")),
        ({"stop": {}}, (400, "stop", "invalid_argument")),
        ({"<list>": 1}, (400, None, "unknown_parameter")),
        (
            {"model": "auto", "mora": {"adapters": {"sum": "1"}}},
            (400, "mora.adapters.sum", "invalid_argument"),
        ),
        (
            {"model": "auto", "mora": {"adapters": {"sum": {"weigt": 1}}}},
            (400, "mora.adapters.sum.weigt", "unknown_parameter"),
        ),
        ({"stop_token_ids": [10**6]}, (400, "stop_token_ids[0]", "unknown_token")),
        ({"stream_options": {"include": 1}}, (400, "stream_options.include", "unknown_parameter")),
        (
            {"stream_options": {"include_obfuscation": True}},
            (400, "stream_options.include_obfuscation", "unsupported_parameter"),
        ),
        ({"model": "Not a name!"}, (404, "model", "model_not_found")),
    ],
)
def test_a_mistake_is_named(
    http: httpx.Client, change: dict[str, Any], expected: tuple[int, str | None, str]
) -> None:
    # As JSON with escapes: half a character can be sent so.
    body = json.dumps({**CHAT, **change}).encode()
    headers = {"content-type": "application/json"}
    answer = http.post("/v1/chat/completions", content=body, headers=headers)
    assert told(answer) == expected


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([""], "prompt"),
        (5, "prompt"),
        (None, "prompt"),
        ({"a": 1}, "prompt"),
        ([1, "a"], "prompt"),
        ([[1], [-1]], "prompt[1]"),
        ([[2**40]], "prompt[0]"),
        ([True], "prompt"),
        ([10**6], "prompt[0]"),
        (["x"] * 17, "prompt"),
    ],
)
def test_a_prompt_in_no_known_form_is_refused(http: httpx.Client, prompt: Any, field: str) -> None:
    status, param, _ = told(http.post("/v1/completions", json={**PLAIN, "prompt": prompt}))
    assert (status, param) == (400, field)


def test_a_prompt_that_does_not_fit_says_so_in_openais_word(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={**PLAIN, "prompt": [1] * 3000})
    assert told(answer) == (400, "prompt", "context_length_exceeded")


def test_a_large_body_is_read_as_a_small_one(http: httpx.Client) -> None:
    """On a thread; what is wrong with it is told all the same, and others go on meanwhile."""
    turns = [{"role": "user", "content": "word"}] * 20_000
    answer = http.post("/v1/chat/completions", json={**CHAT, "messages": turns})
    assert told(answer) == (400, "messages", "context_length_exceeded")
    padded = {**PLAIN, "user": "x" * 100_000}
    assert http.post("/v1/completions", json=padded).status_code == 200
    turns = [*turns, {"role": "user", "content": "word", "name": "me"}]
    answer = http.post("/v1/chat/completions", json={**CHAT, "messages": turns})
    assert told(answer) == (400, "messages[20000].name", "unsupported_parameter")


def test_log_probabilities_of_a_prompt_are_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={**PLAIN, "echo": True, "logprobs": 1})
    assert told(answer) == (400, "echo", "unsupported_parameter")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[1]",
        b'"text"',
        b"{}",
        b"[" * 100_000,
        b'{"model":' * 50_000,
        b'{"model": 1' + b"0" * 5000 + b"}",
        json.dumps({f"k{i}": i for i in range(100_000)}).encode(),
        b'{"model":"base","messages":[' + b"1," * 200_000 + b"1]}",
        b'{"model":"base","prompt":[' + b"1.5," * 200_000 + b"1]}",
        b'{"model":"base","prompt":"x","temperature":NaN}',
        b'{"model":"base","prompt":"x","temperature":Infinity}',
    ],
    ids=range(15),
)
@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_request_is_a_bad_request(http: httpx.Client, path: str, body: bytes) -> None:
    answer = http.post(path, content=body, headers={"content-type": "application/json"})
    assert told(answer)[0] == 400
    assert len(answer.content) < 1000


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
_FIELDS = sorted(
    {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, "tools", "x"}
    - {"max_tokens"}  # null would be a long answer
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from(sorted(PATHS)), change=st.dictionaries(st.sampled_from(_FIELDS), _VALUES)
)
def test_whatever_is_sent_is_answered_or_refused(
    http: httpx.Client, path: str, change: dict[str, Any]
) -> None:
    """Never a fault of the server, whatever stands in the fields."""
    body = {**PATHS[path], **change, "stream": False}
    data = json.dumps(body).encode()
    answer = http.post(path, content=data, headers={"content-type": "application/json"})
    if answer.status_code == 200:
        assert all(c["finish_reason"] for c in answer.json()["choices"])
    else:
        assert told(answer)[0] in (400, 404)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=200))
def test_garbage_is_refused(http: httpx.Client, data: bytes) -> None:
    headers = {"content-type": "application/json"}
    assert told(http.post("/v1/completions", content=data, headers=headers))[0] == 400


def test_a_body_that_is_no_json_by_its_own_word_is_not_read(http: httpx.Client) -> None:
    """A page of another site can have a browser send plain text here, but not JSON."""
    answer = http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert told(answer) == (415, "content-type", "not_json")


def test_another_method_and_an_unknown_path_are_told(http: httpx.Client) -> None:
    for method, path in (("GET", "/v1/completions"), ("POST", "/"), ("PUT", "/v1/models/x")):
        assert told(http.request(method, path)) == (405, None, "method_not_allowed")
    for path in ("/v1", "/v1/embeddings", "/..%2f..", "/v1/models/../../x"):
        assert told(http.post(path, json={})) == (404, None, "no_such_path")


def test_a_body_is_bounded(root: Any) -> None:
    """By what it says of itself, and by what comes."""
    with running(with_http(root, server={"max_message_bytes": 10_000})) as serving:
        with asking(serving) as http:
            large = {**PLAIN, "prompt": "x" * 20_000}
            assert told(http.post("/v1/completions", json=large)) == (413, None, "body_too_large")

            def parts() -> Any:
                for _ in range(20):
                    yield b" " * 1000

            headers = {"content-type": "application/json"}
            answer = http.post("/v1/completions", content=parts(), headers=headers)
            assert told(answer) == (413, None, "body_too_large")
        assert serving.server._gate.state.value == "serving"


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "soon", "1e9"])
def test_a_timeout_that_is_none_is_refused(http: httpx.Client, timeout: str) -> None:
    headers = {"x-request-timeout": timeout}
    answer = http.post("/v1/completions", json=PLAIN, headers=headers)
    assert told(answer) == (400, "x-request-timeout", "invalid_argument")


def test_the_log_probability_of_what_cannot_be_is_a_number() -> None:
    from mora_serve.core import TokenOut
    from mora_serve.http.forms import ChatForm
    from mora_serve.http.tokens import TokenTexts

    class Tokenizer:
        def vocabulary(self) -> dict[str, int]:
            return {"a": 0}

    texts = TokenTexts(Tokenizer())  # type: ignore[arg-type]
    written = ChatForm().logprobs([TokenOut(0, -math.inf)], texts, 0)
    assert json.loads(json.dumps(written, allow_nan=False))["content"][0]["logprob"] == -9999.0
