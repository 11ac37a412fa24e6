"""What a server is made of: the slow part, done on a thread while health says NOT_SERVING."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mora_serve.adapters.registry import Registry
from mora_serve.adapters.storage import SharedStorage, Storage
from mora_serve.config import Config
from mora_serve.core import DEFAULT_TENANT, SHARED_TENANT
from mora_serve.engine.engine import Engine
from mora_serve.engine.team import Team, load_ranks
from mora_serve.errors import ConfigError, MoraError
from mora_serve.model.loading import Base, Progress
from mora_serve.router.feedback import FeedbackStore
from mora_serve.router.routing import Routing
from mora_serve.router.selection import Selector
from mora_serve.server.parts import BaseModel, ServedEngine
from mora_serve.server.poll import Poller
from mora_serve.server.states import EngineStates

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembly:
    """The parts that outlive a call. ``engine`` is not started yet; ``feedback`` may be off."""

    config: Config
    base: BaseModel
    registry: Registry
    routing: Routing
    selector: Selector
    engine: ServedEngine
    feedback: FeedbackStore | None
    poller: Poller | None
    alone: bool

    def close(self) -> None:
        """Stop the engine and let go of the registry and of feedback."""
        if self.poller is not None:
            self.poller.close()
        self.engine.stop()
        self.routing.close()
        self.registry.close()
        if self.feedback is not None:
            self.feedback.close()


def assemble(config: Config) -> Assembly:
    """Load the base, open the registry, make the engine.

    Raises ConfigError for a configuration that cannot be served.
    """
    base, team = load(config)
    try:
        return join(config, base, lambda registry: make_engine(config, base, team, registry))
    except BaseException:
        if team is not None:
            team.close()
        raise


def load(config: Config) -> tuple[Base, Team | None]:
    """The base, and the team that has the rest of it; raises as ``load_ranks`` does."""
    start = time.monotonic()
    log.info("loading base %s", config.base.model)
    base, team = load_ranks(config, _progress())
    log.info(
        "loaded %s (%s) in %.1f s: %.1f MB of linear weights, %.1f MB besides%s",
        base.name,
        base.shape.model_type,
        time.monotonic() - start,
        base.linear_bytes / 1e6,
        base.other_bytes / 1e6,
        "" if team is None else f", on each of {team.group.size} ranks",
    )
    return base, team


def make_engine(config: Config, base: Base, team: Team | None, registry: Registry) -> Engine:
    """An engine that has computed once, and is not started."""
    engine = Engine(base, config, registry.open, team)
    engine.warm_up()
    return engine


def open_registry(config: Config, base: BaseModel) -> Registry:
    """The registry that the configuration names. Raises ConfigError."""
    return Registry(_place(config), config.adapters, base.shape, base.fingerprint)


def join(
    config: Config,
    base: BaseModel,
    engine_of: Callable[[Registry], ServedEngine],
    *,
    alone: bool = True,
) -> Assembly:
    """The parts around a base, with the engine that ``engine_of`` makes for their registry.

    Not ``alone``: others change the registry too, and the engines that read it are elsewhere.
    """
    state = Path(config.server.state) if config.server.state else None
    registry = open_registry(config, base)
    feedback = _feedback(config, state)
    if config.base.model == "demo":
        from mora_serve.demo.bundle import register_bundle

        try:
            # Where keys tell tenants apart, the bundle is for all of them.
            tenant = SHARED_TENANT if config.access.file else DEFAULT_TENANT
            register_bundle(registry, base.shape, config.adapters, tenant)
        except MoraError as e:
            raise ConfigError(
                f"base.model: the bundled adapters do not fit the configuration ({e.message}); "
                "raise its limits, or serve another base",
                field="base.model",
            ) from e
    engine = engine_of(registry)
    # The engine does not run yet: states for the stored adapters' keys are computed right here.
    routing = Routing(registry, base.fingerprint, EngineStates(engine))
    if config.router.path:
        _load_router(routing, Path(config.router.path))
    selector = Selector(registry, routing, config)
    poller = None
    if config.server.store or not alone:
        poller = Poller(registry, config.server.store_poll_seconds)
    return Assembly(config, base, registry, routing, selector, engine, feedback, poller, alone)


def _place(config: Config) -> Path | Storage | None:
    state = Path(config.server.state) if config.server.state else None
    if not config.server.store:
        return state
    cache = state / "cache" if state else None
    return SharedStorage(config.server.store, cache, config.server.store_cache_bytes)


def _feedback(config: Config, state: Path | None) -> FeedbackStore | None:
    if not config.router.feedback:
        return None
    log.info("feedback is on: the prompts of task hints are stored")
    return FeedbackStore(state / "feedback" if state else None, config.router.feedback_bytes)


def _load_router(routing: Routing, path: Path) -> None:
    try:
        routing.load(path.read_bytes())
    except OSError as e:
        raise ConfigError(
            f"router.path: the file cannot be read ({e.strerror}); give a router's file",
            field="router.path",
        ) from e
    except MoraError as e:
        raise ConfigError(f"router.path: {e.message}", field="router.path") from e


def _progress() -> Progress:
    """Log a line for each tenth of the layers."""
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if (tenth := 10 * done // total) > told:
            told = tenth
            log.info("loading base: %d of %d layers", done, total)

    return progress
