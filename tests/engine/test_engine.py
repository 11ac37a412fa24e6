"""The engine step by step: isolation, limits, ends of requests, and what they leave behind."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from mora_serve.core import AdapterLoad, Event, Finish, SamplingParams
from mora_serve.errors import InvalidArgument, ResourceExhausted, Unavailable

PROMPT = [5 + 3 * i for i in range(20)]
GREEDY = SamplingParams(12, ignore_eos=True)


def drive(local, requests):
    """Submit, step until all have ended; the events of each request."""
    for request in requests:
        local.engine.submit(request)
    events = {r.id: [] for r in requests}
    while not all(e and e[-1].finish for e in events.values()):
        for event in local.step():
            if isinstance(event, Event):
                events[event.request_id].append(event)
    return [events[r.id] for r in requests]


def ids(events):
    return [t.id for e in events for t in e.tokens]


def check_nothing_held(local):
    local.engine.scheduler.check_integrity()
    local.engine.pool.check_integrity()
    assert local.engine.stats().kv_pages_used == 0
    assert local.engine.stats().running == 0


def test_base_rows_are_bit_identical_beside_adapters(make_engine):
    """Two empty mixtures in one batch with adapters give the same logits to the last bit."""
    local = make_engine()
    sampling = dataclasses.replace(GREEDY, logprobs=3)
    jobs = [{}, {"rank-8": 1.0}, {}, {"dora": 1.0, "rslora": -0.5}, {}]
    answers = drive(local, [local.request((PROMPT, m, sampling)) for m in jobs])
    tokens = [[t for e in a for t in e.tokens] for a in answers]
    assert tokens[0] == tokens[2] == tokens[4]
    assert ids(answers[1]) != ids(answers[0])


def test_zero_weights_are_the_base(make_engine):
    """An adapter at weight 0 is not loaded, and the answer is the base's."""
    local = make_engine()
    base, zero = drive(local, [local.request((PROMPT, m, GREEDY)) for m in ({}, {"rank-64": 0.0})])
    assert ids(base) == ids(zero)
    assert local.engine.stats().slot_misses == 0


def test_prompts_beside_a_running_stream_come_in_chunks(make_engine):
    """At a pace of 1 the smallest that there are, whatever a step takes; answers are the same."""
    job = (list(range(4, 104)), {"rank-4": 1.0}, GREEDY)
    local = make_engine(step_pace=1.0, prefix_cache=False)
    (alone,) = drive(local, [local.request(job)])
    stream = local.request((PROMPT, {}, SamplingParams(200, ignore_eos=True)))
    local.engine.submit(stream)
    while not any(isinstance(e, Event) for e in local.step()):
        pass
    request = local.request(job)
    local.engine.submit(request)
    computed = []
    while not any(isinstance(e, Event) and e.request_id == request.id for e in local.step()):
        computed += [s.computed for s in local.engine.scheduler.running if s.request is request]
    assert set(computed) == {16, 32, 48, 64, 80, 96}
    tokens = []
    while len(tokens) < len(ids(alone)):
        tokens += [
            t.id
            for step in local.steps
            for e in step
            if isinstance(e, Event) and e.request_id == request.id
            for t in e.tokens
        ][len(tokens) :]
        local.step()
    assert tokens == ids(alone)


def test_numbers_that_are_not_finite_end_one_request_only(make_engine, model_root, tmp_path):
    """An adapter that overflows fails its own request; neighbours and pages are untouched."""
    shutil.copytree(model_root / "adapters" / "rank-4", tmp_path / "overflow")
    file = tmp_path / "overflow" / "adapter_model.safetensors"
    save_file({k: v * 1e20 for k, v in load_file(file).items()}, file)
    local = make_engine()
    local.register("overflow", tmp_path, "overflow")
    good = {"rank-8": 1.0}
    (alone,) = drive(local, [local.request((PROMPT, good, GREEDY))])
    jobs = [good, {"overflow": 1.0}, good, {"overflow": 1.0, "rank-8": 1.0}]
    answers = drive(local, [local.request((PROMPT, m, GREEDY)) for m in jobs])
    for i in (1, 3):
        assert answers[i][-1].finish is Finish.ERROR
        assert "not finite" in answers[i][-1].error.message
    assert ids(answers[0]) == ids(answers[2]) == ids(alone)
    check_nothing_held(local)
    # Its pages, cleared, serve the next request.
    local.step()
    (again,) = drive(local, [local.request((PROMPT, good, GREEDY))])
    assert ids(again) == ids(alone)


def test_what_a_request_leaves_in_its_pages_reaches_nobody(make_engine, model_root, tmp_path):
    """A prompt that overflows and is aborted before its first token poisons no later request."""
    shutil.copytree(model_root / "adapters" / "rank-4", tmp_path / "overflow")
    file = tmp_path / "overflow" / "adapter_model.safetensors"
    save_file({k: v * 1e20 for k, v in load_file(file).items()}, file)
    local = make_engine(kv_pages=12, step_tokens=64, prefix_cache=False)
    local.register("overflow", tmp_path, "overflow")
    (alone,) = drive(local, [local.request((PROMPT, {}, GREEDY))])
    evil = local.request((PROMPT * 8, {"overflow": 1.0}, GREEDY), tenant="evil")
    local.engine.submit(evil)
    while not torch.isnan(local.engine.runner.kv.v).any():
        local.step()
    local.engine.abort(evil.id)
    local.step()
    answers = drive(local, [local.request((PROMPT, {}, GREEDY)) for _ in range(4)])
    assert [ids(a) for a in answers] == [ids(alone)] * 4


def test_ids_beyond_the_vocabulary_are_refused(make_engine):
    """A token that the embedding does not have never reaches a step."""
    local = make_engine()
    with pytest.raises(InvalidArgument, match="vocabulary of 320"):
        local.engine.submit(local.request(([5, 320], {}, GREEDY)))


def test_an_adapter_that_cannot_be_loaded_fails_only_its_requests(make_engine):
    """Content that is gone ends the requests that need it, with the reason."""
    local = make_engine()
    request = local.request((PROMPT, {"rank-8": 1.0}, GREEDY))
    del local.adapters[local.digests["rank-8"]]
    other = local.request((PROMPT, {"rank-4": 1.0}, GREEDY))
    failed, fine = drive(local, [request, other])
    assert failed[-1].finish is Finish.ERROR
    assert failed[-1].error.code == "NOT_FOUND"
    assert fine[-1].finish is Finish.LENGTH
    loads = [e for step in local.steps for e in step if isinstance(e, AdapterLoad)]
    assert sorted(bool(load.error) for load in loads) == [False, True]
    check_nothing_held(local)


def test_abort_frees_pages_and_slots_at_once(make_engine):
    """After an abort the next step holds nothing of the request."""
    local = make_engine()
    request = local.request((PROMPT, {"rank-8": 1.0}, SamplingParams(200, ignore_eos=True)))
    local.engine.submit(request)
    while not any(isinstance(e, Event) for e in local.step()):
        pass
    assert local.engine.cache.used > 0
    local.engine.abort(request.id)
    local.engine.abort("unknown")
    events = local.step()
    assert [e.finish for e in events if isinstance(e, Event)] == [Finish.CANCELLED]
    check_nothing_held(local)


def test_deadline_ends_running_and_waiting_requests(make_engine, monkeypatch):
    """A deadline is kept whether the request runs or waits."""
    local = make_engine(max_batch=1)
    long = SamplingParams(200, ignore_eos=True)
    clock, passed = time.monotonic, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed)
    requests = [
        dataclasses.replace(local.request((PROMPT, {}, long)), deadline=clock() + 1000)
        for _ in range(2)
    ]
    for request in requests:
        local.engine.submit(request)
    while not any(isinstance(e, Event) for e in local.step()):
        pass
    passed = 1000.0
    ended = {e.request_id: e for e in local.step() if isinstance(e, Event)}
    assert [ended[r.id].finish for r in requests] == [Finish.DEADLINE] * 2
    tokens = [ended[r.id].usage.completion_tokens for r in requests]
    assert tokens == [1, 0]
    check_nothing_held(local)


@pytest.mark.parametrize("stop", ["eos", "id", "string"])
def test_every_kind_of_stop(make_engine, stop):
    """End tokens, stop ids and stop strings end a request with STOP and give no text beyond."""
    local = make_engine()
    (free,) = drive(local, [local.request((PROMPT, {}, SamplingParams(30, ignore_eos=True)))])
    tokens = ids(free)
    at = next(i for i in range(3, 30) if tokens[i] not in tokens[:i] and tokens[i] > 3)
    if stop == "eos":
        local.base.tokenizer.eos_ids = frozenset({tokens[at]})
        sampling = SamplingParams(30)
    elif stop == "id":
        sampling = SamplingParams(30, stop_token_ids=(tokens[at],), ignore_eos=True)
    else:
        text = "".join(e.text for e in free)
        sampling = SamplingParams(30, stop=(text[4:6],), ignore_eos=True)
    (ended,) = drive(local, [local.request((PROMPT, {}, sampling))])
    assert ended[-1].finish is Finish.STOP
    if stop == "string":
        assert "".join(e.text for e in ended) == text[: text.index(text[4:6])]
    else:
        assert ids(ended) == tokens[: at + 1]
        assert "".join(e.text for e in ended) == local.base.tokenizer.decode(tokens[:at])


def test_context_end_finishes_with_length(make_engine):
    """A request ends with LENGTH when the context is full, and prompts beyond it are refused."""
    local = make_engine(max_context=32)
    (events,) = drive(local, [local.request((PROMPT, {}, SamplingParams(500, ignore_eos=True)))])
    assert events[-1].finish is Finish.LENGTH
    assert len(ids(events)) == 32 - len(PROMPT)
    with pytest.raises(InvalidArgument, match=r"prompt: 40 tokens.*shorten"):
        local.engine.submit(local.request((PROMPT * 2, {}, GREEDY)))


def test_a_full_queue_refuses_and_a_request_too_large_for_the_cache_is_invalid(make_engine):
    """The queue's bound gives RESOURCE_EXHAUSTED; what can never fit is the caller's error."""
    local = make_engine(max_queue=2, tenant_queue=1.0, kv_pages=3)
    with pytest.raises(InvalidArgument, match="key/value pages"):
        local.engine.submit(local.request((PROMPT, {}, SamplingParams(100))))
    for _ in range(2):
        local.engine.submit(local.request((PROMPT, {}, GREEDY)))
    with pytest.raises(ResourceExhausted, match="holds 2 requests") as e:
        local.engine.submit(local.request((PROMPT, {}, GREEDY)))
    assert e.value.retry_after


def test_new_content_under_a_name_shares_no_cache(make_engine, model_root, tmp_path):
    """Equal prompts with different digests find none of each other's pages."""
    local = make_engine()
    prompt = [9] * 64
    drive(local, [local.request((prompt, {"rank-8": 1.0}, GREEDY))])
    (hit,) = drive(local, [local.request((prompt, {"rank-8": 1.0}, GREEDY))])
    assert hit[-1].usage.cached_tokens == 48
    shutil.copytree(model_root / "adapters" / "rank-16", tmp_path / "new")
    local.register("rank-8", tmp_path, "new")
    (new,) = drive(local, [local.request((prompt, {"rank-8": 1.0}, GREEDY))])
    assert new[-1].usage.cached_tokens == 0
    assert ids(new) != ids(hit)
    (other,) = drive(local, [local.request((prompt, {"rank-8": 1.0}, GREEDY), tenant="other")])
    assert other[-1].usage.cached_tokens == 0
    (half,) = drive(local, [local.request((prompt, {"rank-8": 0.5}, GREEDY))])
    assert half[-1].usage.cached_tokens == 0


def test_usage_counts_tokens(make_engine):
    """Usage tells prompt, cached and generated tokens, and times in order."""
    local = make_engine()
    (events,) = drive(local, [local.request((PROMPT, {"rank-8": 1.0}, GREEDY))])
    usage = events[-1].usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (20, 0, 12)
    stats = local.engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (20, 12)
    assert 0 <= usage.queue_seconds <= usage.first_token_seconds <= usage.total_seconds


def test_a_load_that_takes_its_time_stops_nobody(make_engine, monkeypatch):
    """While an adapter's files are being read, requests for others run to their end."""
    local = make_engine()
    opened, go_on = threading.Event(), threading.Event()
    read = local.adapters.__getitem__

    class Slow(dict):
        def __getitem__(self, digest):
            opened.set()
            assert go_on.wait(60)
            return read(digest)

    slow = local.request((PROMPT, {"rank-8": 1.0}, GREEDY))
    monkeypatch.setattr(local, "adapters", Slow(local.adapters))
    local.engine.submit(slow)
    while not opened.is_set():
        local.step()
    (answer,) = drive(local, [local.request((PROMPT, {}, GREEDY))])
    assert answer[-1].finish is Finish.LENGTH
    go_on.set()
    ended = []
    while not ended:
        ended = [e for e in local.step() if isinstance(e, Event) and e.finish]
    assert ended[0].request_id == slow.id


def test_a_request_that_cannot_be_taken_in_fails_alone(make_engine):
    """Weights whose sum no 32-bit float holds end their own request; the engine serves on."""
    local = make_engine()
    local.digests["twin"] = local.digests["rank-8"]
    bad, good = drive(
        local,
        [
            local.request((PROMPT, {"rank-8": 3e38, "twin": 3e38}, GREEDY)),
            local.request((PROMPT, {}, GREEDY)),
        ],
    )
    assert bad[-1].finish is Finish.ERROR
    assert good[-1].finish is Finish.LENGTH


def test_a_fault_of_the_engine_itself_ends_every_request_and_is_told(make_engine, monkeypatch):
    """When the thread ends, nobody waits for an answer that will not come."""
    local = make_engine()
    seen, failed = [], threading.Event()
    local.engine.submit(local.request((PROMPT, {}, GREEDY)))
    monkeypatch.setattr(local.engine.scheduler, "schedule", lambda now: 1 / 0)
    local.engine.start(seen.extend, failed.set)
    assert failed.wait(10)
    assert [(e.error.code, e.error.reason) for e in seen] == [("UNAVAILABLE", "ENGINE_FAILED")]
    with pytest.raises(Unavailable):
        local.engine.submit(local.request((PROMPT, {}, GREEDY)))


def test_the_thread_delivers_one_list_a_step_and_stops(make_engine):
    """start() serves from its own thread; stop() ends what runs with CANCELLED."""
    local = make_engine()
    seen, ended = [], threading.Event()

    def deliver(events):
        seen.extend(events)
        if any(isinstance(e, Event) and e.finish for e in events):
            ended.set()

    local.engine.start(deliver)
    local.engine.submit(local.request((PROMPT, {"rank-8": 1.0}, GREEDY)))
    assert ended.wait(30)
    assert sum(len(e.tokens) for e in seen if isinstance(e, Event)) == 12
    before = len(seen)
    local.engine.submit(local.request((PROMPT, {}, SamplingParams(400, ignore_eos=True))))
    while len(seen) == before:
        time.sleep(0.001)
    local.engine.stop()
    assert seen[-1].finish is Finish.CANCELLED
    with pytest.raises(Unavailable):
        local.engine.submit(local.request((PROMPT, {}, GREEDY)))


def test_the_same_seed_gives_the_same_text_in_any_company(make_engine):
    """Sampling with a seed does not depend on what else is in the batch."""
    local = make_engine()
    sampling = SamplingParams(16, temperature=1.0, seed=7, ignore_eos=True)
    (alone,) = drive(local, [local.request((PROMPT, {}, sampling))])
    crowd = [local.request((PROMPT[i:], {"rank-2": 1.0}, GREEDY)) for i in range(8)]
    company = drive(local, [*crowd, local.request((PROMPT, {}, sampling))])
    assert ids(company[-1]) == ids(alone)
    reseeded = dataclasses.replace(sampling, seed=8)
    (other,) = drive(local, [local.request((PROMPT, {}, reseeded))])
    assert ids(other) != ids(alone)


def test_quantised_layers_are_the_ones_that_bitsandbytes_takes(model_root):
    """NF4 weights take 4.5 bits a parameter and dequantise to what bitsandbytes gives."""
    import bitsandbytes.functional as bnb

    from mora_serve.config import BaseConfig
    from mora_serve.model.loading import load_base

    base = load_base(BaseConfig(str(model_root / "base"), dtype="fp32", device="cpu"))
    assert base.linear_bytes == base.shape.linear_parameters * 4.5 / 8
    weights = load_file(model_root / "base" / "model.safetensors")
    q = weights["model.layers.1.self_attn.q_proj.weight"]
    want = bnb.dequantize_4bit(*bnb.quantize_4bit(q, blocksize=64, quant_type="nf4"))
    got = base.decoder.layers[1].sites["qkv"].dequantise(torch.float32, 0, q.shape[0])
    assert torch.equal(got, want)
