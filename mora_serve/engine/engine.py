"""The engine: one thread that owns the device, and what crosses to it.

``step()`` is the whole story: take in messages, schedule, run, hand out events. Everything that
crosses between threads is a plain message: requests and aborts in, one list of events a step out.
The router's questions come in too; each is answered by a future.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import torch

from mora_serve.adapters.validate import ValidatedAdapter
from mora_serve.config import Config
from mora_serve.core import (
    AdapterLoad,
    EngineStats,
    Event,
    Finish,
    Request,
    SamplingParams,
    TokenOut,
    Usage,
)
from mora_serve.engine import failures
from mora_serve.engine.adapter_pool import AdapterPool
from mora_serve.engine.admission import Admission
from mora_serve.engine.followers import ALONE
from mora_serve.engine.integrity import Integrity
from mora_serve.engine.isolation import Isolation, Outcome
from mora_serve.engine.kv_cache import IntegrityError, KVCache
from mora_serve.engine.pool_queue import PoolJob, PoolQueue
from mora_serve.engine.runner import Runner
from mora_serve.engine.scheduler import Batch, Chunk, Scheduler
from mora_serve.engine.sequence import Sequence
from mora_serve.engine.sizes import choose_sizes
from mora_serve.engine.team import Team
from mora_serve.engine.text import TextStream
from mora_serve.engine.watchdog import Watchdog
from mora_serve.errors import Failure, InvalidArgument, MoraError, ResourceExhausted
from mora_serve.model.int8_slots import Int8Slots
from mora_serve.model.loading import Base, dtype_name
from mora_serve.model.lora import AdapterSlots
from mora_serve.model.pooling import States, pool_tokens

log = logging.getLogger(__name__)

STATS_SECONDS = 0.1
EXPIRE_SECONDS = 0.05  # between two looks for those in line whose deadline is out of reach

Deliver = Callable[[Seq[Event | AdapterLoad]], None]


class Engine:
    """Serves requests on one base with many adapters.

    ``open_adapter(digest)`` gives a registered adapter's content; the ``team`` has the other parts
    of the base where there are any, and ends with the engine. All public methods are thread-safe.
    """

    def __init__(
        self,
        base: Base,
        config: Config,
        open_adapter: Callable[[str], ValidatedAdapter],
        team: Team | None = None,
    ) -> None:
        self.base = base
        self.config = config.engine
        self.team = team
        decoder = base.decoder
        self.max_context = min(
            config.engine.max_context or base.shape.max_positions, base.shape.max_positions
        )
        free = None
        if decoder.device.type == "cuda":
            torch.cuda.empty_cache()  # what loading used in passing is free as well
            free, _ = torch.cuda.mem_get_info(decoder.device)
        sizes = choose_sizes(decoder.shape, config, self.max_context, decoder.dtype.itemsize, free)
        pages = sizes.pages
        form = Int8Slots if config.adapters.dtype == "int8" else AdapterSlots
        slots = form(
            decoder.shape,
            sizes.slots,
            config.adapters.max_rank,
            decoder.dtype,
            decoder.device,
        )
        self._wake = threading.Condition()
        self._starting = threading.Lock()  # until the engine's thread takes over
        self._inbox: deque[Request | PoolJob | tuple[str, Finish]] = deque()
        self._signalled = False
        self._stopping = False
        self.pool = AdapterPool(
            decoder,
            slots,
            open_adapter,
            self._signal,
            config.adapters.max_mixture,
            config.adapters.host_bytes,
            ALONE if team is None else team.followers,
        )
        self.cache = KVCache(pages, config.engine.page_size, config.engine.prefix_cache)
        self.scheduler = Scheduler(config.engine, self.cache, self.pool)
        self.admission = Admission(config.engine)
        self.runner = Runner(decoder, self.pool, pages, self.max_context, config.engine, team)
        states = None if team is None else partial(team.pool_states, decoder)
        self.pool_queue = PoolQueue(decoder, config.engine, states)
        self.watchdog = Watchdog(config.engine.step_seconds, self._stuck)
        # Looked up at each run: tests and measurements wrap the runner.
        self.isolation = Isolation(lambda batch: self.runner.run(batch), self.watchdog.beat)
        self.integrity = Integrity(self.cache, self.scheduler, self.pool)
        self._sequences: dict[str, Sequence] = {}
        self._events: list[Event | AdapterLoad] = []  # of the step under way
        self._steps = self._prompt_tokens = self._generation_tokens = 0
        self._stats = self._snapshot()
        self._stats_time = self._expire_time = 0.0
        self._deliver: Deliver | None = None
        self._failed: Callable[[], object] | None = None
        self._failure: Failure | None = None
        self._thread: threading.Thread | None = None

    def start(self, deliver: Deliver, failed: Callable[[], object] | None = None) -> None:
        """Start the engine's thread.

        ``deliver`` is called on it, once a step, with what happened. ``failed`` is called, once or
        twice and on any thread, when the engine's thread ends by a fault or stands still, after
        which every ``submit`` raises Unavailable. Neither may block.
        """
        self._deliver, self._failed = deliver, failed
        with self._starting:
            self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
            self._thread.start()
        self.watchdog.start(self._thread)
        if self.team is not None:
            self.team.watch(self._stuck)

    @property
    def alive(self) -> bool:
        """Whether its thread is there still, working or stuck."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def slots(self) -> int:
        """Adapters on the device at the same time."""
        return self.pool.slots.slots

    @property
    def adapter_dtype(self) -> str:
        """How slots keep adapters, by the configuration's word."""
        return dtype_name(self.pool.slots.stored)

    def check_line(self, tenant: str, prompt: int, max_tokens: int, left: float | None) -> None:
        """Raise what ``submit`` would for want of a place, or of time: see ``Admission.check``."""
        self.admission.check(tenant, prompt, min(max_tokens, self.max_context - prompt), left)

    def submit(self, request: Request) -> None:
        """Queue a request, its prompt not empty and its mixture resolved.

        Raises InvalidArgument when it can never fit, what ``Admission.admit`` raises when it has to
        be refused for now, Unavailable when the engine is stopping.
        """
        length = len(request.prompt)
        if max(request.prompt) >= self.base.shape.vocab_size:
            raise InvalidArgument(
                f"prompt: token id {max(request.prompt)} is beyond the base model's vocabulary of "
                f"{self.base.shape.vocab_size}; leave out the text or id that stands for it",
                field="prompt",
            )
        if length >= self.max_context:
            raise InvalidArgument(
                f"prompt: {length} tokens leave no room for an answer in the context of "
                f"{self.max_context}; shorten the prompt",
                field="prompt",
                reason="PROMPT_TOO_LONG",
            )
        budget = min(request.sampling.max_tokens, self.max_context - length)
        if not self.scheduler.fits(length, budget):
            raise InvalidArgument(
                f"prompt: {length} tokens and {budget} to generate need more key/value pages than "
                "the server has; shorten the prompt or lower max_tokens",
                field="prompt",
                reason="PROMPT_TOO_LONG",
            )
        with self._wake:
            if self._stopping:
                raise self._refusal()
            self.admission.admit(request, budget, time.monotonic())
            self._inbox.append(request)
            self._notify()

    def pooled_hidden(
        self,
        texts: Seq[str],
        depth: int,
        max_tokens: int,
        *,
        background: bool = False,
        tenant: str = "",
    ) -> Future[States]:
        """The pooled hidden states [texts, hidden] of the base (see model/pooling.py), in a while.

        Computed between two steps, tenants in turn, those in the ``background`` at a slower pace;
        before ``start`` at once, on the caller's thread. Texts are tokenised on the caller's
        thread. The future fails with Unavailable when the engine stops first, and with Internal.

        Raises ResourceExhausted when the queue is full, Unavailable when the engine is stopping.
        """
        tokenizer, vocab_size = self.base.tokenizer, self.base.shape.vocab_size
        tokens = [pool_tokens(tokenizer, text, max_tokens, vocab_size) for text in texts]
        job = PoolJob(tokens, depth, background, tenant)
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._pool_here(job)
                    return job.done
        with self._wake:
            if self._stopping:
                raise self._refusal()
            if not background:
                self._check_pool_queue()
            self._inbox.append(job)
            self._notify()
        return job.done

    def _pool_here(self, job: PoolJob) -> None:
        """Before the start, with its lock held: the queue is for one thread at a time."""
        if self._stopping:
            raise self._refusal()
        self.pool_queue.add(job)
        while self.pool_queue:
            self.pool_queue.run(busy=False)

    def _check_pool_queue(self) -> None:
        queued = self.pool_queue.urgent + len(self._inbox)
        if queued >= self.config.max_queue:
            raise ResourceExhausted(
                f"queue: it holds {queued} prompts to route, as many as engine.max_queue allows; "
                "retry later",
                reason="QUEUE_FULL",
                retry_after=self.admission.retry_after(""),
            )

    def abort(self, request_id: str, finish: Finish = Finish.CANCELLED) -> None:
        """End a request early; unknown and finished ids are ignored."""
        with self._wake:
            self._inbox.append((request_id, finish))
            self._notify()

    def pin(self, digest: str) -> None:
        """Keep an adapter in its slot. Raises ResourceExhausted when too many are pinned."""
        self.pool.pin(digest)

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted again."""
        self.pool.unpin(digest)

    def stats(self) -> EngineStats:
        """The newest snapshot for metrics, at most STATS_SECONDS old while the engine runs."""
        return self._stats

    def _snapshot(self) -> EngineStats:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        return EngineStats(
            running=len(running),
            waiting=len(waiting),
            kv_pages=self.cache.usable,
            kv_pages_used=self.cache.used,
            page_size=self.cache.page_size,
            slots=self.slots,
            slots_used=self.pool.used,
            resident=self.pool.resident,
            running_adapters=tuple(sorted({d for s in running for d in s.digests})),
            waiting_adapters=tuple(sorted({d for s in waiting for d in s.digests})),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            pooled_tokens=self.pool_queue.tokens,
            prefix_queries=self.cache.prefix_queries,
            prefix_hits=self.cache.prefix_hits,
            preemptions=self.scheduler.preemptions,
            slot_hits=self.pool.hits,
            slot_misses=self.pool.misses,
            slot_evictions=self.pool.evictions,
            failed_runs=self.isolation.raised,
            integrity_checks=self.integrity.checks,
            integrity_violations=self.integrity.violations,
        )

    def stop(self, timeout: float = 10.0) -> None:
        """Abort what runs and end the thread."""
        with self._wake:
            self._stopping = True
            self._notify()
        if self._thread is not None:
            self._thread.join(timeout if self._failure is None else 1.0)
        self.watchdog.stop()
        if self.team is not None:  # first: a load under way waits for it
            self.team.close()
        if not self.alive:  # a thread that hangs may read the slots still
            self.pool.close()

    def step(self) -> list[Event | AdapterLoad]:
        """One turn of the engine: messages, loads, states to pool, one batch, its events."""
        events: list[Event | AdapterLoad] = []
        self._events = events
        started = time.monotonic()
        self._receive(events)
        self._settle_loads(events)
        self._expire(events)
        spent = self.pool_queue.run(busy=self.scheduler.running_count > 0)
        batch = self.scheduler.schedule(time.monotonic(), spent)
        self._give_up(events)
        for sequence in self.scheduler.started:
            self.admission.started(sequence.request.id, sequence.cached_tokens, started)
        made = self._generation_tokens
        if batch:
            self._run(batch, events)
        now = time.monotonic()
        if batch:
            made = self._generation_tokens - made
            decodes = sum(chunk.length == 1 for chunk in batch)
            prompts = sum(chunk.length for chunk in batch) - decodes
            short = self.scheduler.short
            self.admission.stepped(decodes, prompts, made, now - started, short=short)
        if now - self._stats_time >= STATS_SECONDS or not self.scheduler.running_count:
            self._stats, self._stats_time = self._snapshot(), now
        return events

    def _loop(self) -> None:
        if self.runner.forward.torch_threads:
            torch.set_num_threads(self.runner.forward.torch_threads)
        try:
            while True:
                with self._wake:
                    # Waiting requests are looked at again soon: their adapters may be loading.
                    timeout = 0.05 if self._sequences else self.integrity.seconds_left()
                    idle = not self.scheduler.running_count and not self.pool_queue
                    if not self._signalled and idle:
                        self._wake.wait(timeout)
                    self._signalled = False
                    if self._stopping:
                        break
                with self.watchdog.step():
                    self._hand_over(self.step())
                    self._events = []  # a fault from here on has none of them to tell
                    self._look()
            self._end()
        except BaseException:
            log.critical("the engine has failed", exc_info=True)
            self._fail()

    def _look(self) -> None:
        """At the books, once in a while. Raises IntegrityError where they cannot be trusted."""
        try:
            looked = self.integrity.look(self._sequences.values())
        except IntegrityError:  # the snapshot itself would be one of broken books
            found = self.integrity.violations
            self._stats = replace(self._stats, integrity_violations=found)
            raise
        if looked:
            self._stats = self._snapshot()

    def _end(self) -> None:
        """After ``stop``: end what is left."""
        events: list[Event | AdapterLoad] = []
        self._receive(events)
        for sequence in list(self._sequences.values()):
            self._finish(sequence, Finish.CANCELLED, events)
        self.pool_queue.fail(self._refusal())
        self._hand_over(events)

    def _fail(self) -> None:
        """After a fault outside any request: end all that is here, take in nothing more."""
        with self._wake:
            self._stopping = True
            self._failure = failure = failures.ENGINE_FAILED
            waiting = [m.id for m in self._inbox if isinstance(m, Request)]
            for job in (m for m in self._inbox if isinstance(m, PoolJob)):
                self.pool_queue.add(job)
        self.pool_queue.fail(failure.error())
        usage = Usage(0, 0, 0, 0.0, 0.0, 0.0)
        try:
            # What the step had done comes first: a request that it ended is in no list any more.
            self._hand_over(
                self._events
                + [
                    Event(request_id, finish=Finish.ERROR, usage=usage, error=failure)
                    for request_id in (*self._sequences, *waiting)
                ]
            )
        finally:
            if self._failed is not None:
                self._failed()

    def _stuck(self) -> None:
        """The watchdog's and the team's: the thread may stand still, who waits outside is told."""
        self._failure = failures.ENGINE_FAILED
        self._stopping = True  # without the lock: who knows who holds it
        if self._failed is not None:
            self._failed()

    def _refusal(self) -> MoraError:
        """Why nothing more is taken in."""
        return failures.stopped() if self._failure is None else self._failure.error()

    def _hand_over(self, events: list[Event | AdapterLoad]) -> None:
        if events and self._deliver is not None:
            self._deliver(events)

    def _signal(self) -> None:
        with self._wake:
            self._notify()

    def _notify(self) -> None:
        self._signalled = True
        self._wake.notify()

    def _receive(self, events: list[Event | AdapterLoad]) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Request):
                self._accept(message, events)
            elif isinstance(message, PoolJob):
                self.pool_queue.add(message)
            elif (found := self._sequences.get(message[0])) is not None:
                self._finish(found, message[1], events)

    def _accept(self, request: Request, events: list[Event | AdapterLoad]) -> None:
        try:
            text = TextStream(self.base.tokenizer.decode, request.sampling.stop)
            sequence = Sequence(request, text)
        except Exception:  # what one request asks for must not end the thread that serves all
            log.exception("request %s cannot be taken in", request.id)
            usage = Usage(len(request.prompt), 0, 0, 0.0, 0.0, 0.0)
            error = failures.step_failed(request.id)
            events.append(Event(request.id, finish=Finish.ERROR, usage=usage, error=error))
            self.admission.ended(request.id, 0, time.monotonic(), by_itself=False)
            return
        self._sequences[request.id] = sequence
        self.scheduler.add(sequence)

    def _settle_loads(self, events: list[Event | AdapterLoad]) -> None:
        for load in self.pool.poll():
            events.append(load)
            if load.error is not None:
                for sequence in list(self._sequences.values()):
                    if load.digest in sequence.digests:
                        self._finish(sequence, Finish.ERROR, events, error=load.error)

    def _expire(self, events: list[Event | AdapterLoad]) -> None:
        now = time.monotonic()
        expired = [
            s
            for s in self._sequences.values()
            if s.request.deadline is not None and s.request.deadline <= now
        ]
        for sequence in expired:
            self._finish(sequence, Finish.DEADLINE, events)

    def _give_up(self, events: list[Event | AdapterLoad]) -> None:
        """End those that found no place just now and whose deadline is out of reach."""
        now = time.monotonic()
        if now - self._expire_time < EXPIRE_SECONDS or not self.admission.waiting:
            return
        self._expire_time = now
        waiting = [s.request for s in self._sequences.values() if s.admitted is None]
        for request, why in self.admission.hopeless(waiting, now):
            self._finish(self._sequences[request.id], Finish.ERROR, events, error=why)

    def _run(self, batch: Batch, events: list[Event | AdapterLoad]) -> None:
        self.runner.clear(self.cache.take_new())
        started = time.monotonic()
        outcome = self.isolation.run(batch)
        if outcome.raised:
            self._end_failed(outcome, events)
        else:
            self.scheduler.measured(batch, time.monotonic() - started)
        outputs = outcome.outputs
        self._steps += 1
        self._prompt_tokens += sum(
            max(0, min(c.start + c.length, c.sequence.prompt_length) - c.start) for c in batch
        )
        for sequence, token in outputs:
            if token is None:  # before its pages can enter the prefix cache
                error = failures.not_finite(sequence)
                self._finish(sequence, Finish.ERROR, events, error=error, dirty=True)
        self.scheduler.advance(batch)
        for sequence, token in outputs:
            if token is not None:
                self._append(sequence, token, events)

    def _end_failed(self, outcome: Outcome, events: list[Event | AdapterLoad]) -> None:
        """End those that a step raised for. Raises when the base alone cannot be run either."""
        for sequence, error in outcome.failed.items():
            self._finish(sequence, Finish.ERROR, events, error=error, dirty=True)
        if outcome.broken:
            self.warm_up()

    def _append(
        self, sequence: Sequence, token: TokenOut, events: list[Event | AdapterLoad]
    ) -> None:
        params = sequence.request.sampling
        if sequence.first_token is None:
            sequence.first_token = time.monotonic()
        self._generation_tokens += 1
        sequence.append(token.id)
        ended = token.id in params.stop_token_ids or (
            token.id in self.base.tokenizer.eos_ids and not params.ignore_eos
        )
        try:
            text = "" if ended else sequence.text.push(token.id)
        except Exception:
            log.exception("request %s: a token cannot be decoded", sequence.request.id)
            error = failures.text_failed(sequence.request.id)
            self._finish(sequence, Finish.ERROR, events, error=error)
            return
        if ended or sequence.text.stopped:
            self._finish(sequence, Finish.STOP, events, (token,), text)
        elif sequence.remaining <= 0 or len(sequence.tokens) >= self.max_context:
            self._finish(sequence, Finish.LENGTH, events, (token,), text)
        else:
            events.append(Event(sequence.request.id, (token,), text))

    def _finish(
        self,
        sequence: Sequence,
        finish: Finish,
        events: list[Event | AdapterLoad],
        tokens: tuple[TokenOut, ...] = (),
        text: str = "",
        error: Failure | None = None,
        dirty: bool = False,
    ) -> None:
        """Free everything a request holds, at once, and report its end."""
        del self._sequences[sequence.request.id]
        self.scheduler.remove(sequence, dirty)
        self.integrity.change()
        by_itself = finish in (Finish.STOP, Finish.LENGTH)
        now = time.monotonic()
        self.admission.ended(sequence.request.id, len(sequence.output), now, by_itself=by_itself)
        if error is None:
            try:
                text += sequence.text.flush()
            except Exception:
                log.exception("request %s: its end cannot be decoded", sequence.request.id)
                finish, error = Finish.ERROR, failures.text_failed(sequence.request.id)
        arrival = sequence.request.arrival
        usage = Usage(
            prompt_tokens=sequence.prompt_length,
            cached_tokens=sequence.cached_tokens,
            completion_tokens=len(sequence.output),
            queue_seconds=(sequence.admitted or now) - arrival,
            first_token_seconds=(sequence.first_token or now) - arrival,
            total_seconds=now - arrival,
            preemptions=sequence.preemptions,
        )
        events.append(Event(sequence.request.id, tokens, text, finish, usage, error))

    def warm_up(self) -> None:
        """Prepare, and run one token of the base: the first request does not pay for set-up.

        Raises what the forward raises: it is how a device that has broken is told from a request.
        """
        self.runner.prepare()
        request = Request("warm-up", (0,), SamplingParams(max_tokens=1))
        sequence = Sequence(request, TextStream(self.base.tokenizer.decode))
        if not self.cache.extend(sequence.pages, 1):
            return  # others hold all pages: they will find out
        try:
            self.runner.clear(self.cache.take_new())
            self.runner.run((Chunk(sequence, 0, 1, True),))
        finally:
            self.cache.release(sequence.pages, dirty=True)
