"""A router on n-grams and the base's hidden states, in a server with the bundled base."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import shutil
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from mora_serve import errors
from mora_serve.client import Client
from mora_serve.config import BaseConfig, Config, load_config
from mora_serve.core import Source
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.loading import Base, load_base
from mora_serve.model.pooling import pooled_hidden
from mora_serve.router.features import Features, NGrams, PooledHidden
from mora_serve.router.format import read_router
from mora_serve.router.router import Router
from router_training.demo.loaded import ROUTER_FILE, LoadedBundle
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import HELD_OUT, KNOWN, TASKS
from router_training.router import FitOptions, fit_router
from router_training.router_data import RouterData
from tests.server.conftest import Running, running

DEPTH, TOKENS = 1, 64
BACKWARDS = "read 'vixul' backwards"
STREAM = {"max_tokens": 400, "ignore_eos": True, "base": True}


def prompts(task: str, seed: int, count: int) -> list[str]:
    return [prompt for prompt, _ in TASKS[task].examples(seed, count)]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(BaseConfig("demo", dtype="fp32", device="cpu"))


@pytest.fixture(scope="module")
def fit(base):
    """Fits routers on both features for the bundled base; a seed gives another file."""

    @functools.cache
    def fit(seed: int) -> bytes:
        def pool(texts: list[str]) -> np.ndarray:
            return pooled_hidden(base.decoder, base.tokenizer, texts, DEPTH, TOKENS)

        rng = random.Random(1)
        hidden = PooledHidden(DEPTH, base.shape.hidden_size, TOKENS)
        data = RouterData.of(
            {name: prompts(name, 1, 30) for name in KNOWN},
            [out_of_domain(rng) for _ in range(150)],
        )
        features = Features(NGrams(dim=512), hidden)
        options = FitOptions(features, 64, strengths=(1.0,), folds=2, seed=seed)
        return fit_router(data, base.fingerprint, options, pool)[0]

    return fit


def config(feedback: bool = False, **server: str) -> Config:
    flags = {
        "router.feedback": feedback,
        "base.dtype": "fp32",
        "base.device": "cpu",
        "adapters.root": str(bundle_path()),
        "server.port": 0,
        "server.metrics_port": -1,
    }
    return load_config(environ={}, flags=flags | {f"server.{k}": v for k, v in server.items()})


@pytest.fixture(scope="module")
def serving() -> Iterator[Running]:
    with running(config()) as serving:
        yield serving


@pytest.fixture
def client(serving, fit) -> Iterator[Client]:
    with serving.client() as client:
        client.load_router(data=fit(0))
        yield client


def picked(client: Client, prompt: str, **options) -> list[str]:
    return [a.adapter for a in client.route(prompt, **options).mixture.adapters]


def streams(client: Client, count: int):
    """Streams that run to their end unless they fail; call the result to have their texts."""
    texts: list[str | None] = [None] * count
    begun = threading.Barrier(count + 1)

    def read(i: int) -> None:
        with client.stream("once upon a time", **STREAM) as deltas:
            begun.wait(60)
            texts[i] = "".join(d.text for d in deltas)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    begun.wait(60)

    def join() -> list[str | None]:
        for thread in threads:
            thread.join(120)
        assert None not in texts
        return texts

    return join


def test_it_is_described(client, fit):
    described = client.get_router()
    assert described.features == "both"
    assert described.dims == 64
    assert described.base_fingerprint == client.server_info().base.fingerprint


def test_prompts_reach_their_adapters(client):
    registered = {a.name for a in client.list_adapters()}
    known = [name for name in KNOWN if name in registered]
    asked = [(name, text) for name in known for text in prompts(name, 77, 6)]
    right = [picked(client, text) == [name] for name, text in asked]
    assert np.mean(right) >= 0.9


def test_scores_are_those_of_the_training_s_own_states(client, base, fit):
    """One implementation: what was fitted on is what is served."""
    router = Router.load(fit(0), base.fingerprint)
    text = prompts("reverse", 78, 1)[0]
    pool = functools.partial(pooled_hidden, base.decoder, base.tokenizer)
    card = client.get_adapter("reverse").card
    key = router.key(card.prompts, pool(card.prompts, DEPTH, TOKENS))
    z = router.embed(text, pool([text], DEPTH, TOKENS)[0])
    blend = router.calibration.blend
    want = (1 - blend) * (key.centre @ z) + blend * (key.prototypes @ z).max()
    found = {c.adapter: c.score for c in client.route(text).candidates}
    assert found["reverse"] == pytest.approx(float(want), abs=0.01)  # keys are kept in 8 bits


def test_the_trainer_s_copy_of_a_bundle_routes_as_the_server_does(client, fit, tmp_path):
    shutil.copytree(bundle_path(), tmp_path / "bundle")
    (tmp_path / "bundle/router" / ROUTER_FILE).write_bytes(fit(0))
    loaded = LoadedBundle(tmp_path / "bundle")
    for text in (BACKWARDS, "what is the weather like"):
        ours = {c.adapter: c.score for c in loaded.route(text).candidates}
        theirs = {c.adapter: c.score for c in client.route(text).candidates}
        assert theirs
        assert theirs == pytest.approx({name: ours[name] for name in theirs}, abs=1e-5)


def test_every_form_of_a_prompt_is_routed_alike(client, base):
    text = BACKWARDS
    routed = client.route(text)
    assert [a.adapter for a in routed.mixture.adapters] == ["reverse"]
    assert client.route("hm", route_by=text) == routed
    turns = [("user", "good morning"), ("assistant", "hello"), ("user", text)]
    assert client.route(messages=turns) == routed
    assert client.route(token_ids=base.tokenizer.plain(text)) == routed


def test_generation_and_routing_decide_the_same(client):
    text = prompts("uppercase", 80, 1)[0]
    assert client.generate(text, max_tokens=2).decision == client.route(text)


def test_a_decision_does_not_depend_on_what_runs_beside_it(client):
    asked = [text for name in KNOWN for text in prompts(name, 81, 2)]
    alone = [client.route(text) for text in asked]
    finish = streams(client, 4)
    assert [client.route(text) for text in asked] == alone
    assert len(set(finish())) == 1


def test_among_many_at_once_each_gets_its_own(client):
    """Requests share passes; none gets another's state."""
    asked = [text for name in KNOWN for text in prompts(name, 82, 3)]
    alone = [client.route(text) for text in asked]
    found: list = [None] * len(asked)

    def route(i: int) -> None:
        found[i] = client.route(asked[i])

    threads = [threading.Thread(target=route, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == alone


def test_a_hint_with_one_adapter_needs_no_state_and_one_with_two_is_ranked(serving, client):
    metrics = serving.server.metrics.registry

    def waits() -> float:
        return metrics.get_sample_value("mora_router_state_seconds_count") or 0.0

    before = waits()
    text = BACKWARDS
    assert picked(client, text, task="uppercase") == ["uppercase"]
    assert client.route(text, base=True).source is Source.BASE
    assert waits() == before
    cards = {name: client.get_adapter(name).card for name in ("reverse", "uppercase")}
    try:
        for name, card in cards.items():
            client.update_adapter(name, tasks=["both"], prompts=list(card.prompts))
        assert picked(client, text, task="both") == ["reverse"]
        assert waits() == before + 1
    finally:
        for name, card in cards.items():
            client.update_adapter(
                name, tasks=list(card.tasks), prompts=list(card.prompts), group=card.group
            )


def test_the_base_is_asked_only_for_what_can_be_decided(serving, client, monkeypatch):
    """Not for mixtures that are given, nor for selections that are refused."""
    assembly, asked = serving.server._assembly, []
    ask, pool = assembly.selector.ask, assembly.engine.pooled_hidden

    def watched_ask(tenant, selection, text):
        asked.append(type(selection).__name__)
        return ask(tenant, selection, text)

    def watched_pool(texts, *args, **kwargs):
        asked.append(list(texts))
        return pool(texts, *args, **kwargs)

    monkeypatch.setattr(assembly.selector, "ask", watched_ask)
    monkeypatch.setattr(assembly.engine, "pooled_hidden", watched_pool)
    client.route("x", adapters={"reverse": 1.0})
    assert asked == []
    for options, error, field in (
        ({"max_adapters": 100}, errors.InvalidArgument, "selection.auto.max_adapters"),
        ({"candidates": ["none"]}, errors.NotFound, "selection.auto.candidates[0]"),
        ({"task": "none"}, errors.NotFound, "selection.task.tasks[0]"),
    ):
        with pytest.raises(error) as e:
            client.route("x", **options)
        assert e.value.field == field
    assert [a for a in asked if isinstance(a, list)] == []
    client.route("x")
    assert asked[-1] == ["x"]


def test_the_text_of_ids_is_made_once(client, base, serving, monkeypatch):
    tokenizer, decoded = serving.server._assembly.base.tokenizer, []
    decode = tokenizer.decode

    def watched(ids):
        decoded.append(ids)
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", watched)
    assert client.route(token_ids=base.tokenizer.plain(BACKWARDS)).mixture.adapters
    assert len(decoded) == 1


def test_an_adapter_is_routable_when_its_registration_returns_and_streams_run_on(client):
    name = HELD_OUT[0]
    text = prompts(name, 84, 1)[0]
    directory = f"adapters/{name}"
    finish = streams(client, 4)
    for _ in range(3):
        client.register_adapter(name, directory, prompts=prompts(name, 3, 16))
        assert picked(client, text) == [name]
        client.update_adapter(name, prompts=["paint the wall", "boil two eggs"])
        assert picked(client, text) != [name]
        client.unregister_adapter(name)
    assert len(set(finish())) == 1


def test_it_is_replaced_while_requests_run_and_none_fails(client, fit):
    texts = [text for name in KNOWN[:4] for text in prompts(name, 85, 1)]
    allowed = {}
    bundled = (bundle_path() / "router/router.safetensors").read_bytes()
    files = [fit(0), fit(1), bundled]
    for data in files:
        digest = client.load_router(data=data).digest
        allowed[digest] = [client.route(text) for text in texts]
    stop, seen, wrong, failed = threading.Event(), set(), [], []

    def ask() -> None:
        while not stop.is_set():
            for i, text in enumerate(texts):
                try:
                    decision = client.generate(text, max_tokens=2).decision
                except Exception as e:
                    failed.append(e)
                    return
                seen.add(decision.router_digest)
                if decision != allowed[decision.router_digest][i]:
                    wrong.append(decision)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for data in files * 2:
        client.load_router(data=data)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert not wrong
    assert len(seen) > 1


def test_a_router_that_does_not_fit_the_base_is_refused(client, base, fit):
    shape = base.shape
    content, _ = read_router(fit(0))
    hidden = content.features.hidden
    before = client.get_router()

    def with_hidden(**changes) -> bytes:
        changed = dataclasses.replace(hidden, **changes)
        features = dataclasses.replace(content.features, hidden=changed)
        return dataclasses.replace(content, features=features).to_bytes()

    narrow = dataclasses.replace(
        content,
        features=Features(content.features.ngrams, dataclasses.replace(hidden, dim=64)),
        mean=content.mean[: 512 + 64],
        codes=content.codes[:, : 512 + 64],
    ).to_bytes()
    for data, told in (
        (with_hidden(depth=shape.layers + 1), f"{shape.layers + 1} layers"),
        (with_hidden(max_tokens=shape.max_positions + 1), f"{shape.max_positions + 1} positions"),
        (narrow, "64 numbers"),
        (dataclasses.replace(content, fingerprint="").to_bytes(), "fingerprint"),
        (dataclasses.replace(content, fingerprint="other").to_bytes(), "other"),
    ):
        with pytest.raises(errors.FailedPrecondition, match=told):
            client.load_router(data=data)
    assert client.get_router() == before


def test_stored_adapters_have_their_keys_when_a_restarted_server_serves(tmp_path, fit):
    with running(config(state=str(tmp_path))) as serving, serving.client() as client:
        client.load_router(data=fit(0))
        before = client.route(BACKWARDS)
        assert [a.adapter for a in before.mixture.adapters] == ["reverse"]
    with running(config(state=str(tmp_path))) as serving, serving.client() as client:
        assert client.route(BACKWARDS) == before


def test_feedback_is_routed_in_the_background_many_rows_at_once(fit, monkeypatch):
    with running(config(feedback=True)) as serving, serving.client() as client:
        client.load_router(data=fit(0))
        engine, asked = serving.server._assembly.engine, []
        pool = engine.pooled_hidden

        def pooled(texts, *args, background=False, **more):
            asked.append((len(texts), background))
            return pool(texts, *args, background=background, **more)

        monkeypatch.setattr(engine, "pooled_hidden", pooled)
        texts = [*prompts("reverse", 86, 5), *prompts("json", 86, 5)]
        for text in texts:
            client.generate(text, task="uppercase", max_tokens=1)
        rows = [row for part in client.export_feedback() for row in part.rows]
        assert sum(n for n, _ in asked) == len(texts)
        assert all(background for _, background in asked)
        assert [(r.prompt, list(r.adapters)) for r in rows] == [(t, ["uppercase"]) for t in texts]
        assert [list(r.routed_adapters) for r in rows] == [picked(client, text) for text in texts]


def test_when_the_engine_is_gone_callers_are_told(fit, monkeypatch):
    with running(config()) as serving, serving.client() as client:
        client.load_router(data=fit(0))
        engine = serving.server._assembly.engine
        monkeypatch.setattr(engine.scheduler, "schedule", lambda *a: 1 / 0)
        with contextlib.suppress(errors.Unavailable):  # it may have its state before the fault
            client.route("reverse 'kavo'")
        with pytest.raises(errors.Unavailable):
            client.route("reverse 'kavo'")
        with pytest.raises(errors.Unavailable):
            client.update_adapter("json", prompts=["as json"])
        with pytest.raises(errors.Unavailable):
            client.load_router(data=fit(1))
        with pytest.raises(errors.Unavailable):
            client.route("x", task="uppercase")
