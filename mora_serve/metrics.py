"""Every metric, declared once: ``mora_`` names, base units, no label by tenant or request.

A server has one ``Metrics`` with a registry of its own. What happens to requests is observed as
it happens; what the engine counts itself is read from its snapshot when Prometheus asks.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mora_serve.core import AdapterLoad, Decision, EngineStats, Finish, Mixture, Source, Usage
from mora_serve.errors import MoraError

MAX_ADAPTER_LABELS = 100
OTHER = "other"

_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
_FIRST_TOKEN_SECONDS = (
    *(0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
_REQUEST_SECONDS = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0),
)
_WORK_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_LAG_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02),
    *(0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5),
)
_SCORES = tuple(round(-0.2 + 0.1 * i, 1) for i in range(12))

# EngineStats field -> (name, help): gauges as they are now, counters since the start.
_GAUGES: Mapping[str, tuple[str, str]] = {
    "running": ("mora_num_requests_running", "Requests that the engine is computing."),
    "waiting": ("mora_num_requests_waiting", "Requests in the engine's queue."),
    "kv_pages": ("mora_kv_cache_pages", "Pages of the key/value cache."),
    "kv_pages_used": ("mora_kv_cache_pages_used", "Pages of the key/value cache in use."),
    "page_size": ("mora_kv_cache_page_tokens", "Tokens that a page of that cache holds."),
    "slots": ("mora_adapter_slots", "Device slots for adapters."),
    "slots_used": ("mora_adapter_slots_used", "Device slots whose adapters running requests use."),
}
COUNTERS: Mapping[str, tuple[str, str]] = {
    "steps": ("mora_engine_steps", "Steps of the engine."),
    "prompt_tokens": ("mora_prompt_tokens", "Prompt tokens processed, cached ones included."),
    "generation_tokens": ("mora_generation_tokens", "Tokens sampled."),
    "pooled_tokens": ("mora_router_pooled_tokens", "Tokens that the base read for the router."),
    "prefix_queries": ("mora_prefix_cache_queries", "Prompt tokens sought in the prefix cache."),
    "prefix_hits": ("mora_prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "preemptions": ("mora_num_preemptions", "Requests preempted for want of cache pages."),
    "slot_hits": ("mora_adapter_slot_hits", "Adapters found in a device slot at admission."),
    "slot_misses": ("mora_adapter_slot_misses", "Adapters that had to be loaded at admission."),
    "slot_evictions": ("mora_adapter_slot_evictions", "Adapters evicted from a device slot."),
    "failed_runs": (
        "mora_engine_failed_runs",
        "Runs of batches, or of parts, that raised.",
    ),
    "integrity_checks": ("mora_engine_integrity_checks", "Looks at the engine's books."),
    "integrity_violations": (
        "mora_engine_integrity_violations",
        "Looks at the engine's books that found a contradiction.",
    ),
}

M = TypeVar("M", Counter, Gauge, Histogram)


class Dropped(enum.Enum):
    """Why a row of feedback was not kept."""

    QUEUE = "queue"  # too much waits for the disk
    DISK = "disk"  # the disk is full, or refuses
    SIZE = "size"  # the prompt is too long
    ERROR = "error"  # a fault of the server, which its log tells


class AdapterLabels:
    """Adapter names as label values: up to ``cap`` registered ones, ``other`` for the rest.

    Thread-safe.
    """

    def __init__(self, cap: int = MAX_ADAPTER_LABELS) -> None:
        self._cap = cap
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def of(self, name: str) -> str:
        """The label value of an adapter."""
        with self._lock:
            return name if name in self._names else OTHER

    def add(self, name: str) -> None:
        """Give a registered adapter a value of its own, if there is room."""
        with self._lock:
            if len(self._names) < self._cap:
                self._names.add(name)

    def drop(self, name: str) -> bool:
        """Free a removed adapter's place; whether it had one."""
        with self._lock:
            had = name in self._names
            self._names.discard(name)
            return had


class Metrics:
    """All metrics of one server; ``registry`` is what the HTTP endpoint exposes."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        self.labels = AdapterLabels()
        self._stats: Callable[[], EngineStats] = EngineStats
        self._names: Callable[[Iterable[str]], Sequence[str]] = lambda digests: ()
        build = self._make(Gauge, "mora_build_info", "Version of the server.", ("version",))
        build.labels(version).set(1)

        self._rpcs = self._make(
            Counter, "mora_grpc_requests", "Calls ended, by method and status.", ("method", "code")
        )
        self._rpc_seconds = self._histogram(
            "mora_grpc_request_seconds", "Duration of a call.", _REQUEST_SECONDS, ("method",)
        )
        self._refusals = self._make(
            Counter,
            "mora_refusals",
            "Calls answered with an error of the server's own, by its reason.",
            ("reason",),
        )
        finished = self._make(
            Counter,
            "mora_request_success",
            "Generations ended, by why they ended.",
            ("finished_reason",),
        )
        self._finished = {f: finished.labels(f.value) for f in Finish}
        self._first_token = self._histogram(
            "mora_time_to_first_token_seconds",
            "From acceptance to the first token.",
            _FIRST_TOKEN_SECONDS,
        )
        self._inter_token = self._histogram(
            "mora_inter_token_latency_seconds",
            "Between two tokens of a generation.",
            _TOKEN_SECONDS,
        )
        self._per_token = self._histogram(
            "mora_request_time_per_output_token_seconds",
            "A generation's mean time per token after the first.",
            _TOKEN_SECONDS,
        )
        self._total = self._histogram(
            "mora_e2e_request_latency_seconds",
            "From acceptance to the last token.",
            _REQUEST_SECONDS,
        )
        self._queue = self._histogram(
            "mora_request_queue_time_seconds",
            "From acceptance to the first computation.",
            _REQUEST_SECONDS,
        )
        self._adapter_requests = self._histogram(
            "mora_adapter_request_latency_seconds",
            "From acceptance to the last token, for each adapter of the mixture.",
            _REQUEST_SECONDS,
            ("adapter",),
        )
        self._adapter_hits = self._make(
            Counter,
            "mora_adapter_hits",
            "Requests that found the adapter in a device slot when they were queued.",
            ("adapter",),
        )
        self._adapter_misses = self._make(
            Counter,
            "mora_adapter_misses",
            "Loads of the adapter, which was wanted and in no device slot; failed ones included.",
            ("adapter",),
        )
        self._load_seconds = self._histogram(
            "mora_adapter_load_seconds",
            "Bringing an adapter into a device slot.",
            _WORK_SECONDS,
            ("adapter",),
        )
        self._load_bytes = self._make(
            Counter,
            "mora_adapter_load_bytes",
            "Bytes of adapters brought into device slots.",
            ("adapter",),
        )
        self._load_errors = self._make(
            Counter, "mora_adapter_load_errors", "Loads of an adapter that failed.", ("adapter",)
        )
        self._of_adapters: tuple[Counter | Histogram, ...] = (
            *(self._adapter_requests, self._adapter_hits, self._adapter_misses),
            *(self._load_seconds, self._load_bytes, self._load_errors),
        )
        decisions = self._make(
            Counter, "mora_router_decisions", "Mixtures decided, by who chose them.", ("source",)
        )
        self._decisions = {s: decisions.labels(s.value) for s in Source}
        self._abstentions = self._make(
            Counter, "mora_router_abstentions", "Decisions in which the router declined."
        )
        self._scores = self._histogram(
            "mora_router_score", "Best candidate's score in a decision of the router.", _SCORES
        )
        self._decision_seconds = self._histogram(
            "mora_router_decision_seconds", "Deciding a mixture.", _WORK_SECONDS
        )
        self._feedback = self._make(
            Counter, "mora_feedback_rows_written", "Labelled prompts written to feedback."
        )
        dropped = self._make(
            Counter,
            "mora_feedback_rows_dropped",
            "Labelled prompts that feedback could not keep, by why.",
            ("reason",),
        )
        self._feedback_dropped = {d: dropped.labels(d.value) for d in Dropped}
        self._lag = self._histogram(
            "mora_event_loop_lag_seconds",
            "How much too late a timer of the event loop that serves gRPC ran.",
            _LAG_SECONDS,
        )
        self._state_seconds = self._histogram(
            "mora_router_state_seconds",
            "Waiting for the base's hidden state of a prompt to route.",
            _WORK_SECONDS,
        )

    def watch(
        self,
        stats: Callable[[], EngineStats],
        names: Callable[[Iterable[str]], Sequence[str]],
        registered: Callable[[], int],
    ) -> None:
        """Expose an engine's snapshots.

        ``names`` gives the names of the adapters with some content digests, ``registered`` the
        number of adapters.
        """
        self._stats, self._names = stats, names
        self.registry.register(_EngineCollector(stats, names, registered, self.labels))

    def rpc(self, method: str, code: str, seconds: float) -> None:
        """A call ended; ``method`` is one the server implements."""
        self._rpcs.labels(method, code).inc()
        self._rpc_seconds.labels(method).observe(seconds)

    def refused(self, error: MoraError) -> None:
        """A caller got an error; reasons are constants of the code, never what a caller sent."""
        self._refusals.labels(error.reason).inc()

    def decided(self, decision: Decision, seconds: float) -> None:
        """A mixture was chosen."""
        self._decisions[decision.source].inc()
        self._decision_seconds.observe(seconds)
        if decision.source is Source.ABSTAINED:
            self._abstentions.inc()
        if decision.candidates and decision.source in (Source.ROUTER, Source.ABSTAINED):
            self._scores.observe(max(c.score for c in decision.candidates))

    def feedback_written(self, count: int) -> None:
        """Labelled prompts are on the disk."""
        self._feedback.inc(count)

    def feedback_dropped(self, why: Dropped, count: int) -> None:
        """Labelled prompts were not kept."""
        self._feedback_dropped[why].inc(count)

    def lag(self, seconds: float) -> None:
        """A timer of the event loop ran so much too late."""
        self._lag.observe(seconds)

    def pooled(self, seconds: float) -> None:
        """The base's hidden state of a prompt to route came after ``seconds``."""
        self._state_seconds.observe(seconds)

    def queued(self, mixture: Mixture) -> None:
        """A request with a resolved mixture is in the engine's queue."""
        resident = set(self._stats().resident) & {digest for digest, _ in mixture.merged()}
        for adapter in mixture.adapters:
            if adapter.digest in resident:
                self._adapter_hits.labels(self.labels.of(adapter.adapter)).inc()

    def tokens(self, count: int, seconds: float) -> None:
        """``count`` tokens of a generation came ``seconds`` after those before."""
        for _ in range(count):
            self._inter_token.observe(seconds / count)

    def finished(self, finish: Finish, usage: Usage | None, mixture: Mixture) -> None:
        """A generation ended; ``usage`` is None when the engine has none to give."""
        self._finished[finish].inc()
        if usage is None or finish not in (Finish.STOP, Finish.LENGTH):
            return
        self._queue.observe(usage.queue_seconds)
        self._total.observe(usage.total_seconds)
        if usage.completion_tokens:
            self._first_token.observe(usage.first_token_seconds)
        if usage.completion_tokens > 1:
            decoding = usage.total_seconds - usage.first_token_seconds
            self._per_token.observe(decoding / (usage.completion_tokens - 1))
        for adapter in mixture.adapters:
            label = self.labels.of(adapter.adapter)
            self._adapter_requests.labels(label).observe(usage.total_seconds)

    def loaded(self, load: AdapterLoad) -> None:
        """An adapter was brought into a slot, or could not be.

        A content of several names counts once, under the first of them.
        """
        names = self._names((load.digest,))
        label = self.labels.of(names[0]) if names else OTHER
        self._adapter_misses.labels(label).inc()
        if load.error is not None:
            self._load_errors.labels(label).inc()
            return
        self._load_seconds.labels(label).observe(load.seconds)
        self._load_bytes.labels(label).inc(load.nbytes)

    def registered(self, name: str) -> None:
        """Some tenant has an adapter of this name: it gets series of its own, if there is room."""
        self.labels.add(name)

    def unregistered(self, name: str) -> None:
        """No tenant has an adapter of this name any longer: its series end."""
        if self.labels.drop(name):
            for metric in self._of_adapters:
                with contextlib.suppress(KeyError):  # nothing was counted
                    metric.remove(name)

    def _make(self, kind: type[M], name: str, text: str, labels: Sequence[str] = ()) -> M:
        return kind(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)


class _EngineCollector(Collector):
    """The engine's snapshot as metrics, and the gauges that the Kubernetes gateway reads."""

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        names: Callable[[Iterable[str]], Sequence[str]],
        registered: Callable[[], int],
        labels: AdapterLabels,
    ) -> None:
        self._stats = stats
        self._names = names
        self._registered = registered
        self._labels = labels
        self._last: tuple[str, str, float] = ("", "", time.time())

    def describe(self) -> Iterator[Metric]:
        """Nothing is collected at registration: the engine may not have started."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """One snapshot."""
        stats = self._stats()
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(stats, field))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(stats, field))
        yield GaugeMetricFamily(
            "mora_kv_cache_usage_perc",
            "Share of the key/value cache in use, from 0 to 1.",
            value=stats.kv_pages_used / stats.kv_pages if stats.kv_pages else 0.0,
        )
        yield GaugeMetricFamily(
            "mora_adapters_registered", "Adapters registered.", value=self._registered()
        )
        resident = self._names(stats.resident)
        yield self._residency(resident)
        yield self._requests_info(stats.slots, resident, self._names(stats.waiting_adapters))

    def _residency(self, resident: Iterable[str]) -> Metric:
        family = GaugeMetricFamily(
            "mora_adapter_resident", "Adapters of a name in device slots.", labels=("adapter",)
        )
        counts: dict[str, int] = {}
        for name in resident:
            label = self._labels.of(name)
            counts[label] = counts.get(label, 0) + 1
        for label, count in sorted(counts.items()):
            family.add_metric((label,), count)
        return family

    def _requests_info(self, slots: int, on: Sequence[str], wanted: Sequence[str]) -> Metric:
        """One series whose value is the unix time of its last change, as the gateway expects."""
        running, waiting = (",".join(dict.fromkeys(names)) for names in (on, wanted))
        if (running, waiting) != self._last[:2]:
            self._last = (running, waiting, time.time())
        family = GaugeMetricFamily(
            "mora_lora_requests_info",
            "Adapters on the device and adapters waited for; the time of the last change.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        family.add_metric((str(slots), running, waiting), self._last[2])
        return family
