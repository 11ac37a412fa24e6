"""Generate and GenerateStream against a real server."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mora_serve import errors
from mora_serve.adapters.registry import Registry
from mora_serve.client import AsyncClient, Client
from mora_serve.core import AdapterWeight, Event, Finish, Mixture, Source, TokenOut
from mora_serve.server.answers import in_pieces
from tests.server.conftest import LONGEST, OUTLASTING, running, wait_for, write_adapter

LONG = {"max_tokens": 60, "ignore_eos": True}


@pytest.fixture
def adapters(client):
    """The client's tenant has rev, sum and plain."""
    return {name: client.register_adapter(name, name).digest for name in ("rev", "sum", "plain")}


def engine(serving):
    return serving.server._assembly.engine


def idle(serving):
    stats = engine(serving).stats()
    return stats.running == stats.waiting == 0


class TestAnswers:
    def test_an_answer_comes_with_what_made_it(self, client):
        got = client.generate("hello", base=True, max_tokens=8, ignore_eos=True)
        assert len(got.tokens) == got.usage.completion_tokens == 8
        assert (got.finish, got.usage.prompt_tokens) == (Finish.LENGTH, 5)
        assert (got.decision.mixture, got.decision.source) == (Mixture(), Source.BASE)
        usage = got.usage
        assert 0 <= usage.queue_seconds <= usage.first_token_seconds <= usage.total_seconds

    def test_a_stream_says_what_runs_then_the_answer_then_what_it_took(self, client):
        options = {"base": True, "seed": 5, "temperature": 1.0, **LONG, "max_tokens": 20}
        whole = client.generate("hello", **options)
        with client.stream("hello", **options) as stream:
            assert stream.decision == whole.decision
            assert (stream.prompt_tokens, stream.seed, stream.finish) == (5, 5, None)
            deltas = list(stream)
        assert "".join(d.text for d in deltas) == whole.text
        assert sum((d.tokens for d in deltas), ()) == whole.tokens
        assert stream.finish is whole.finish
        assert stream.usage.completion_tokens == 20

    def test_three_forms_of_one_prompt_are_one(self, serving, client):
        """Text, its ids, and a chat whose template gives that text."""
        options = {"base": True, **LONG, "max_tokens": 12}
        text = "<user>hi<assistant>"
        ids = engine(serving).base.tokenizer.encode(text)
        answers = [
            client.generate(text, **options),
            client.generate(token_ids=ids, **options),
            client.generate(messages=[("user", "hi")], **options),
        ]
        assert {a.usage.prompt_tokens for a in answers} == {len(ids)}
        assert len({a.text for a in answers}) == 1

    def test_a_seed_gives_the_answer_again(self, client):
        options = {"base": True, "temperature": 1.5, **LONG, "max_tokens": 30}
        first, other = (client.generate("hello", **options) for _ in range(2))
        assert first.seed != other.seed
        assert first.tokens != other.tokens
        assert client.generate("hello", **options, seed=first.seed).tokens == first.tokens

    def test_logprobs_are_given_when_asked_for(self, client):
        options = {"base": True, "max_tokens": 3, "ignore_eos": True}
        assert client.generate("a", **options).tokens[0].logprob is None
        for token in client.generate("a", **options, logprobs=0).tokens:
            assert token.logprob <= 0
            assert token.top == ()
        for token in client.generate("a", **options, logprobs=4).tokens:
            assert token.top[0].token == token.id  # greedy
            assert len(token.top) == 4

    def test_a_stop_string_ends_the_answer_and_is_not_in_it(self, client):
        options = {"base": True, **LONG}
        whole = client.generate("hello", **options).text
        stop = whole[5:8]
        got = client.generate("hello", **options, stop=stop)
        assert got.text == whole[: whole.index(stop)]
        assert got.finish is Finish.STOP

    def test_a_stop_id_ends_the_answer(self, client):
        options = {"base": True, **LONG}
        tokens = [t.id for t in client.generate("hello", **options).tokens]
        got = client.generate("hello", **options, stop_token_ids=[tokens[4]])
        assert got.finish is Finish.STOP
        assert len(got.tokens) == tokens.index(tokens[4]) + 1

    @settings(
        max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(prompt=st.text(min_size=1, max_size=30))
    def test_any_text_is_answered(self, client, prompt):
        """Whatever characters the prompt holds, the streamed pieces are the whole answer."""
        options = {"base": True, "max_tokens": 12, "ignore_eos": True, "temperature": 2.0}
        with client.stream(prompt, **options, seed=1) as stream:
            pieces = [delta.text for delta in stream]
        assert "".join(pieces) == client.generate(prompt, **options, seed=1).text


class TestSelections:
    def test_a_mixture_runs_with_the_weights_given(self, client, adapters):
        got = client.generate("x", adapters={"rev": 0.5, "sum": -1.25}, **LONG)
        assert got.decision.source is Source.EXPLICIT
        rev, sum_ = adapters["rev"], adapters["sum"]
        want = (AdapterWeight("rev", 0.5, rev), AdapterWeight("sum", -1.25, sum_))
        assert got.decision.mixture == Mixture(want)

    def test_adapters_change_the_answer_and_weight_zero_does_not(self, client, adapters):
        base, zero, one, other = (
            client.generate("hello", adapters=a, **LONG).text
            for a in ({}, {"rev": 0.0}, {"rev": 1.0}, {"sum": 1.0})
        )
        assert base == zero
        assert len({base, one, other}) == 3

    def test_a_task_is_one_adapter(self, client, adapters):
        got = client.generate("x", task="do-sum", max_tokens=1)
        assert got.decision.source is Source.TASK
        assert got.decision.mixture == Mixture((AdapterWeight("sum", 1.0, adapters["sum"]),))

    def test_tasks_compose(self, client, adapters):
        got = client.generate("x", task=["do-sum", "do-rev"], max_tokens=1)
        assert {a.adapter for a in got.decision.mixture.adapters} == {"rev", "sum"}

    def test_an_unknown_task_can_fall_back_to_the_router(self, client, adapters):
        got = client.generate("x", task="nothing", fallback_to_router=True, max_tokens=1)
        assert got.decision.source in (Source.ROUTER, Source.ABSTAINED)

    def test_a_decision_sent_back_keeps_the_choice(self, client, adapters):
        first = client.generate("hello", adapters={"rev": 0.5}, **LONG)
        again = client.generate("hello", adapters=first.decision.mixture, **LONG)
        assert again.text == first.text

    def test_tenants_do_not_see_each_others_adapters(self, serving, client, adapters):
        with Client(serving.server.address, tenant="stranger") as stranger:
            assert stranger.list_adapters() == []
            with pytest.raises(errors.NotFound):
                stranger.generate("x", adapters={"rev": 1.0})


class TestLifetimes:
    def test_many_at_once_answer_as_alone(self, serving, client, adapters):
        """Different mixtures share batches without a trace in each other's answers."""
        mixtures = ({}, {"rev": 1.0}, {"sum": 1.0}, {"rev": 0.5, "plain": 0.5})
        jobs = [(f"prompt {i}", mixtures[i % 4]) for i in range(24)]
        alone = [client.generate(p, adapters=m, max_tokens=24).text for p, m in jobs]

        async def together():
            async with AsyncClient(serving.server.address, tenant=client._tenant) as c:
                calls = (c.generate(p, adapters=m, max_tokens=24) for p, m in jobs)
                return [r.text for r in await asyncio.gather(*calls)]

        assert asyncio.run(together()) == alone

    def test_a_cancelled_stream_frees_everything_at_once(self, serving, client, adapters):
        before = engine(serving).stats()
        stream = client.stream("hello", adapters={"rev": 1.0}, **OUTLASTING)
        next(iter(stream))
        stream.cancel()
        wait_for(lambda: idle(serving))
        after = engine(serving).stats()
        assert after.generation_tokens - before.generation_tokens < LONGEST
        assert after.kv_pages_used == before.kv_pages_used == 0

    def test_a_deadline_ends_the_answer(self, serving, client):
        with pytest.raises(errors.DeadlineExceeded):
            client.generate("hello", base=True, timeout=0.02, **OUTLASTING)
        wait_for(lambda: idle(serving))

    def test_a_replaced_adapter_serves_its_stream_to_the_end(self, serving, client, adapters):
        """The stream that began on the old version ends on it; the next has the new one."""
        whole = client.generate("hello", adapters={"rev": 1.0}, **LONG)
        with client.stream("hello", adapters={"rev": 1.0}, **LONG) as stream:
            received = iter(stream)
            text = next(received).text
            new = client.register_adapter("rev", "sum", replace=True)
            text += "".join(d.text for d in received)
        assert text == whole.text
        assert stream.decision.mixture.adapters[0].digest == adapters["rev"]
        after = client.generate("hello", adapters={"rev": 1.0}, **LONG)
        assert (new.version, new.digest) == (2, after.decision.mixture.adapters[0].digest)
        assert after.text == client.generate("hello", adapters={"sum": 1.0}, **LONG).text

    def test_an_old_version_cannot_be_asked_for(self, client, adapters):
        client.register_adapter("rev", "plain", replace=True)
        old = Mixture((AdapterWeight("rev", 1.0, adapters["rev"]),))
        with pytest.raises(errors.NotFound, match="version"):
            client.generate("x", adapters=old)

    def test_what_another_process_removed_is_routed_to_no_more(self, configure, tmp_path):
        """Processes may share a state: one that lags behind looks again before it refuses."""
        config = configure(server={"state": str(tmp_path)})
        with running(config) as serving, serving.client() as client:
            client.register_adapter("rev", "rev", tasks=["turn"])
            shape = engine(serving).base.shape
            with Registry(tmp_path, config.adapters, shape) as other:
                other.unregister("default", "rev")
            with pytest.raises(errors.NotFound, match="'turn' is not registered"):
                client.generate("x", task="turn")
            assert not client.list_adapters()

    def test_contents_of_ended_calls_are_let_go(self, serving, client, root):
        """A removed adapter lives as long as the streams that use it."""
        digest = client.upload_adapter("once", write_adapter(root / "once", seed=99)).digest
        registry = serving.server._assembly.registry
        with client.stream("x", adapters={"once": 1.0}, **OUTLASTING) as stream:
            client.unregister_adapter("once")
            assert registry.open(digest)
            assert len(list(stream)) > 1

        def gone():
            try:
                registry.open(digest)
            except errors.NotFound:
                return True
            return False

        wait_for(gone)


def test_what_a_slow_reader_missed_comes_in_pieces() -> None:
    """A message takes the event loop a moment only; nothing is lost, repeated or empty."""
    tokens = tuple(TokenOut(i) for i in range(1000))
    pieces = list(in_pieces(Event("r", tokens, "text")))
    assert max(len(part) for _, part in pieces) <= 128
    assert tuple(t for _, part in pieces for t in part) == tokens
    assert "".join(text for text, _ in pieces) == "text"
    assert list(in_pieces(Event("r"))) == []
    assert list(in_pieces(Event("r", (), "rest"))) == [("rest", ())]
