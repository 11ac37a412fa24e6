"""What Prometheus and the Kubernetes gateway read."""

from __future__ import annotations

import shutil
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mora_serve.core import (
    AdapterLoad,
    AdapterWeight,
    Candidate,
    Decision,
    EngineStats,
    Finish,
    Mixture,
    Source,
    Usage,
)
from mora_serve.errors import ResourceExhausted
from mora_serve.metrics import OTHER, AdapterLabels, Dropped, Metrics

ONE = Mixture((AdapterWeight("json", 1.0, "d1"), AdapterWeight("upper", 0.5, "d2")))
USAGE = Usage(
    prompt_tokens=10,
    cached_tokens=0,
    completion_tokens=5,
    queue_seconds=0.01,
    first_token_seconds=0.2,
    total_seconds=1.0,
)
NAMES = {"d1": "json", "d2": "upper", "d3": "json"}


class World:
    """Metrics of an engine whose snapshot the test sets."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.metrics = Metrics("1.2.3")
        self.metrics.watch(
            lambda: self.stats,
            lambda digests: sorted(NAMES[d] for d in digests if d in NAMES),
            lambda: len(NAMES),
        )

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    def families(self):
        return list(text_string_to_metric_families(self.text()))

    def text(self) -> str:
        return generate_latest(self.metrics.registry).decode()


@pytest.fixture
def world():
    return World()


@pytest.fixture
def busy(world):
    """A server that has seen one of everything."""
    metrics = world.metrics
    for name in ("json", "upper"):
        metrics.registered(name)
    metrics.rpc("/mora_serve.v1.GenerationService/Generate", "OK", 0.5)
    metrics.decided(Decision(ONE, Source.ROUTER, (Candidate("json", 0.7, 0.9),)), 0.001)
    metrics.decided(Decision(Mixture(), Source.ABSTAINED, (Candidate("json", 0.1, 0.2),)), 0.001)
    metrics.pooled(0.02)
    metrics.tokens(3, 0.03)
    metrics.finished(Finish.STOP, USAGE, ONE)
    metrics.finished(Finish.CANCELLED, None, ONE)
    metrics.loaded(AdapterLoad("d1", 0.02, 1000))
    metrics.loaded(AdapterLoad("d2", 0.02, 0, "no longer stored"))
    world.stats = EngineStats(
        running=2,
        waiting=1,
        kv_pages=100,
        kv_pages_used=25,
        slots=8,
        resident=("d1", "d2", "unregistered"),
        waiting_adapters=("d3",),
        slot_hits=4,
        slot_misses=3,
        slot_evictions=1,
        pooled_tokens=30,
        prefix_queries=50,
        prefix_hits=20,
    )
    return world


def test_every_name_says_whose_it_is_and_its_unit(busy):
    """Names begin with mora_; seconds and bytes are spelt out; nothing is in milliseconds."""
    for family in busy.families():
        assert family.name.startswith("mora_")
        assert family.documentation.endswith(".")
        assert not family.name.endswith(("_ms", "_millis", "_mb"))
        if family.type == "counter":
            assert all(s.name.endswith("_total") for s in family.samples)


def test_the_names_that_operators_have_dashboards_for_are_there(busy):
    vllm = {
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions"),
        *("prompt_tokens", "generation_tokens", "request_success"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds"),
        *("request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "lora_requests_info"),
    }
    assert {f"mora_{name}" for name in vllm} <= {f.name for f in busy.families()}


def test_no_label_is_a_tenant_or_a_request(busy):
    labels = {label for f in busy.families() for s in f.samples for label in s.labels}
    lora = {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert (
        labels
        == {"version", "method", "code", "finished_reason", "adapter", "source", "reason", "le"}
        | lora
    )


def test_nothing_is_declared_twice(busy):
    names = [line.split()[2] for line in busy.text().splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_two_servers_in_one_process_count_apart(world):
    """No registry is shared."""
    other = World()
    world.metrics.finished(Finish.STOP, USAGE, ONE)
    label = {"finished_reason": "stop"}
    assert world("mora_request_success_total", **label) == 1
    assert other("mora_request_success_total", **label) == 0


def test_engine_counts_are_read_when_asked(busy):
    assert busy("mora_num_requests_running") == 2
    assert busy("mora_kv_cache_usage_perc") == 0.25
    assert busy("mora_adapter_slot_misses_total") == 3
    busy.stats = EngineStats(slot_misses=7)
    assert busy("mora_adapter_slot_misses_total") == 7
    assert busy("mora_kv_cache_usage_perc") == 0


def test_a_finished_request_is_timed_for_each_of_its_adapters(busy):
    for name in ("json", "upper"):
        assert busy("mora_adapter_request_latency_seconds_count", adapter=name) == 1
    assert busy("mora_e2e_request_latency_seconds_sum") == 1.0
    assert busy("mora_time_to_first_token_seconds_sum") == 0.2
    assert busy("mora_request_time_per_output_token_seconds_sum") == pytest.approx(0.2)


def test_tokens_that_come_together_share_the_time(busy):
    assert busy("mora_inter_token_latency_seconds_count") == 3
    assert busy("mora_inter_token_latency_seconds_sum") == pytest.approx(0.03)


def test_decisions_are_counted_by_who_chose(busy):
    assert busy("mora_router_decisions_total", source="router") == 1
    assert busy("mora_router_decisions_total", source="explicit") == 0
    assert busy("mora_router_abstentions_total") == 1
    assert busy("mora_router_score_count") == 2


def test_feedback_is_counted_by_what_became_of_it(busy):
    busy.metrics.feedback_written(3)
    busy.metrics.feedback_dropped(Dropped.DISK, 2)
    assert busy("mora_feedback_rows_written_total") == 3
    assert busy("mora_feedback_rows_dropped_total", reason="disk") == 2
    assert busy("mora_feedback_rows_dropped_total", reason="queue") == 0


def test_the_lag_of_the_event_loop_is_a_histogram(busy):
    busy.metrics.lag(0.003)
    busy.metrics.lag(0.3)
    assert busy("mora_event_loop_lag_seconds_count") == 2
    assert busy("mora_event_loop_lag_seconds_bucket", le="0.02") == 1


def test_what_routing_asks_of_the_base_is_counted(busy):
    assert busy("mora_router_state_seconds_sum") == 0.02
    assert busy("mora_router_pooled_tokens_total") == 30


def test_loads_and_failed_loads_are_apart(busy):
    assert busy("mora_adapter_load_seconds_count", adapter="json") == 1
    assert busy("mora_adapter_load_bytes_total", adapter="json") == 1000
    assert busy("mora_adapter_load_errors_total", adapter="json") is None
    assert busy("mora_adapter_load_errors_total", adapter="upper") == 1
    assert busy("mora_adapter_load_seconds_count", adapter="upper") is None


def test_hits_and_misses_are_by_adapter(busy):
    """A hit is a request that found it in a slot; a miss is a load, however it ended."""
    for name in ("json", "upper"):
        assert busy("mora_adapter_hits_total", adapter=name) is None
        assert busy("mora_adapter_misses_total", adapter=name) == 1
    busy.stats = EngineStats(resident=("d1",))
    busy.metrics.queued(ONE)
    busy.metrics.queued(Mixture())
    busy.metrics.queued(Mixture((AdapterWeight("json", 0.0, "d1"),)))  # does not run
    assert busy("mora_adapter_hits_total", adapter="json") == 1
    assert busy("mora_adapter_hits_total", adapter="upper") is None
    busy.metrics.loaded(AdapterLoad("gone", 0.02, 10))
    assert busy("mora_adapter_misses_total", adapter=OTHER) == 1


def test_residency_is_by_name(busy):
    assert busy("mora_adapter_resident", adapter="json") == 1
    busy.stats = EngineStats(resident=("d1", "d3"))
    assert busy("mora_adapter_resident", adapter="json") == 2
    assert busy("mora_adapter_resident", adapter="upper") is None


def test_the_gateway_sees_what_is_loaded_and_what_is_wanted(busy):
    """One series, labelled as the extension reads it, its value the time of the last change."""

    def info():
        (family,) = (f for f in busy.families() if f.name == "mora_lora_requests_info")
        (sample,) = family.samples
        return sample

    before = time.time()
    first = info()
    assert first.labels == {
        "max_lora": "8",
        "running_lora_adapters": "json,upper",
        "waiting_lora_adapters": "json",
    }
    assert before <= first.value <= time.time()
    assert info() == first
    busy.stats = EngineStats(slots=8, resident=("d2",))
    assert info().value > first.value
    assert info().labels["running_lora_adapters"] == "upper"


@given(st.lists(st.text("abc", min_size=1, max_size=3), max_size=60), st.integers(1, 10))
def test_adapter_labels_are_bounded(names, cap):
    """However many adapters there are, a label keeps its meaning and the rest are one."""
    labels = AdapterLabels(cap)
    for name in names:
        labels.add(name)
    given_labels = {name: labels.of(name) for name in names}
    assert labels.of("never registered") == OTHER
    assert len(set(given_labels.values()) - {OTHER}) <= cap
    assert all(label in (name, OTHER) for name, label in given_labels.items())
    assert {n: labels.of(n) for n in names} == given_labels


def test_a_removed_adapter_leaves_its_place(busy):
    """Its series end, and another name can have the label."""
    busy.metrics.unregistered("json")
    assert 'adapter="json"' not in busy.text().replace("mora_adapter_resident{", "")
    busy.metrics.unregistered("json")
    busy.metrics.unregistered("never seen")
    busy.metrics.finished(Finish.STOP, USAGE, ONE)  # a request that began before
    assert busy("mora_adapter_request_latency_seconds_count", adapter="json") is None
    assert busy("mora_adapter_request_latency_seconds_count", adapter=OTHER) == 1


def test_errors_that_callers_get_are_counted_by_their_reason(world):
    """The gate's, a tenant's and the queue's refusals share a gRPC code, and are told apart."""
    for reason in ("QUEUE_FULL", "TENANT_RATE", "QUEUE_FULL"):
        world.metrics.refused(ResourceExhausted("full", reason=reason))
    assert world("mora_refusals_total", reason="QUEUE_FULL") == 2
    assert world("mora_refusals_total", reason="TENANT_RATE") == 1


def test_promtool_finds_nothing_wrong(busy):
    """Prometheus's own checker, where it is installed."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=busy.text(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
