"""What OpenAI's own client asks of such a server, and what it makes of the answers."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from mora_serve.server.gate import State
from tests.http.conftest import openai_of, with_http
from tests.server.conftest import Running, running

TURN = [{"role": "user", "content": "hello there"}]
SHORT = {"max_tokens": 8, "extra_body": {"ignore_eos": True}}
GREEDY = {**SHORT, "temperature": 0}


def grpc_text(serving: Running, **options: Any) -> str:
    """What gRPC answers to the same, greedily."""
    with serving.client() as client:
        return client.generate(max_tokens=8, ignore_eos=True, **options).text


class TestModels:
    def test_the_base_the_router_and_the_adapters_are_models(self, client: openai.OpenAI) -> None:
        assert [m.id for m in client.models.list()] == ["base", "auto", "rev", "sum"]

    @pytest.mark.parametrize(
        ("name", "kind"), [("base", "base"), ("auto", "router"), ("rev", "adapter")]
    )
    def test_a_model_is_described(self, client: openai.OpenAI, name: str, kind: str) -> None:
        model = client.models.retrieve(name)
        assert (model.id, model.object, model.mora["kind"]) == (name, "model", kind)

    def test_an_unknown_model_is_not_found_and_the_nearest_are_named(
        self, client: openai.OpenAI
    ) -> None:
        for ask in (
            lambda: client.models.retrieve("revv"),
            lambda: client.chat.completions.create(model="revv", messages=TURN),
            lambda: client.completions.create(model="revv", prompt="hello", stream=True),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                ask()
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            assert "did you mean rev?" in str(caught.value)


class TestCompletions:
    @pytest.mark.parametrize(
        ("model", "selection"),
        [("base", {"base": True}), ("rev", {"adapters": {"rev": 1.0}})],
    )
    def test_answers_are_those_of_grpc(
        self, serving: Running, client: openai.OpenAI, model: str, selection: dict[str, Any]
    ) -> None:
        """The same engine path: a chat, a text and token ids."""
        chat = client.chat.completions.create(model=model, messages=TURN, **GREEDY)
        messages = [("user", "hello there")]
        assert chat.choices[0].message.content == grpc_text(serving, messages=messages, **selection)
        text = client.completions.create(model=model, prompt="hello there", **GREEDY)
        assert text.choices[0].text == grpc_text(serving, prompt="hello there", **selection)
        ids = client.completions.create(model=model, prompt=[5, 6, 7], **GREEDY)
        assert ids.choices[0].text == grpc_text(serving, token_ids=[5, 6, 7], **selection)

    def test_an_answer_has_the_form_of_openais(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model="rev", messages=TURN, **GREEDY)
        assert answer.object == "chat.completion"
        assert answer.model == "rev"
        assert answer.id == f"chatcmpl-{answer._request_id}"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 8
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8

    def test_a_stream_is_a_role_deltas_and_a_reason(self, client: openai.OpenAI) -> None:
        whole = client.chat.completions.create(model="rev", messages=TURN, **GREEDY)
        chunks = list(
            client.chat.completions.create(
                model="rev",
                messages=TURN,
                stream=True,
                stream_options={"include_usage": True},
                **GREEDY,
            )
        )
        first, *deltas, last, usage = chunks
        assert first.choices[0].delta.role == "assistant"
        assert first.mora["source"] == "explicit"
        assert all(d.choices[0].delta.role is None for d in deltas)
        content = "".join(d.choices[0].delta.content for d in deltas)
        assert content == whole.choices[0].message.content
        assert [c.choices[0].finish_reason for c in deltas] == [None] * len(deltas)
        assert last.choices[0].finish_reason == "length"
        assert (usage.choices, usage.usage.completion_tokens) == ([], 8)
        assert {c.id for c in chunks} == {first.id}
        assert all(c.usage is None for c in chunks[:-1])

    def test_a_stream_has_no_usage_unless_asked(self, client: openai.OpenAI) -> None:
        chunks = list(client.completions.create(model="rev", prompt="x", stream=True, **GREEDY))
        assert all(c.usage is None and c.choices for c in chunks)

    async def test_the_asynchronous_client_streams_many_at_once(self, serving: Running) -> None:
        async with openai_of(serving, openai.AsyncOpenAI) as client:

            async def ask() -> str:
                stream = await client.completions.create(
                    model="rev", prompt="hello there", stream=True, **GREEDY
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            texts = await asyncio.gather(*(ask() for _ in range(8)))
        assert len(set(texts)) == 1

    def test_the_helpers_of_the_client_put_a_stream_together(self, demo: Running) -> None:
        options = {"model": "reverse", "messages": TURN, "temperature": 0}
        with openai_of(demo) as client:
            with client.chat.completions.stream(**options) as stream:
                final = stream.get_final_completion()
            whole = client.chat.completions.create(**options)
        assert final.choices[0].message.content == whole.choices[0].message.content


class TestSampling:
    def test_a_seed_fixes_the_answer(self, client: openai.OpenAI) -> None:
        """At OpenAI's default temperature, which is not greedy; also by the seed that was drawn."""
        one, two, other = (
            client.completions.create(model="base", prompt="hello", seed=seed, **SHORT)
            for seed in (1, 1, 2)
        )
        drawn = client.completions.create(model="base", prompt="hello", **SHORT)
        assert drawn.mora["seed"] < 2**53  # of JavaScript's numbers too
        again = client.completions.create(
            model="base", prompt="hello", seed=drawn.mora["seed"], **SHORT
        )
        assert one.choices[0].text == two.choices[0].text != other.choices[0].text
        assert drawn.choices[0].text == again.choices[0].text

    def test_a_negative_seed_is_a_seed(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model="base", prompt="hello", seed=-1, **SHORT)
        assert answer.mora["seed"] == 2**64 - 1

    @pytest.mark.parametrize("as_list", [False, True])
    def test_an_answer_ends_before_a_stop(self, client: openai.OpenAI, as_list: bool) -> None:
        whole = client.completions.create(model="rev", prompt="hello there", **GREEDY)
        text = whole.choices[0].text
        stop = text[3:5]
        options = {**GREEDY, "stop": [stop] if as_list else stop}
        stopped = client.completions.create(model="rev", prompt="hello there", **options)
        assert stopped.choices[0].text == text[: text.index(stop)]
        assert stopped.choices[0].finish_reason == "stop"

    def test_several_answers_differ_by_their_seeds(self, client: openai.OpenAI) -> None:
        both = client.chat.completions.create(model="base", messages=TURN, n=2, seed=7, **SHORT)
        one = client.chat.completions.create(model="base", messages=TURN, seed=8, **SHORT)
        assert [c.index for c in both.choices] == [0, 1]
        assert both.choices[1].message.content == one.choices[0].message.content
        assert both.choices[0].message.content != one.choices[0].message.content
        assert both.usage.prompt_tokens == one.usage.prompt_tokens
        assert both.usage.completion_tokens == 16

    @pytest.mark.parametrize("stream", [False, True])
    def test_several_prompts_have_answers_of_their_own(
        self, client: openai.OpenAI, stream: bool
    ) -> None:
        alone = [
            client.completions.create(model="rev", prompt=p, echo=True, **GREEDY).choices[0].text
            for p in ("hello", "there")
        ]
        options = {**GREEDY, "echo": True, "n": 2, "stream": stream}
        answer = client.completions.create(model="rev", prompt=["hello", "there"], **options)
        texts = [""] * 4
        for part in answer if stream else [answer]:
            for choice in part.choices:
                texts[choice.index] += choice.text
        assert texts == [alone[0]] * 2 + [alone[1]] * 2
        assert alone[0].startswith("hello")

    def test_a_plain_completion_is_short_unless_told(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(
            model="base", prompt="x", extra_body={"ignore_eos": True}
        )
        assert answer.usage.completion_tokens == 16

    def test_the_field_that_replaces_max_tokens_does(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="base",
            messages=TURN,
            max_completion_tokens=3,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage.completion_tokens == 3


class TestLogprobs:
    def test_of_a_chat_are_those_of_grpc(self, serving: Running, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="rev", messages=TURN, logprobs=True, top_logprobs=3, **GREEDY
        )
        with serving.client() as grpc:
            expected = grpc.generate(
                messages=[("user", "hello there")],
                adapters={"rev": 1.0},
                max_tokens=8,
                ignore_eos=True,
                logprobs=3,
            )
        content = answer.choices[0].logprobs.content
        assert [t.logprob for t in content] == pytest.approx([t.logprob for t in expected.tokens])
        for token, other in zip(content, expected.tokens, strict=True):
            tops = [t.logprob for t in token.top_logprobs]
            assert tops == pytest.approx([t.logprob for t in other.top])
        joined = b"".join(bytes(t.bytes) for t in content).decode("utf-8", "replace")
        assert joined == answer.choices[0].message.content

    def test_of_a_stream_are_those_of_the_whole(self, client: openai.OpenAI) -> None:
        options = {**GREEDY, "logprobs": 2, "model": "rev", "prompt": "hello there"}
        whole = client.completions.create(**options).choices[0].logprobs
        streamed: dict[str, list[Any]] = {name: [] for name in whole.model_fields_set}
        for chunk in client.completions.create(stream=True, **options):
            if chunk.choices[0].logprobs is not None:
                for name, values in streamed.items():
                    values += getattr(chunk.choices[0].logprobs, name)
        assert streamed == {name: getattr(whole, name) for name in streamed}
        assert len(whole.tokens) == 8
        assert all(1 <= len(top) <= 3 for top in whole.top_logprobs)  # equal texts are one


class TestAdapters:
    def test_a_mixture_is_given_and_comes_back(
        self, serving: Running, client: openai.OpenAI
    ) -> None:
        mixture = {"rev": 0.5, "sum": -1.0}
        extra = {"ignore_eos": True, "mora": {"adapters": mixture}}
        answer = client.completions.create(
            model="auto", prompt="hello", max_tokens=8, temperature=0, extra_body=extra
        )
        assert answer.choices[0].text == grpc_text(serving, prompt="hello", adapters=mixture)
        used = answer.mora["adapters"]
        assert {name: a["weight"] for name, a in used.items()} == mixture
        again = client.completions.create(
            model="auto",
            prompt="hello",
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True, "mora": {"adapters": used}},
        )
        assert again.mora["adapters"] == used
        assert again.choices[0].text == answer.choices[0].text

    def test_a_task_names_its_adapter(self, client: openai.OpenAI) -> None:
        extra = {"mora": {"task": ["do-rev"]}}
        answer = client.completions.create(
            model="auto", prompt="hello", max_tokens=1, extra_body=extra
        )
        assert (list(answer.mora["adapters"]), answer.mora["source"]) == (["rev"], "task")

    def test_without_a_router_auto_is_the_base(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model="auto", prompt="hello", max_tokens=1)
        assert (answer.mora["adapters"], answer.mora["source"]) == ({}, "abstained")

    @pytest.mark.parametrize(
        ("model", "mora", "field"),
        [
            ("rev", {"adapters": {"sum": 1}}, "mora.adapters"),
            ("base", {"task": ["do-rev"]}, "mora.task"),
            ("auto", {"adapters": {"rev": 1}, "candidates": ["rev"]}, "mora.candidates"),
            ("auto", {"adapters": {"no": 1}}, "mora.adapters.no"),
            ("auto", {"adapters": {"rev": {"digest": "ab"}}}, "mora.adapters.rev.digest"),
            ("auto", {"adapters": {"rev": 1e300}}, "mora.adapters.rev.weight"),
            ("auto", {"task": []}, "mora.task"),
            ("auto", {"task": ["do-nothing"]}, "mora.task[0]"),
            ("auto", {"candidates": ["rev", "no"]}, "mora.candidates[1]"),
            ("auto", {"max_adapters": 99}, "mora.max_adapters"),
            ("auto", {"fallback_to_router": True}, "mora.fallback_to_router"),
            ("auto", {"nothing": 1}, "mora.nothing"),
        ],
    )
    def test_a_mistake_in_the_choice_is_named(
        self, client: openai.OpenAI, model: str, mora: dict[str, Any], field: str
    ) -> None:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
            client.completions.create(model=model, prompt="hello", extra_body={"mora": mora})
        assert caught.value.param == field
        assert str(caught.value.body["message"]).startswith(f"{field}: ")


class TestRouter:
    def test_auto_is_the_routers_choice_and_says_why(self, demo: Running) -> None:
        prompt = "Write this in capitals: quiet river"
        with openai_of(demo) as client, demo.client() as grpc:
            answer = client.chat.completions.create(
                model="auto", messages=[{"role": "user", "content": prompt}], temperature=0
            )
            expected = grpc.route(messages=[("user", prompt)])
        mora = answer.mora
        assert list(mora["adapters"]) == [a.adapter for a in expected.mixture.adapters]
        assert mora["adapters"]
        assert mora["source"] == "router"
        assert mora["router_digest"] == expected.router_digest
        scores = [c.score for c in expected.candidates]
        assert [c["score"] for c in mora["candidates"]] == pytest.approx(scores)

    def test_candidates_and_the_text_to_route_by_are_the_callers(self, demo: Running) -> None:
        mora = {"candidates": ["reverse", "roman"], "max_adapters": 1, "route_by": "in capitals: x"}
        with openai_of(demo) as client, demo.client() as grpc:
            answer = client.completions.create(
                model="auto", prompt="hello", max_tokens=4, extra_body={"mora": mora}
            )
            expected = grpc.route(
                "hello",
                candidates=mora["candidates"],
                max_adapters=1,
                route_by=mora["route_by"],
            )
        names = [c.adapter for c in expected.candidates]
        assert [c["adapter"] for c in answer.mora["candidates"]] == names


def test_an_adapter_registered_over_grpc_is_a_model_at_once(serving: Running) -> None:
    tenant = "openai-late"
    with (
        serving.client(tenant) as grpc,
        openai_of(serving, default_headers={"mora-tenant": tenant}) as client,
    ):
        assert [m.id for m in client.models.list()] == ["base", "auto"]
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="plain", prompt="x")
        grpc.register_adapter("plain", "plain")
        assert client.completions.create(model="plain", prompt="x", max_tokens=1).choices
        assert [m.id for m in client.models.list()] == ["base", "auto", "plain"]


class TestRetries:
    def test_a_client_comes_again_when_it_is_told_to(self, root: Any) -> None:
        """503 with a time to come again; the official client waits so long and succeeds."""
        with running(with_http(root)) as serving:
            gate = serving.server._gate
            gate.state = State.LOADING
            seen: list[int] = []

            def watch(response: Any) -> None:
                seen.append(response.status_code)
                gate.state = State.SERVING

            http = openai.DefaultHttpxClient(event_hooks={"response": [watch]})
            with openai_of(serving, max_retries=2, http_client=http) as client:
                assert client.completions.create(model="base", prompt="x", max_tokens=1).choices
        assert seen == [503, 200]
