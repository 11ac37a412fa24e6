"""The script's own books: what it counts as passed, and what it names."""

from __future__ import annotations

import httpx
import openai

from benchmarks.openai_client import Checks


def error(status: int, code: str, request_id: str | None) -> openai.APIStatusError:
    headers = {} if request_id is None else {"x-request-id": request_id}
    request = httpx.Request("POST", "http://127.0.0.1/v1")
    answer = httpx.Response(status, headers=headers, request=request)
    kind = openai.NotFoundError if status == 404 else openai.BadRequestError
    return kind("no", response=answer, body={"code": code})


def test_what_holds_is_counted_and_what_does_not_is_named() -> None:
    checks = Checks()
    checks.that("one", 1)
    checks.that("none", None)
    assert (checks.passed, checks.failed) == (1, ["none"])


def test_an_error_has_to_be_of_its_kind_with_its_code_and_an_id() -> None:
    checks = Checks()
    with checks.raises("right", openai.NotFoundError, "gone"):
        raise error(404, "gone", "r-1")
    assert (checks.passed, checks.failed) == (2, [])
    with checks.raises("kind", openai.NotFoundError, "gone"):
        raise error(400, "gone", "r-1")
    with checks.raises("code", openai.NotFoundError, "gone"):
        raise error(404, "else", "r-1")
    with checks.raises("id", openai.NotFoundError, "gone"):
        raise error(404, "gone", None)
    with checks.raises("none", openai.NotFoundError, "gone"):
        pass
    assert checks.failed == [
        "kind: BadRequestError",
        "code: code else",
        "id: request id",
        "none: no error",
    ]
