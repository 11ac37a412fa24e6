"""Do OpenAI's own clients get what they ask for? A scripted conversation on the bundled models.

A server with keys is started as its users start it; an adapter is registered over gRPC; then the
official Python client, blocking and asynchronous, lists models, chats, streams, continues a
conversation on the mixture of its first turn, asks for log-probabilities, several answers, a stop,
a seed, and for what is refused. Each check is counted; those that fail are named.

    python -m benchmarks.openai_client [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from benchmarks import report
from benchmarks.keys import add_key
from mora_serve.access.roles import Role
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.demo.process import ServerProcess, free_port

LATE = "spell-late"


class Checks:
    """Counts what holds, and names what does not."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []

    def that(self, name: str, holds: object) -> None:
        """One check."""
        if holds:
            self.passed += 1
        else:
            self.failed.append(name)

    @contextmanager
    def raises(self, name: str, kind: type[openai.APIStatusError], code: str) -> Iterator[None]:
        """The client raises its own class of error, with a code and a request id."""
        try:
            yield
        except kind as e:
            self.that(f"{name}: code {e.code}", e.code == code)
            self.that(f"{name}: request id", e.request_id)
        except Exception as e:
            self.failed.append(f"{name}: {type(e).__name__}")
        else:
            self.failed.append(f"{name}: no error")


def main() -> None:
    """Run it, print what failed, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    for line in result["failed"]:
        report.log(f"failed: {line}")
    report.log(f"{result['passed']} checks passed, {len(result['failed'])} failed")
    report.emit({**result, "failed": len(result["failed"]), "environment": report.environment()})


def measure(folder: Path) -> dict[str, Any]:
    """Start a server and have the conversation."""
    file, port = folder / "access.toml", free_port()
    user = add_key(file, "user", "acme", [Role.GENERATE])
    owner = add_key(file, "owner", "acme", [Role.REGISTER])
    (folder / "adapters").mkdir()
    (folder / "adapters" / "acme").symlink_to(bundle_path() / "adapters")
    flags = {
        "access.file": file,
        "adapters.root": folder / "adapters",
        "server.http_port": port,
        "engine.threads": 1,
    }
    start, checks = time.monotonic(), Checks()
    with ServerProcess(flags) as server:
        base_url = f"http://127.0.0.1:{port}/v1"
        with Client(server.address, api_key=owner) as grpc:
            server.wait_until_ready(grpc)
            register(checks, grpc)
        with openai.OpenAI(base_url=base_url, api_key=user, timeout=60) as client:
            models(checks, client)
            chat(checks, client)
            completions(checks, client)
            errors(checks, client, base_url, owner)
        asyncio.run(concurrently(checks, base_url, user))
    return {
        "passed": checks.passed,
        "failed": checks.failed,
        "seconds": round(time.monotonic() - start, 1),
    }


def register(checks: Checks, grpc: Client) -> None:
    """An adapter that is there from now on."""
    made = grpc.upload_adapter(LATE, bundle_path() / "adapters" / "spell")
    checks.that("registered", made.name == LATE)


def models(checks: Checks, client: openai.OpenAI) -> None:
    """What ``model`` can be."""
    names = [m.id for m in client.models.list()]
    checks.that("models begin with the base and the router", names[:2] == ["demo", "auto"])
    checks.that("the registered adapter is a model", LATE in names)
    checks.that("a bundled adapter is a model", "reverse" in names)
    described = client.models.retrieve(LATE)
    checks.that("an adapter is described", kind_of(described) == "adapter")


def mora_of(answer: Any) -> Any:
    """What this server says of the adapters that answered."""
    return answer.mora


def kind_of(model: Any) -> Any:
    """What this server says a model is."""
    return model.mora["kind"]


def chat(checks: Checks, client: openai.OpenAI) -> None:
    """Every routed example of the bundle, whole and streamed, and a second turn."""
    for example in read_examples(bundle_path()):
        if example.kind != "auto":
            continue
        messages: Any = [{"role": "user", "content": example.prompt}]
        ask = {"model": "auto", "messages": messages, "temperature": 0, "max_tokens": 64}
        whole = client.chat.completions.create(**ask)
        text = whole.choices[0].message.content
        mora = mora_of(whole)
        expected = [example.adapter] if example.adapter else []
        checks.that(f"routed to {expected}", set(expected) <= set(mora["adapters"]))
        checks.that(f"answered by {example.adapter}", text == example.answer)
        checks.that("an end is a stop", whole.choices[0].finish_reason == "stop")
        chunks = list(
            client.chat.completions.create(
                **ask, stream=True, stream_options={"include_usage": True}
            )
        )
        streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        checks.that("a stream is the whole answer", streamed == text)
        counts = chunks[-1].usage, whole.usage
        checks.that("a stream has a usage", all(counts))
        totals = {u.total_tokens for u in counts if u is not None}
        checks.that("a stream's usage is the whole's", len(totals) == 1)
        messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": example.prompt},
        ]
        again = client.chat.completions.create(
            **ask, extra_body={"mora": {"adapters": mora["adapters"]}}
        )
        kept = mora_of(again)
        checks.that("a conversation keeps its mixture", kept["adapters"] == mora["adapters"])
        checks.that("and says that it was given", kept["source"] == "explicit")


def completions(checks: Checks, client: openai.OpenAI) -> None:
    """Plain completions with what can be asked of them."""
    ask: dict[str, Any] = {"model": LATE, "prompt": "Spell the word: stone", "max_tokens": 24}
    one, two = (client.completions.create(**ask, seed=7).choices[0].text for _ in range(2))
    checks.that("a seed fixes the answer", one == two)
    several = client.completions.create(**ask, seed=7, n=3)
    checks.that("several answers", [c.index for c in several.choices] == [0, 1, 2])
    checks.that("the first is of the seed", several.choices[0].text == one)
    stopped = client.completions.create(**ask, temperature=0, stop=["n"])
    checks.that("a stop ends it", "n" not in stopped.choices[0].text)
    told = client.completions.create(**ask, temperature=0, logprobs=3)
    logprobs = told.choices[0].logprobs
    checks.that("log-probabilities", logprobs is not None and logprobs.token_logprobs)
    checks.that(
        "as many as tokens",
        logprobs is not None
        and told.usage is not None
        and len(logprobs.tokens or ()) == told.usage.completion_tokens,
    )
    echoed = client.completions.create(**ask, temperature=0, echo=True)
    checks.that("an echo", echoed.choices[0].text.startswith(ask["prompt"]))
    many = client.completions.create(**{**ask, "prompt": ["Spell: a", [5, 6, 7]]}, temperature=0)
    checks.that("several prompts, as text and as ids", len(many.choices) == 2)
    base = client.completions.create(**{**ask, "model": "demo"}, temperature=0)
    checks.that("the base has no adapter", mora_of(base)["adapters"] == {})


def errors(checks: Checks, client: openai.OpenAI, base_url: str, owner: str) -> None:
    """What is refused is the client's own error of the kind."""
    turn: Any = [{"role": "user", "content": "hello"}]
    ask: dict[str, Any] = {"model": "auto", "messages": turn}
    create: Callable[..., Any] = client.chat.completions.create
    with checks.raises("an unknown model", openai.NotFoundError, "model_not_found"):
        create(**{**ask, "model": "nothing"})
    for name, value in (
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 1}),
    ):
        with checks.raises(name, openai.BadRequestError, "unsupported_parameter"):
            create(**ask, **{name: value})
    with checks.raises("a field of nobody", openai.BadRequestError, "unknown_parameter"):
        create(**ask, extra_body={"no_such_field": 1})
    with checks.raises(
        "a prompt that does not fit", openai.BadRequestError, "context_length_exceeded"
    ):
        client.completions.create(model="demo", prompt=[1] * 100_000)
    wrong = client.with_options(api_key="sk-wrong", max_retries=0)
    with checks.raises("a wrong key", openai.AuthenticationError, "invalid_api_key"):
        wrong.models.list()
    other = client.with_options(api_key=owner, max_retries=0)
    with checks.raises("a key of another role", openai.PermissionDeniedError, "wrong_role"):
        other.chat.completions.create(**ask)


async def concurrently(checks: Checks, base_url: str, key: str) -> None:
    """Sixteen streams of the asynchronous client at once, of which some hang up."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key=key, timeout=60) as client:

        async def ask(i: int) -> str:
            stream = await client.chat.completions.create(
                model="reverse",
                messages=[{"role": "user", "content": "write the word 'stone' backwards"}],
                temperature=0,
                stream=True,
            )
            text = ""
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if i % 4 == 3:
                    await stream.close()
                    break
            return text

        texts = await asyncio.gather(*(ask(i) for i in range(16)))
        whole = {text for i, text in enumerate(texts) if i % 4 != 3}
        checks.that("streams beside each other agree", whole == {"enots"})
        listed = [m.id async for m in client.models.list()]
        checks.that("the asynchronous client lists models", LATE in listed)


if __name__ == "__main__":
    main()
