"""The configuration: one frozen, typed tree; file < environment < flags.

A TOML file has one table a section (``[base]``, ``[engine]``, ...). An environment variable is
``MORA_<SECTION>_<KEY>``; a flag is ``--<section>.<key>``. An unknown key is an error, except in
environment variables of another section (see ``load_config``).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mora_serve.errors import ConfigError

DEFAULT_SPILL = 1.25  # cluster.spill
LEAST_POLL_SECONDS = 0.1
DEFAULT_SLOTS = 32  # where adapters.slots is 0 and no card says otherwise
LEAST_FEEDBACK_BYTES = 1 << 20  # several files, each of several of the longest rows


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class BaseConfig:
    """The one resident model."""

    model: str = _doc("demo", "Hugging Face directory or hub id; 'demo' is the bundled one")
    revision: str = _doc("main", "revision of a hub id")
    quantization: Literal["auto", "nf4", "none"] = _doc(
        "auto",
        "auto is as the checkpoint is stored, and 4-bit NF4 for one of 16 or 32 bits; none keeps "
        "those as they are",
    )
    dtype: Literal["auto", "bf16", "fp32"] = _doc(
        "auto", "compute type; auto is bf16 where the processor has it"
    )
    device: str = _doc("auto", "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class EngineConfig:
    """Batching, memory for keys and values, and limits a request."""

    max_batch: int = _doc(64, "requests that run at the same time")
    step_tokens: int = _doc(512, "tokens computed a step, prefill chunks included")
    step_pace: float = _doc(
        1.75,
        "while streams run, prompt chunks are sized so that a step takes at most about this many "
        "times as long as one without prompt tokens; 0 for no such limit",
    )
    page_size: int = _doc(16, "tokens a page of the key/value cache")
    kv_pages: int = _doc(0, "pages of the key/value cache; 0 sizes it from kv_bytes")
    kv_bytes: int = _doc(
        0,
        "memory for the key/value cache, in bytes; 0 is 1 GiB on a CPU and, on a card, what "
        "memory_fraction leaves",
    )
    memory_fraction: float = _doc(
        0.9,
        "share of a card's memory, free after the base is loaded, that adapter slots, the "
        "key/value cache and what a step works in may take",
    )
    prefix_cache: bool = _doc(True, "share the pages of equal prefixes of equal mixtures")
    max_context: int = _doc(0, "prompt and answer in tokens; 0 takes the model's own limit")
    max_queue: int = _doc(1024, "requests waiting before new ones are refused")
    tenant_queue: float = _doc(
        0.5,
        "share of the places in line left by other tenants that one tenant may fill; 1 for all",
    )
    max_tokens: int = _doc(4096, "largest max_tokens a request may ask for")
    max_stop: int = _doc(16, "largest number of stop strings a request may give")
    max_logprobs: int = _doc(20, "largest number of logprobs a token")
    stall_seconds: float = _doc(60.0, "a stream whose client reads nothing this long is aborted")
    step_seconds: float = _doc(
        120.0,
        "a step that takes longer has hung: the server ends with status 3; 0 waits for ever",
    )
    threads: int = _doc(
        0,
        "CPU threads for the engine; 0 takes all cores that it may use, or, where torch computes, "
        "as many as torch does",
    )
    tensor_parallel: int = _doc(
        1,
        "devices of this machine that share the base, for one that a single card cannot hold: a "
        "process each, on cards side by side from base.device on, or on the CPU",
    )
    kernels: Literal["auto", "native", "triton", "torch"] = _doc(
        "auto",
        "what computes a step: native on a CPU, triton on a card, or torch on either; auto is the "
        "first where it can run",
    )


@dataclass(frozen=True)
class AdaptersConfig:
    """What may be registered, and how much of it is resident."""

    root: str = _doc("", "directory under which RegisterAdapter may read; empty refuses paths")
    slots: int = _doc(
        0,
        "adapters on the device at the same time; 0 is 32 on a CPU and, on a card, as many as "
        "requests run, if a quarter of engine.memory_fraction holds them",
    )
    dtype: Literal["auto", "int8"] = _doc(
        "auto",
        "how slots keep adapters: auto in the base's compute type, int8 in half of bf16's memory, "
        "rounded, for engine.kernels triton or torch on one device",
    )
    host_bytes: int = _doc(
        256 << 20, "adapters kept in memory besides, ready to be copied into a slot, in bytes"
    )
    max_rank: int = _doc(64, "largest LoRA rank that can be registered")
    max_mixture: int = _doc(4, "adapters in one mixture")
    max_adapters: int = _doc(10_000, "adapters registered in all")
    max_bytes: int = _doc(1 << 30, "size of one adapter's weights")
    max_tensors: int = _doc(8192, "tensors in one adapter")
    max_prompts: int = _doc(64, "example prompts in one routing card")
    require_sha256: bool = _doc(
        False, "take only adapters whose senders state the SHA-256 of their files"
    )


@dataclass(frozen=True)
class RouterConfig:
    """The learned router."""

    path: str = _doc("", "router file to load at start; empty takes the registered one")
    max_adapters: int = _doc(2, "adapters the router may mix when the request does not say")
    feedback: bool = _doc(
        False,
        "store the prompts of requests that name their tasks, as training data for the router: "
        "their text is kept in server.state, and each tenant can export its own",
    )
    feedback_bytes: int = _doc(64 << 20, "size of that store in bytes; the oldest prompts go first")


@dataclass(frozen=True)
class ServerConfig:
    """Addresses and limits of the server."""

    host: str = _doc("127.0.0.1", "address to listen on")
    port: int = _doc(50051, "gRPC port; 0 takes a free one")
    tls_cert: str = _doc("", "PEM file of the server's certificate chain; read again on change")
    tls_key: str = _doc("", "PEM file of that certificate's private key")
    tls_client_ca: str = _doc("", "PEM file of the CA that clients' certificates must be of")
    allow_plaintext: bool = _doc(
        False, "listen without TLS on an address that other machines can reach"
    )
    http_host: str = _doc("127.0.0.1", "address of the HTTP port")
    http_port: int = _doc(
        -1,
        "port of the OpenAI-compatible HTTP API, with the TLS and the keys of the gRPC port; 0 "
        "takes a free one, -1 switches it off",
    )
    http_names: str = _doc(
        "",
        "names besides localhost that the HTTP port may be asked for by, with commas; empty: any, "
        "but without keys and access.allow_anonymous none",
    )
    metrics_host: str = _doc(
        "127.0.0.1", "address of the Prometheus port, which has neither TLS nor keys"
    )
    metrics_port: int = _doc(9464, "Prometheus port; 0 takes a free one, -1 switches it off")
    max_message_bytes: int = _doc(
        16 << 20,
        "largest gRPC message or HTTP body to the server; a larger router is loaded by its path",
    )
    admin_host: str = _doc("127.0.0.1", "address for administrators")
    admin_port: int = _doc(
        -1,
        "gRPC port for LoadRouter and PinAdapter, which are then refused on server.port; 0 takes a "
        "free one, -1 serves them on server.port",
    )
    drain_seconds: float = _doc(
        30.0,
        "time to stop in: running requests have most of it to finish, then they are ended; what "
        "hangs besides may hold the process for 2 seconds, however small this is",
    )
    drain_wait_seconds: float = _doc(
        0.5,
        "of that, time in which calls are still taken although the health says NOT_SERVING; at "
        "most a tenth",
    )
    log_format: Literal["text", "json"] = _doc("text", "lines of the log: text, or JSON objects")
    log_calls: bool = _doc(True, "log a line for each call that ends")
    traces: bool = _doc(
        False,
        "send OpenTelemetry traces, without prompts and answers, to where the environment's "
        "OTEL_EXPORTER_OTLP_ENDPOINT and its like say; setting that one switches them on as well",
    )
    state: str = _doc(
        "", "directory of the adapter registry and of feedback; empty keeps both for this run only"
    )
    store: str = _doc(
        "",
        "URL of an adapter registry that servers share, such as s3://bucket/prefix (s3, gs, abfs, "
        "or file for a directory that all mount); empty keeps it in server.state, which holds a "
        "cache of it otherwise",
    )
    store_cache_bytes: int = _doc(
        16 << 30, "size of that cache in bytes; adapters used longest ago go first"
    )
    store_poll_seconds: float = _doc(
        1.0, "time between looks for what other servers have changed in the registry"
    )


@dataclass(frozen=True)
class AccessConfig:
    """Who may call."""

    file: str = _doc(
        "",
        "TOML file of API keys, their roles and tenants, and limits a tenant (see SECURITY.md); "
        "empty lets in whoever reaches the server",
    )
    audit: str = _doc(
        "", "file for the audit log, JSON lines; empty writes its lines to the server's log"
    )
    allow_anonymous: bool = _doc(
        False, "listen beyond this machine without an access file: whoever reaches it may do all"
    )


@dataclass(frozen=True)
class ClusterConfig:
    """Replicas on Ray Serve (``mora_serve.cluster``); a single server does without."""

    replicas: int = _doc(1, "replicas of the engine at least")
    max_replicas: int = _doc(0, "replicas at most, by the length of their line; 0 for no more")
    gateways: int = _doc(1, "processes that speak the API, each on a node of its own")
    cpus: float = _doc(1.0, "cores that Ray reserves for a replica")
    gpus: float = _doc(0.0, "cards that Ray reserves for a replica")
    gateway_cpus: float = _doc(1.0, "cores that Ray reserves for a gateway")
    target_requests: float = _doc(
        0.0, "requests a replica that it is to have at work; more start another; 0 for a full batch"
    )
    affinity: bool = _doc(
        True, "send a mixture to where its adapters are resident; false leaves it to Ray's router"
    )
    spill: float = _doc(
        DEFAULT_SPILL,
        "a replica with this many times the mean of requests gives way to the next one",
    )
    messages: float = _doc(
        100.0,
        "messages a second that a replica sends: the more streams it has, the more tokens of one "
        "come together; first tokens go at once",
    )
    flush_seconds: float = _doc(
        0.25, "time in which a stream's tokens are gathered at most, however many streams there are"
    )
    warm_seconds: float = _doc(
        20.0, "time that a new replica may take to load the adapters that others use most"
    )


@dataclass(frozen=True)
class Config:
    """The whole tree."""

    base: BaseConfig = field(default_factory=BaseConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def load_config(
    path: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Build the tree from a TOML file, the environment and flags (``{"engine.slots": 8}``).

    Kubernetes injects variables for every Service of a namespace: for one named mora-serve,
    MORA_SERVE_SERVICE_HOST and MORA_SERVE_PORT=tcp://..., for one named mora-server,
    MORA_SERVER_PORT=tcp://... So variables whose section is none of the tree's are ignored, and
    within a section those of the injected forms are.

    Raises ConfigError for an unknown key (the nearest known one is named), a value of the wrong
    type, or one out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values.update(_read_file(Path(path)))
    known = set(keys())
    tables = {section.name for section in dataclasses.fields(Config)}
    for name, text in (os.environ if environ is None else environ).items():
        if name.startswith("MORA_"):
            table, _, key = name.removeprefix("MORA_").lower().partition("_")
            if table not in tables or _injected(key, text):
                continue
            values[_known(f"{table}.{key}", known, f"environment variable {name}")] = text
    for key, value in (flags or {}).items():
        values[_known(key, known, f"flag --{key}")] = value
    sections: dict[str, Any] = {}
    for section in dataclasses.fields(Config):
        cls = typing.cast("type", section.default_factory)
        hints = typing.get_type_hints(cls)
        given = {
            f.name: _convert(f"{section.name}.{f.name}", values[k], hints[f.name])
            for f in dataclasses.fields(cls)
            if (k := f"{section.name}.{f.name}") in values
        }
        sections[section.name] = cls(**given)
    config = Config(**sections)
    _check(config)
    return config


def keys() -> dict[str, tuple[Any, Any, str]]:
    """Every key as ``section.key`` -> (type, default, help)."""
    out = {}
    for section in dataclasses.fields(Config):
        cls = typing.cast("type", section.default_factory)
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            out[f"{section.name}.{f.name}"] = (hints[f.name], f.default, f.metadata["help"])
    return out


def _read_file(path: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"configuration file: cannot be read ({e.strerror})") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"configuration file: not valid TOML: {e}") from e
    known = set(keys())
    values = {}
    for section, table in tree.items():
        if not isinstance(table, dict):
            raise ConfigError(f"configuration file: {section!r} stands outside any [section]")
        for key, value in table.items():
            values[_known(f"{section}.{key}", known, "configuration file")] = value
    return values


def _injected(key: str, text: str) -> bool:
    """Whether Kubernetes sets such a variable for a Service of the section's name."""
    if key == "port":
        return text.startswith(("tcp://", "udp://", "sctp://"))
    return re.fullmatch(r"service_(host|port(_.*)?)|port_\d+_(tcp|udp|sctp)(_.*)?", key) is not None


def _known(key: str, known: set[str], where: str) -> str:
    if key in known:
        return key
    near = difflib.get_close_matches(key, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{where}: unknown key {key!r}{hint}", field=key)


def _convert(key: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if value in options:
            return value
        raise ConfigError(f"{key}: {value!r} is not one of {', '.join(options)}", field=key)
    try:
        if hint is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if isinstance(value, bool) or (hint is int and isinstance(value, float)):
            raise ValueError
        return hint(value)
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{key}: {value!r} is not a valid {hint.__name__}", field=key) from None


# By key, or by its last word; other numbers end where the API's and gRPC's 32 bits do.
_MAY_BE_OFF = ("server.metrics_port", "server.admin_port", "server.http_port")
_MOST = {"server.max_message_bytes": 2**31 - 1, "bytes": 2**63 - 1, "port": 65535}


def _check(config: Config) -> None:
    positive = (
        *(f"engine.{k}" for k in ("max_batch", "step_tokens", "page_size", "max_queue")),
        "engine.tensor_parallel",
        *(f"adapters.{k}" for k in ("max_rank", "max_mixture", "max_adapters")),
        *("engine.max_tokens", "router.max_adapters", "server.max_message_bytes"),
        *("cluster.replicas", "cluster.gateways"),
    )
    for key in positive:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value < 1:
            raise ConfigError(f"{key}: {value} is out of range; it must be at least 1", field=key)
    for key in keys():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        least = -1 if key in _MAY_BE_OFF else 0
        if not isinstance(value, (int, float)):
            continue
        most = _MOST.get(key, _MOST.get(name.rpartition("_")[2], 2**31 - 1))
        if not least <= value <= most:
            raise ConfigError(
                f"{key}: {value} is out of range; it must be from {least} to {most}", field=key
            )
    if not config.engine.stall_seconds:
        raise ConfigError(
            "engine.stall_seconds: 0 would abort every stream; it must be above 0",
            field="engine.stall_seconds",
        )
    if config.router.feedback_bytes < LEAST_FEEDBACK_BYTES:
        raise ConfigError(
            f"router.feedback_bytes: {config.router.feedback_bytes} is out of range; it must be at "
            f"least {LEAST_FEEDBACK_BYTES}",
            field="router.feedback_bytes",
        )
    if config.engine.step_tokens < config.engine.max_batch:
        raise ConfigError(
            f"engine.step_tokens: {config.engine.step_tokens} is less than engine.max_batch "
            f"({config.engine.max_batch}); each running request needs one token a step",
            field="engine.step_tokens",
        )
    if config.server.store_poll_seconds < LEAST_POLL_SECONDS:
        raise ConfigError(
            f"server.store_poll_seconds: {config.server.store_poll_seconds:g} is out of range; it "
            f"must be at least {LEAST_POLL_SECONDS:g}",
            field="server.store_poll_seconds",
        )
    if config.server.store and "://" not in config.server.store:
        raise ConfigError(
            "server.store: it is no URL; give one such as s3://bucket/prefix or "
            "file:///mnt/adapters, or a directory as server.state",
            field="server.store",
        )
    if not 0 < config.engine.tenant_queue <= 1:
        raise ConfigError(
            f"engine.tenant_queue: {config.engine.tenant_queue:g} is out of range; it must be "
            "above 0 and at most 1",
            field="engine.tenant_queue",
        )
    if 0 < config.engine.step_pace < 1:
        raise ConfigError(
            f"engine.step_pace: {config.engine.step_pace:g} is out of range; no step with prompt "
            "tokens is shorter than one without: it must be at least 1, or 0 for no limit",
            field="engine.step_pace",
        )
    if not 0 < config.engine.memory_fraction <= 1:
        raise ConfigError(
            f"engine.memory_fraction: {config.engine.memory_fraction:g} is out of range; it must "
            "be above 0 and at most 1",
            field="engine.memory_fraction",
        )
    if config.engine.tensor_parallel > 1 and config.engine.kernels == "native":
        raise ConfigError(
            "engine.kernels: 'native' computes a step in one process alone, and "
            f"engine.tensor_parallel asks for {config.engine.tensor_parallel}; use 'auto'",
            field="engine.kernels",
        )
    if 0 < config.cluster.max_replicas < config.cluster.replicas:
        raise ConfigError(
            f"cluster.max_replicas: {config.cluster.max_replicas} is less than cluster.replicas "
            f"({config.cluster.replicas}); raise it, or 0 for a fixed number",
            field="cluster.max_replicas",
        )
    if config.cluster.spill < 1:
        raise ConfigError(
            f"cluster.spill: {config.cluster.spill:g} is out of range; it must be at least 1: no "
            "replica could have less than the mean",
            field="cluster.spill",
        )
    if config.adapters.dtype == "int8" and config.engine.tensor_parallel > 1:
        raise ConfigError(
            "adapters.dtype: 'int8' is for one device, and engine.tensor_parallel asks for "
            f"{config.engine.tensor_parallel}; use 'auto'",
            field="adapters.dtype",
        )
    if 0 < config.adapters.slots < config.adapters.max_mixture:
        raise ConfigError(
            f"adapters.slots: {config.adapters.slots} is less than adapters.max_mixture "
            f"({config.adapters.max_mixture}); a full mixture would never fit",
            field="adapters.slots",
        )
